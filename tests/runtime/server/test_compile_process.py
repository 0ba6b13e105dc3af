"""The compiling process: its failure is told, it says that it goes on, and a filled cache needs none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from pagegraph.runtime.config import FIELDS, Config
from pagegraph.runtime.server import compile_process
from pagegraph.runtime.server.engine_settings import EngineSettings

# What no artefact depends on; every setting is here or among `compile_process.ARTEFACT_SETTINGS`.
OTHER_SETTINGS = {
    "tokenizer", "served_model_name", "seed", "generation_config",  # values, not form
    "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill",
    "inter_token_target_ms", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max",  # symbols in the graph, or not in it
    "compile", "compile_cache_dir",  # whether and where
    "host", "port", "probe_host", "probe_port", "workers", "threads", "max_queue", "drain_timeout_s",
    "watchdog_timeout_s", "api_key", "api_key_file", "log_level",
    "tool_call_parser", "reasoning_parser", "response_store_size", "pooling",
}  # fmt: skip


def config_of(folder: Path, **changed: object) -> Config:
    return Config(
        **{"model": str(folder / "nothing"), "compile_cache_dir": str(folder / "cache"), "device": "cpu", **changed}
    )


def built_of(num_blocks: int = 8, **changed: object) -> SimpleNamespace:
    """As much of a built model as the stamp looks at."""
    model = SimpleNamespace(config=LlamaConfig(num_hidden_layers=1, **changed))
    return SimpleNamespace(steps=[SimpleNamespace(paged_model=SimpleNamespace(model=model))], num_blocks=num_blocks)


def test_a_failure_is_told_with_its_reason_and_leaves_no_stamp(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    settings = tmp_path / "settings.json"
    told = EngineSettings(
        config=config, engine_address="ipc:///nowhere", metrics_port=1, drain_flag=tmp_path / "draining"
    )
    settings.write_text(told.to_json())
    (tmp_path / "cache" / "inductor").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing"):
            compile_process.fill_cache(config, built_of(), settings)


def test_a_filled_cache_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    stamp = compile_process._stamp(config, built_of())
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    monkeypatch.setattr(compile_process.subprocess, "Popen", None)
    compile_process.fill_cache(config, built_of(), tmp_path / "settings.json")


def test_a_long_compilation_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path)
    compile_process._stamp(config, built_of()).parent.mkdir(parents=True)
    monkeypatch.setattr(compile_process, "REPORT_S", 0.05)
    monkeypatch.setattr(
        compile_process,
        "module_command",
        lambda *_: [sys.executable, "-c", "import time; time.sleep(0.5); print('x' * 100_000)"],
    )
    with caplog.at_level(logging.INFO):
        compile_process.fill_cache(config, built_of(), tmp_path / "settings.json")
    assert len([line for line in caplog.messages if "still compiling" in line]) >= 2
    assert compile_process._stamp(config, built_of()).exists()


def test_every_setting_is_known_to_reach_the_artefacts_or_not() -> None:
    assert set(compile_process.ARTEFACT_SETTINGS) | OTHER_SETTINGS == set(FIELDS)
    assert not set(compile_process.ARTEFACT_SETTINGS) & OTHER_SETTINGS


def test_the_stamp_depends_on_what_the_artefacts_do_and_on_nothing_else(tmp_path: Path) -> None:
    stamp = compile_process._stamp(config_of(tmp_path), built_of())
    served = dict(
        host="0.0.0.0",
        port=9,
        workers=5,
        api_key="k",
        max_num_seqs=7,
        max_queue=9,
        served_model_name="x",
        compile="required",
    )
    assert compile_process._stamp(config_of(tmp_path, **served), built_of()) == stamp
    for other in (
        dict(quantization="int8"),
        dict(merge_linears=False),
        dict(num_threads=3),
        dict(kv_cache_memory=1 << 20),
    ):
        assert compile_process._stamp(config_of(tmp_path, **other), built_of()) != stamp
    for built in (built_of(num_blocks=9), built_of(hidden_size=64), built_of(rms_norm_eps=0.5)):
        assert compile_process._stamp(config_of(tmp_path), built) != stamp


def test_sources_in_all_languages_are_looked_at() -> None:
    names = {path.name for path in compile_process.SOURCES}
    assert {"paged.py", "merge_linears.py", "cpu_int4.py", "cpu_int4.cpp"} <= names
