"""The start cache: what changes its key, and that broken, truncated, read-only or crowded folders cost time and no more."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from pagegraph.compiler import start_cache
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.start_cache import StartCache, start_key

CPU = torch.device("cpu")


def paged(**changed: object) -> PagedModel:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    config = transformers.LlamaConfig(**{**sizes, **changed})
    return wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=64))


def key(model: PagedModel, more: dict | None = None) -> str:
    return start_key([model], CPU, more or {})


def test_a_key_is_the_same_for_the_same_model() -> None:
    assert key(paged()) == key(paged())


@pytest.mark.parametrize("changed", [dict(hidden_size=64), dict(rms_norm_eps=0.5), dict(num_hidden_layers=3)])
def test_another_configuration_has_another_key(changed: dict) -> None:
    assert key(paged(**changed)) != key(paged())


def test_weights_of_another_form_have_another_key() -> None:
    kept, other = paged(), paged()
    norm = other.model.model.norm
    norm.weight = nn.Parameter(norm.weight.to(torch.bfloat16), requires_grad=False)
    assert key(other) != key(kept)


def test_what_a_module_computes_with_is_in_the_key() -> None:
    kept, other = paged(), paged()
    other.model.model.layers[1].self_attn.scaling *= 2
    assert key(other) != key(kept)


def test_options_are_in_the_key() -> None:
    model = paged()
    assert key(model, {"passes": {"fuse_rope": True}}) != key(model, {"passes": {"fuse_rope": False}})


@pytest.mark.parametrize(
    "module, name",
    # As that module has them: transformers may have been imported anew since.
    [(start_cache.torch, "__version__"), (start_cache.transformers, "__version__"), (start_cache, "_triton")],
)
def test_another_version_has_another_key(module: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = paged()
    before = key(model)
    monkeypatch.setattr(module, name, (lambda: "9.9") if name == "_triton" else "9.9.9")
    assert key(model) != before


def test_another_source_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiler").mkdir()
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(start_cache.pagegraph, "__file__", str(tmp_path / "__init__.py"))
    found = set()
    for name, text in (("compiler/a.py", "1"), ("compiler/a.py", "2"), ("kernels/b.cpp", "2"), ("kernels/c.txt", "3")):
        (tmp_path / name).write_text(text)
        start_cache.sources_digest.cache_clear()
        found.add(start_cache.sources_digest())
    start_cache.sources_digest.cache_clear()
    assert len(found) == 3  # a file of another kind changes nothing


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = StartCache(tmp_path, "key")
    assert cache.read("forward") is None and not cache.has("forward")
    cache.write("forward", b"content")
    assert StartCache(tmp_path, "key").read("forward") == b"content"
    assert StartCache(tmp_path, "other").read("forward") is None


@pytest.mark.parametrize("broken", [b"", b"short", b"x" * 32, b"x" * 100])
def test_a_broken_file_is_missing_until_it_is_written_anew(
    broken: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = StartCache(tmp_path, "key")
    cache.write("forward", b"content")
    (tmp_path / "starts" / "key" / "forward").write_bytes(broken)
    assert cache.read("forward") is None and "is broken" in caplog.text
    cache.write("forward", b"again")
    assert cache.read("forward") == b"again"


def test_a_truncated_file_is_missing(tmp_path: Path) -> None:
    cache = StartCache(tmp_path, "key")
    cache.write("forward", b"content" * 100)
    path = tmp_path / "starts" / "key" / "forward"
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.read("forward") is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "starts").write_text("a file where the folder should be")
    cache = StartCache(tmp_path, "key")
    with caplog.at_level(logging.WARNING):
        cache.write("forward", b"content")
    assert "will not be faster" in caplog.text and cache.read("forward") is None


def test_a_disk_that_is_full_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start_cache.os, "replace", full)
    StartCache(tmp_path, "key").write("forward", b"content")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    contents = [bytes([at]) * 100_000 for at in range(8)]
    threads = [threading.Thread(target=StartCache(tmp_path, "key").write, args=("forward", one)) for one in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert StartCache(tmp_path, "key").read("forward") in contents
    assert os.listdir(tmp_path / "starts" / "key") == ["forward"]


def test_the_folders_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_cache, "MAX_BYTES", 2500)
    for at, name in enumerate(("a", "b", "c")):
        StartCache(tmp_path, name).write("forward", bytes(900))
        os.utime(tmp_path / "starts" / name, (at, at))
        if name == "b":
            StartCache(tmp_path, "a").read("forward")  # used again: b is older now
    assert sorted(os.listdir(tmp_path / "starts")) == ["a", "c"]


def test_an_entry_too_large_for_the_bound_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_cache, "MAX_BYTES", 100)
    for name in ("a", "b"):
        StartCache(tmp_path, name).write("forward", bytes(900))
    assert os.listdir(tmp_path / "starts") == ["b"]
