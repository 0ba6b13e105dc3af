"""The file: valid, the same configuration, with the reasons; and without secrets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.tune.measurement import Objective
from pagegraph.runtime.tune.search import Change
from pagegraph.runtime.tune.written import write, yaml_of
from tests.runtime.tune.scripted import measurement

GOODPUT = Objective({"ttft": 500.0})


def changed(before: object, after: object) -> Change:
    return Change(before, after, measurement(1.5, tail=900.0), measurement(2.25, tail=420.0))


def test_what_was_given_and_what_was_changed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "m").mkdir()
    source = tmp_path / "in" / "c.yaml"
    source.write_text(
        "model: ../m\nmax_num_seqs: 32\napi_key: sk-hidden\nlog_level: warning\ninter_token_target_ms: none\n"
    )
    resolved = load_config(str(source), {"kv_cache_memory": "512MiB"}, environment={})
    config = dataclasses.replace(
        resolved.config,
        max_num_seqs=64,
        kv_cache_memory=1 << 30,
        speculative_method="ngram",
        inter_token_target_ms=40.0,
    )
    changes = {
        "max_num_seqs": changed(32, 64), "kv_cache_memory": changed(512 << 20, 1 << 30),
        "speculative_method": changed(None, "ngram"), "inter_token_target_ms": changed("none", 40.0),
    }  # fmt: skip
    output = tmp_path / "out" / "tuned.yaml"
    write(output, yaml_of(config, resolved.sources, changes, GOODPUT, "24 requests"), config)
    text = output.read_text()
    assert load_config(str(output), environment={}).config == dataclasses.replace(
        config, model=str(tmp_path / "m"), api_key=None
    )
    lines = text.splitlines()
    assert lines[0] == "# 24 requests" and "hidden" not in text and "kv_cache_memory: 1GiB" in lines
    reason = lines[lines.index("max_num_seqs: 64") - 1]
    assert (
        reason == "# max_num_seqs was 32: goodput 1.5 -> 2.25 requests/s, TTFT p99 900 -> 420 ms, ITL p99 900 -> 420 ms"
    )
    assert "block_size" not in text  # a default stays one


def test_a_file_that_gives_something_else_is_told(tmp_path: Path) -> None:
    resolved = load_config("org/model", {"max_num_seqs": "32"}, environment={})
    text = yaml_of(resolved.config, resolved.sources, {}, GOODPUT, "")
    with pytest.raises(ValueError, match="max_num_seqs=32 and not 64"):
        write(tmp_path / "t.yaml", text, dataclasses.replace(resolved.config, max_num_seqs=64))


def test_every_value_that_was_given_survives(tmp_path: Path) -> None:
    given = dict(
        served_model_name="a: b #c", allowed_origins=["https://a.example", "http://b.example:1"], compile="required",
        gpu_memory_utilization=0.85, num_blocks=99, max_model_len="1K", response_store_size=0, dtype="auto",
        speculative_method="none", inter_token_target_ms=None,
    )  # fmt: skip
    resolved = load_config("org/model", given, environment={})
    write(tmp_path / "t.yaml", yaml_of(resolved.config, resolved.sources, {}, GOODPUT, "x"), resolved.config)
    assert isinstance(resolved.config, Config)
