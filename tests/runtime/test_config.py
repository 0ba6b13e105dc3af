"""The configuration: values, sources, and messages that name the key and a value that works."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.config import (
    FIELDS,
    Config,
    ConfigError,
    config_from_dict,
    first_key,
    load_config,
    require_local_files,
)
from pagegraph.runtime.config_values import parse_bytes, parse_whole
from tests.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def refused(overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("org/model", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8k", 8000), ("8K", 8192), ("1m", 10**6), ("1M", 1 << 20), ("4096", 4096), (7, 7), ("1_000", 1000), (" 5 ", 5)],
)
def test_whole_numbers(text: str | int, value: int) -> None:
    assert parse_whole(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1GiB", 1 << 30), ("1GB", 10**9), ("1.5 KiB", 1536), ("512mib", 512 << 20), (4096, 4096), ("10", 10)],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("parse", [parse_whole, parse_bytes])
@pytest.mark.parametrize("value", ["", "k", "8x", "1e3", True, 1.5, None, [1], "１GiB "])
def test_junk_is_no_number(parse: Any, value: Any) -> None:
    with pytest.raises(ValueError):
        parse(value)


def test_flags_win_over_the_file_and_sources_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, "# head\nmodel: org/name\nmax_model_len: 8k\nport: 81\n")
    resolved = load_config(path, {"port": "82", "host": None})
    assert (resolved.config.model, resolved.config.max_model_len, resolved.config.port) == ("org/name", 8000, 82)
    assert resolved.sources["max_model_len"] == f"{path}:3"
    assert resolved.sources["port"] == "--port"
    assert resolved.sources["host"] == "default"
    assert set(resolved.sources) == set(FIELDS)


def test_a_model_name_alone_is_a_configuration() -> None:
    resolved = load_config("org/model")
    assert resolved.config == Config(model="org/model")
    assert resolved.sources["model"] == "argument"


def test_unknown_key_names_the_nearest_and_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nmax_num_seq: 4\n")
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(path)}:2: unknown key max_num_seq; did you mean max_num_seqs\?$"
    ):
        load_config(path)
    assert "runtime config --keys" in refused({"zzzzzz": "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "model is set twice"),
        ("- a\n", "not a list of `key: value` lines"),
        ("model: [", "not valid YAML"),
        ("model: m\nserver:\n  port: 1\n", "unknown key server"),
        ("model: 12\n", "quote it"),
        ("port: 1\n", "model is missing"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, text))


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot read nowhere.yaml: No such file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"block_size": "12"}, ["block_size=12", "power of two", "8 works"]),
        ({"block_size": "4"}, ["block_size=4", "8 works"]),
        ({"gpu_memory_utilization": "0"}, ["gpu_memory_utilization=0", "(0, 1]"]),
        ({"gpu_memory_utilization": "1.01"}, ["(0, 1]"]),
        ({"gpu_memory_utilization": "nan"}, ["gpu_memory_utilization=nan is not a number"]),
        ({"max_num_seqs": "0"}, ["max_num_seqs=0", "at least 1"]),
        (
            {"max_num_seqs": "64", "max_num_batched_tokens": "32"},
            ["max_num_seqs=64 exceeds max_num_batched_tokens=32", "to 32 or less", "to 64 or more"],
        ),
        ({"max_num_seqs": "4096", "device": "cpu"}, ["max_num_batched_tokens=2048 (the default on cpu)"]),
        (
            {"enable_chunked_prefill": "false", "max_model_len": "8K", "max_num_batched_tokens": "8k"},
            ["max_num_batched_tokens=8000", "max_model_len=8192"],
        ),
        (
            {"num_blocks": "11", "max_model_len": "161"},
            ["(11 - 1 null block) x block_size 16 = 160", "to 160 or less", "to 12 or more"],
        ),
        ({"num_blocks": "11", "kv_cache_memory": "1GiB"}, ["num_blocks and kv_cache_memory"]),
        ({"quantization": "awk"}, ["quantization=awk", "known: awq, gptq", "did you mean awq?"]),
        ({"dtype": "bf16"}, ["dtype=bf16", "did you mean bfloat16?"]),
        ({"load_format": "gguf"}, ["load_format=gguf", "gguf_file"]),
        ({"port": "70000"}, ["port=70000", "[0, 65535]"]),
        ({"probe_port": "8000"}, ["probe_port=8000 is also port", "8001"]),
        ({"compile": "maybe"}, ["compile=maybe is none of true, false and required"]),
        ({"served_model_name": "a\nb"}, ["control characters"]),
        ({"inter_token_target_ms": "0"}, ["inter_token_target_ms=0", "above 0", "auto and none work"]),
        ({"inter_token_target_ms": "fast"}, ["inter_token_target_ms=fast is not a number", "auto and none work"]),
    ],
)
def test_refusals_name_the_key_and_a_value_that_works(overrides: dict[str, str], parts: list[str]) -> None:
    message = refused(overrides)
    assert all(part in message for part in parts), message


def test_what_a_refusal_proposes_is_accepted() -> None:
    load_config("m", {"num_blocks": "11", "max_model_len": "160"})
    load_config("m", {"num_blocks": "12", "max_model_len": "161"})
    load_config("m", {"max_num_seqs": "64", "max_num_batched_tokens": "64"})
    load_config("m", {"enable_chunked_prefill": "false", "max_model_len": "8K", "max_num_batched_tokens": "8K"})


def test_the_token_budget_is_asked_with_the_device() -> None:
    config = load_config("m", {"max_num_seqs": "4096"}).config
    assert config.batched_tokens("cuda") == 8192
    with pytest.raises(ConfigError, match="max_num_seqs=4096"):
        config.batched_tokens("cpu")
    assert load_config("m").config.batched_tokens("cpu") == 2048
    assert load_config("m").config.cpu_kv_cache_memory() == 1 << 30


def test_the_api_key_is_not_in_messages() -> None:
    assert "s3cret" not in refused({"api_key": "s3cret\x07"})


def test_speculation_is_a_mapping_in_a_file_and_flags_win_over_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: org/m\nspeculative:\n  method: ngram+draft\n  model: ./small\n  num_speculative_tokens: auto\n",
    )
    found = load_config(path, {"prompt_lookup_max": "7"})
    config = found.config
    assert (config.method, config.num_speculative_tokens, config.prompt_lookup_max) == ("ngram+draft", None, 7)
    assert config.speculative_model == str(tmp_path / "small") and found.sources["speculative_model"] == f"{path}:2"
    assert config.draft.model == config.speculative_model and config.draft.method is None
    assert load_config(path, {"num_speculative_tokens": "3"}).config.num_speculative_tokens == 3


def test_a_draft_model_means_method_draft() -> None:
    config = load_config("org/model", {"speculative_model": "org/small"}).config
    assert config.method == "draft" and config.draft.model == "org/small"
    assert load_config("org/model").config.draft is None and load_config("org/model").config.max_draft_tokens == 0


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        (dict(), 256), (dict(max_num_seqs=4), 4), (dict(max_num_seqs=4, speculative_method="ngram"), 64),
        (dict(max_num_seqs=4, speculative_method="ngram", num_speculative_tokens=3), 16),
        (dict(speculative_method="ngram"), 256), (dict(max_num_seqs=4, speculative_method="ngram", max_num_batched_tokens=32), 32),
    ],
)  # fmt: skip
def test_a_step_has_room_for_draft_tokens(overrides: dict[str, Any], tokens: int) -> None:
    assert load_config("org/model", overrides).config.max_decode_tokens == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speculative: ngram", "speculative=ngram is not a mapping"),
        ("speculative: {methods: ngram}", "unknown key speculative.methods; known: method, model"),
        ("speculative: {method: ngrams}", "known: ngram, suffix, draft, ngram+draft, suffix+draft; did you mean ngram"),
    ],
)
def test_bad_speculation_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, f"model: org/m\n{text}\n"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(speculative_method="draft"), "needs a draft model; name it in speculative_model"),
        (dict(speculative_method="ngram", speculative_model="org/m"), "use ngram+draft"),
        (dict(num_speculative_tokens="0"), "num_speculative_tokens=0"),
        (dict(prompt_lookup_min="6"), "set prompt_lookup_min to 5 or less"),
    ],
)
def test_bad_speculation(overrides: dict[str, Any], message: str) -> None:
    assert message in refused(overrides)


@pytest.mark.parametrize("key", ["num_blocks", "max_model_len"])
@pytest.mark.parametrize("word", ["none", "auto", "AUTO"])
def test_unset_words(key: str, word: str) -> None:
    assert getattr(load_config("m", {key: word}).config, key) is None


@pytest.mark.parametrize(
    ("given", "value"), [("auto", "auto"), ("AUTO", "auto"), ("none", "none"), ("20", 20.0), (7.5, 7.5)]
)
def test_targets_between_tokens(given: str | float, value: str | float) -> None:
    assert load_config("m", {"inter_token_target_ms": given}).config.inter_token_target_ms == value
    assert Config(model="m").inter_token_target_ms == "auto"


def test_a_target_of_null_in_a_file_is_none(tmp_path: Path) -> None:
    assert (
        load_config(write(tmp_path, "model: m\ninter_token_target_ms: null\n")).config.inter_token_target_ms == "none"
    )


def test_relative_models_of_a_file_do_not_depend_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "model: ../models/m.gguf\n")
    monkeypatch.chdir("/")
    assert load_config(path).config.model == str(tmp_path.parent / "models" / "m.gguf")


def test_model_name_shows_no_path() -> None:
    assert load_config("/data/models/Smol.Q4.gguf").config.model_name == "Smol.Q4"
    assert load_config("org/name").config.model_name == "org/name"
    assert load_config("org/name", {"served_model_name": "short"}).config.model_name == "short"


def test_a_missing_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; `make model` fetches it"):
        require_local_files(Config(model=str(tmp_path / "models" / "m.gguf")))
    require_local_files(Config(model=str(tmp_path)))
    require_local_files(Config(model="org/name"))
    with pytest.raises(ConfigError, match="is not a folder with a tokenizer.json"):
        require_local_files(Config(model="org/name", tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").touch()
    require_local_files(Config(model="org/name", tokenizer=str(tmp_path)))


def test_a_limit_of_time_is_one_that_threads_can_wait_for() -> None:
    with pytest.raises(ConfigError, match=r"watchdog_timeout_s=1e308 is outside \[1, 1000000\]"):
        load_config("org/model", {"watchdog_timeout_s": "1e308"})
    longest = load_config("org/model", {"watchdog_timeout_s": 1_000_000}).config.watchdog_timeout_s
    assert longest < threading.TIMEOUT_MAX


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_num_seqs": st.integers(1, 2048),
            "max_model_len": st.integers(1, 10**6) | st.none(),
            "drain_timeout_s": st.floats(0, 1e6),
            "compile": st.sampled_from([True, False, "required"]),
            "api_key": st.text("abc", min_size=1) | st.none(),
            "dtype": st.sampled_from(["auto", "float32"]),
        },
    )
)
def test_as_dict_and_back(values: dict[str, Any]) -> None:
    config = load_config("org/model", values).config
    assert config_from_dict(dataclasses.asdict(config)) == config


@given(
    st.sampled_from(sorted(FIELDS)),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
)
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    try:
        load_config("org/model", {key: value})
    except ConfigError as error:
        assert key in str(error)


def test_every_default_is_accepted_as_given() -> None:
    defaults = {key: option.default for key, option in FIELDS.items() if key != "model"}
    assert load_config("m", defaults).config == Config(model="m")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    config = load_config(str(path)).config
    assert config.model
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    for key, source in load_config(str(path)).sources.items():
        assert source == "default" or getattr(config, key) != FIELDS[key].default or key == "max_num_batched_tokens"


def test_there_are_shipped_configurations() -> None:
    assert "smollm2-cpu" in {path.stem for path in CONFIGS}


def test_imports_no_torch() -> None:
    code = "import pagegraph.runtime.config, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


KEY_FILE = "the file's key\n"


@pytest.mark.parametrize(
    ("text", "variable", "flags", "key", "source"),
    [
        ("api_key: written", None, {}, "written", "c.yaml:2"),
        ("api_key: written", "variable", {}, "variable", "PAGEGRAPH_API_KEY"),
        ("api_key_file: ./key", None, {}, "the file's key", "api_key_file, c.yaml:2"),
        ("api_key_file: ./key", "variable", {}, "variable", "PAGEGRAPH_API_KEY"),
        ("api_key: written", "variable", {"api_key": "flag"}, "flag", "--api-key"),
        ("api_key: written", "variable", {"api_key_file": "key"}, "the file's key", "api_key_file, --api-key-file"),
        ("api_key: written", "variable", {"api_key": "none"}, None, "--api-key"),
        ("api_key: [one, two]", None, {}, "one\ntwo", "c.yaml:2"),
        ("api_key: written", "one\ntwo", {}, "one\ntwo", "PAGEGRAPH_API_KEY"),
        ("api_key_file: ./keys", None, {}, "one\ntwo", "api_key_file, c.yaml:2"),
        ("", None, {}, None, "default"),
    ],
)
def test_where_the_api_key_may_come_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    variable: str | None,
    flags: dict[str, str],
    key: str | None,
    source: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_text(KEY_FILE)
    Path("keys").write_text("one\n\n two \n")
    Path("c.yaml").write_text(f"model: org/name\n{text}\n")
    resolved = load_config("c.yaml", flags, {} if variable is None else {"PAGEGRAPH_API_KEY": variable})
    assert (resolved.config.api_key, resolved.sources["api_key"]) == (key, source)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"api_key_file": "missing"}, {}, "api_key_file=missing cannot be read: No such file"),
        ({"api_key_file": "empty"}, {}, "api_key_file=empty is empty.*: a key a line is expected"),
        ({"api_key_file": "twice"}, {}, "api_key_file=twice holds a key twice: a key a line is expected"),
        ({"api_key_file": "binary"}, {}, "api_key_file=binary contains control characters: a key a line"),
        ({"api_key_file": "empty", "api_key": "a"}, {}, "set one of them"),
        ({"api_key": []}, {}, "api_key=\\*\\*\\* is an empty list"),
        (
            {"api_key": "s\N{LATIN SMALL LETTER E WITH ACUTE}cret"},
            {},
            "clients cannot send in a header; a key is printable ASCII",
        ),
        ({"api_key_file": "separators"}, {}, "api_key_file=separators .*: a key a line is expected"),
        ({}, {"PAGEGRAPH_API_KEY": ""}, "api_key=\\*\\*\\* is empty"),  # not an open server
    ],
)
def test_an_api_key_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], environment: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("separators").write_text("one\u2028two\n")
    Path("twice").write_text("one\ntwo\none\n")
    Path("binary").write_text("one\ntw\x00o\n")
    with pytest.raises(ConfigError, match=message):
        load_config("org/name", flags, environment)


@pytest.mark.parametrize(
    ("variable", "key"), [(None, None), ("", None), ("\n", None), ("one", "one"), ("\n one \ntwo\n", "one")]
)
def test_a_client_sends_the_first_key(variable: str | None, key: str | None) -> None:
    assert first_key({} if variable is None else {"PAGEGRAPH_API_KEY": variable}) == key


def test_threads_are_enough_for_the_engine_and_its_queue() -> None:
    assert Config(model="m", max_num_seqs=32, max_queue=256).enough_threads == 32 + 256 + 32
    assert Config(model="m", max_queue=100_000).enough_threads == 4096
    assert (
        load_config("org/name", {"threads": "auto"}).config.threads is None
        and load_config("org/name", {"threads": "7"}).config.threads == 7
    )


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("https://a.org", "https://a.org"),
        (["https://a.org", "http://localhost:3000", "https://a.org"], "https://a.org http://localhost:3000"),
        ("app://obsidian.md  capacitor://localhost", "app://obsidian.md capacitor://localhost"),
        ("*", "*"),
        ("none", None),
    ],
)
def test_allowed_origins(given: Any, found: str | None) -> None:
    assert load_config("org/model", {"allowed_origins": given}).config.allowed_origins == found


@pytest.mark.parametrize(
    "given",
    [
        "a.org",
        "https://a.org/",
        "https://a.org/path",
        "* https://a.org",
        "https://\N{LATIN SMALL LETTER U WITH DIAERESIS}.org",
        "https://*.a.org",
        "https://u@a.org",
        3,
        [],
    ],
)
def test_what_is_no_origin(given: Any) -> None:
    assert "allowed_origins" in refused({"allowed_origins": given})


@pytest.mark.parametrize("name", ["org/name", "name", "org/Name-1.5_B", "a" * 96, "gpt2"])
def test_names_of_hubs(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    require_local_files(Config(model=name))


@pytest.mark.parametrize(
    "name", ["nothing/", "a b", "org/name/more", "-name", "org/name.", "a--b", "a..b", "a" * 97, "name.git"]
)
def test_what_is_neither_there_nor_a_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    with pytest.raises(ConfigError, match="is no folder or file on this machine, and no hub name such as org/name"):
        require_local_files(Config(model=name))
