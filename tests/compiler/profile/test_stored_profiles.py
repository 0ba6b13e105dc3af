"""Memory profiles in the start cache: found for the same sizes of steps, measured anew where they make no sense."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagegraph.compiler import build
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.profile.memory import MemoryProfile, StoredProfiles
from pagegraph.compiler.start_cache import StartCache
from pagegraph.compiler.tensor_parallel.shards import Ranks

PROFILES = [MemoryProfile(step=3, graphs=2, kernels=1), MemoryProfile(step=6, graphs=5, kernels=4)]


def stored(folder: Path, **sizes: int) -> StoredProfiles:
    return StoredProfiles(StartCache(folder, "key"), {"max_num_seqs": 4, **sizes})


def test_a_later_start_of_the_same_sizes_finds_them(tmp_path: Path) -> None:
    assert stored(tmp_path).read() is None
    stored(tmp_path).write(PROFILES)
    assert stored(tmp_path).read() == PROFILES
    assert stored(tmp_path, max_num_seqs=5).read() is None


@pytest.mark.parametrize("content", [b"7", b"[7]", b'[{"step": 1}]', b"{"])
def test_a_profile_of_another_form_is_none(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiles = stored(tmp_path)
    profiles._cache.write(profiles._name, content)
    assert profiles.read() is None and "measuring anew" in caplog.text


def test_ranks_measure_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are measured sum over ranks: what one rank finds stored is of use only where the others find it too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 10 << 30))
    monkeypatch.setattr(build, "cuda_available", lambda share, step, graphs, device: 1 << 20)
    measured: list[object] = []
    monkeypatch.setattr(build, "_profiles", lambda *given: measured.append(given) or PROFILES[:1])
    model: Any = SimpleNamespace(
        slot_bytes=0, max_model_len=16, num_slots=lambda options: 5, draft_bytes=lambda options: 0
    )
    model.state = lambda *given, **named: SimpleNamespace(caches=SimpleNamespace(block_bytes=1 << 10))
    step = StepOptions(max_num_seqs=4, max_decode_tokens=4, max_num_batched_tokens=8)
    options = CompilerOptions(
        model=ModelOptions(model="m"), device=torch.device("cuda", 1), kv_cache=KvCacheOptions(), step=step, ranks=Ranks(1, 2, "ranks")
    )  # fmt: skip
    cache = StartCache(tmp_path, "key")
    StoredProfiles(cache, asdict(step)).write(PROFILES[:1])
    for all_have, times in ((1, 0), (0, 1)):
        asked = []
        monkeypatch.setattr(build.groups, "least", lambda values, group: asked.append(list(values)) or [all_have])
        assert build._kv_budget(options, [model], cache).num_blocks == 1024
        assert asked == [[True]] and len(measured) == times
