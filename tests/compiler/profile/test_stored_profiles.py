"""Memory profiles in the start cache: found for the same sizes of steps, measured anew where they make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagegraph.compiler.profile.memory import MemoryProfile, StoredProfiles
from pagegraph.compiler.start_cache import StartCache

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
