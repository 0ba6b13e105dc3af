"""Processes that a process of ours starts: how they find our packages, how they end, and where what they write goes.

Knows nothing of what a child does. Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

log = logging.getLogger("pagegraph.child")

STOP_S = 5.0  # what children get between SIGTERM and SIGKILL
REAP_S = 2.0  # for a killed process to be gone; one that a driver holds takes longer, and is left

# Runs in the child before the command takes its place: the kernel is to end it when the supervisor is killed.
# A program of its own and not `preexec_fn`, which may deadlock where the parent has threads.
BOUND_TO_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` as a child of ours; start it with `child_environment`.

    `-P`: Python does not look for modules in the folder where the user happens to be, which may hold others of our
    names.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command that runs `command` until it ends or, on Linux, this process is killed."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-c", BOUND_TO_PARENT, str(os.getpid()), *command]


def child_environment() -> dict[str, str]:
    """The variables of a child of ours: it, and what it starts in turn, finds modules where this process does."""
    searched = [os.path.abspath(entry) for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(searched), "PYTHONSAFEPATH": "1"}


class Child:
    """A child process in its own session whose output is passed on.

    Its own session, so that a terminal's Ctrl-C reaches only the supervisor, which drains first.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        pass_fds: Sequence[int] = (),
        folder: Path | None = None,
        variables: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        """Start `command`, in `folder` (None: in this process's); the descriptors `pass_fds` stay open in it.

        `variables` are set in its environment, or left out of it where they are None.
        """
        self.name = name
        self._process = subprocess.Popen(
            bound_to_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
            cwd=folder,
            env={key: value for key, value in {**child_environment(), **variables}.items() if value is not None},
        )
        self._reader = threading.Thread(target=self._pass_on, name=f"{name}-output", daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def how_it_ended(self) -> str:
        """Of one that has: its status, and where to look."""
        code = self.exit_code
        assert code is not None
        self.finish_output()
        how = f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"the {self.name} process ended with {how}; what it wrote stands above"

    def finish_output(self) -> None:
        """Return once all that it wrote is passed on, or a second later: what it started may still hold the pipe."""
        self._reader.join(timeout=1.0)

    def send(self, number: int) -> None:
        """Send a signal; one that has ended gets none."""
        if self.exit_code is None:
            self._process.send_signal(number)

    def ends_by(self, deadline: float) -> bool:
        """Wait until it has ended, or `deadline` of the monotonic clock; returns whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        return self.exit_code is not None

    def kill(self) -> None:
        """SIGKILL to whatever is left of its session; returns when the process has ended."""
        self.abort()
        if not self.ends_by(time.monotonic() + REAP_S):
            log.error("%s was killed and is still there", self.name)

    def abort(self) -> None:
        """SIGKILL without waiting: may be called from a signal handler."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing of it is left

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while chunk := os.read(descriptor, 65536):
            # A reader of ours, or a terminal, that went away must not fill the pipe and so stop the child.
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()


def stop(*children: Child | None, timeout: float = STOP_S) -> None:
    """SIGTERM to all at once, and after `timeout` seconds SIGKILL to whatever is left of their sessions."""
    started = [child for child in children if child is not None]
    for child in started:
        child.send(signal.SIGTERM)
    deadline = time.monotonic() + timeout
    for child in started:
        if not child.ends_by(deadline):
            log.warning("%s did not stop within %g s and is killed", child.name, timeout)
    for child in started:
        child.kill()
