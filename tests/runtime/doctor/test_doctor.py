"""`runtime doctor`: each rule with metrics that it holds of and with a server that is well; checks of the machine."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.runtime.cli import main
from pagegraph.runtime.config import load_config
from pagegraph.runtime.doctor import machine
from pagegraph.runtime.doctor.rules import RULES, Metrics, diagnose
from pagegraph.runtime.engine.metrics import Counts, EngineMetrics
from pagegraph.runtime.scheduler.counters import Counters
from pagegraph.runtime.server.restarts import Restarts, ServerMetrics


def server(**changed: object) -> EngineMetrics:
    """Metrics of a server that has served 100 requests well, but for what is changed."""
    given = dict(
        running=8, waiting=0, usage=0.5, preemptions=0, queries=50_000, steps=1000, padding=100, graphed=990, misses=0,
        first=0.1, slow=0.02, queue=0.01, prefill=0.09, drafts=0, accepted=0, errors=0, refused=0, state="compiled",
    ) | changed  # fmt: skip
    metrics = EngineMetrics("m", 4096)
    launched = StepCounts(steps=given["steps"], graphed=given["graphed"], tokens=8000, padding=given["padding"])
    launched.graph_misses["too_many_tokens"] = given["misses"]
    scheduled = Counters()
    scheduled.preemptions, scheduled.prefix_queries = given["preemptions"], given["queries"]
    scheduled.draft_tokens, scheduled.accepted = given["drafts"], given["accepted"]
    counts = Counts(given["running"], given["waiting"], given["usage"], scheduled, launched)
    metrics.counts, metrics.compile_state = lambda: counts, lambda: given["state"]
    for _ in range(100):
        metrics.observe_first_token(given["first"])
        metrics.observe_served(
            queue_time=given["queue"], prefill_time=given["prefill"], decode_time=1, since_arrival=1.1,
            prompt_tokens=500, generation_tokens=50, max_tokens=64,
        )  # fmt: skip
    metrics.observe_inter_tokens(np.array([0.009] * 2000 + [given["slow"]] * 60))
    metrics.observe_refused("queue", given["refused"])
    for _ in range(given["errors"]):
        metrics.observe_finished("error")
    return metrics


def told(restarts: int = 0, **changed: object) -> str:
    """All that such a server says at /metrics."""
    counted = Restarts(9, 600.0)
    for _ in range(restarts):
        counted.take("died")
    return (ServerMetrics("m", [(counted, lambda: True)]).render() + server(**changed).render()).decode()


ILL = {
    "preemptions": (dict(preemptions=40), "max_num_seqs=6"),
    "queue beside free blocks": (dict(waiting=20, usage=0.4), "max_num_seqs to 18"),
    "queue for blocks": (dict(waiting=8, usage=0.97), "2.0 times the blocks"),
    "queue too short": (dict(refused=30), "max_queue to 16"),
    "no prefix cache": (dict(queries=0), "enable_prefix_caching=true"),
    "prompts stall streams": (dict(slow=0.8), "inter_token_target_ms=auto"),
    "padding": (dict(padding=8000), "a multiple of 8 near 8"),
    "graph misses": (dict(misses=300), "max_num_batched_tokens to 16384"),
    "late first tokens": (dict(first=4.0, prefill=4.0), "inter_token_target_ms=none"),
    "drafts that miss": (dict(drafts=5000, accepted=100), "num_speculative_tokens=auto"),
    "not compiled": (dict(state="failed"), "compile=required"),
    "failed requests": (dict(errors=3), "3 requests ended with an error"),
    "restarts": (dict(restarts=2), "2 times because it died and 0 because it hung"),
}


def test_a_server_that_is_well_gets_no_advice() -> None:
    assert diagnose(told()) == []


def test_a_server_that_has_done_nothing_gets_no_advice() -> None:
    assert diagnose(EngineMetrics("m", 4096).render().decode()) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_finds_its_illness_and_no_other(rule: str) -> None:
    changed, words = ILL[rule]
    [found] = diagnose(told(**changed))
    assert found.rule == rule and words in found.advice


def test_a_text_of_another_server_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with pagegraph:"):
        Metrics('vllm:num_requests_running{model_name="m"} 1\n')


@pytest.fixture
def address() -> Iterator[str]:
    """A small server on the loopback that answers with metrics of one that is ill."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = server(preemptions=40).render() if self.path == "/metrics" else b""
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    served = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_a_server_is_asked_for_its_metrics(address: str) -> None:
    result = CliRunner().invoke(main, ["doctor", address])
    assert result.exit_code == 1 and "40 preemptions" in result.output and "max_num_seqs=6" in result.output
    nobody = CliRunner().invoke(main, ["doctor", "http://127.0.0.1:1"])
    assert nobody.exit_code == 1 and "name a server" in nobody.output


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a", "http://a b", "127.0.0.1:8000"])
def test_what_is_no_url_is_an_error_for_people(url: str) -> None:
    result = CliRunner().invoke(main, ["doctor", url])
    assert result.exit_code == 1 and "name a server, such as http://127.0.0.1:8000" in result.output


def test_the_key_of_a_server_is_sent() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers.get("Authorization") == "Bearer one"
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(server().render() if is_known else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
        refused = CliRunner().invoke(main, ["doctor", address], env={"PAGEGRAPH_API_KEY": None})
        assert refused.exit_code == 1 and "give its key in PAGEGRAPH_API_KEY" in refused.output
        asked = CliRunner().invoke(main, ["doctor", address + "/v1"], env={"PAGEGRAPH_API_KEY": "one\ntwo"})
        assert "rules holds" in asked.output, asked.output
        served.shutdown()


def test_the_machine_is_checked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = machine.checks(load_config(str(model), {"port": str(port)}).config)
        assert "can be read" in found["model"]() and found["python"]() and found["cache"]()
        with pytest.raises(ValueError, match="set port to 0"):
            found["port"]()
    missing = machine.checks(load_config("/no/model").config)
    with pytest.raises(ValueError, match="does not exist"):
        missing["model"]()


def test_the_command_names_every_check() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code in (0, 1)
    assert all(name in result.output for name in machine.checks(None))
