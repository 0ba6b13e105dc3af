"""The private folder of one server: the engine's socket, settings, flags. And the removal of what dead servers left.

A server holds a lock on a file in its folder while it lives; the kernel gives the lock up however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

log = logging.getLogger("pagegraph.supervisor")

PREFIX = "pagegraph-"
SOCKET = "engine-{:02}.sock"
LOCK = "lock"
# Where a folder is made if it cannot be made in the one for temporary files.
FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")


class RunDir:
    """A new folder of mode 0700 that is removed by `close`."""

    def __init__(self) -> None:
        """Raises OSError whose message says what to do, when no folder can hold a socket."""
        reasons = []
        for parent in dict.fromkeys((_temporary_folder(), *FALLBACKS)):
            try:
                self._lock, self.path = _make(parent)
                break
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
        else:
            raise OSError(
                f"no folder can hold the engine's socket ({'; '.join(reasons)});"
                " set TMPDIR to a short path that may be written to"
            )
        _remove_leftovers(self.path.parent)

    def socket(self, rank: int) -> Path:
        """Where an engine listens: a path that fits a socket's address."""
        return self.path / SOCKET.format(rank)

    def write(self, name: str, text: str) -> Path:
        """A file that only its owner may read; once it is there, all of it is."""
        return write_private(self.path / name, text)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def write_private(path: Path, text: str) -> Path:
    """A file that only its owner may read; once it is there, all of it is."""
    partial = path.with_name(f"{path.name}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return partial.rename(path)


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # no folder can be written to; the current one is among those that were tried
        return FALLBACKS[0]


def _make(parent: str) -> tuple[int, Path]:
    """(descriptor that holds the lock, folder). Raises OSError where it cannot be made or cannot hold a socket."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=os.path.abspath(parent)))
        try:
            _try_socket(path / SOCKET.format(0))
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        if os.path.exists(path / LOCK):  # else another server took it for a leftover, before the lock was there
            return lock, path
        os.close(lock)


def _try_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))  # refused where the path is too long, or the file system holds no sockets
    path.unlink()


def _remove_leftovers(parent: Path) -> None:
    """Remove folders of this user's servers that do not live any more."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # someone else's, or gone meanwhile
            if path.lstat().st_uid != os.getuid() or not stat.S_ISDIR(path.lstat().st_mode):
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while its server lives
                shutil.rmtree(path, ignore_errors=True)
                log.info("removed %s, left by a server that was killed", path)
            finally:
                os.close(lock)
