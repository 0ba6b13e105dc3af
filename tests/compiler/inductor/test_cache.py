"""The cache folder: what cannot be written there is told by the name of its setting."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors

from pagegraph.compiler.inductor.cache import naming_the_cache, use_cache


@pytest.mark.parametrize("folder", ["/proc/nothing", "/proc/nothing/below"])
def test_a_cache_that_cannot_be_made_is_named(folder: str) -> None:
    with pytest.raises(OSError, match=rf"^compile_cache_dir={folder} cannot be written to: No such file"):
        use_cache(Path(folder))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/models/x/tokenizer.json"),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/cache"),
        safetensors.SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_a_full_or_read_only_cache_is_named(error: Exception) -> None:
    reason = os.strerror(errno.EROFS if getattr(error, "errno", 0) == errno.EROFS else errno.ENOSPC)
    with pytest.raises(OSError, match=f"^compile_cache_dir=/cache cannot be written to: {reason}; name a folder"):
        with naming_the_cache(Path("/cache")):
            raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "none", "/models/x"), OSError("of the network"), ValueError("other")]
)
def test_what_has_to_do_with_other_places_is_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        with naming_the_cache(Path("/cache")):
            raise error
    assert raised.value is error


def test_beside_a_read_only_folder_libraries_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(os, "access", lambda *_: False)
    use_cache(tmp_path)
    assert "is read-only" in caplog.text
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert not Path(os.environ[name]).is_relative_to(tmp_path)
