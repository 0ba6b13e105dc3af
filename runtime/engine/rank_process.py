"""A rank other than the first, as a process of its own: builds its share of the model, then launches what rank 0 launches.

Started by `runtime.engine.ranks` with a socket, over which it gets the configuration, its rank and each step. Ends when the other end
closes, and with a non-zero status when it fails: then rank 0 ends too, since sums need every rank. Knows no requests.
"""

from __future__ import annotations

import pagegraph.compiler.host.openmp_spin  # isort: skip  # noqa: F401  before torch is loaded

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.step.step import Ticket
from pagegraph.runtime.config import config_from_dict
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.engine.links import receive, say
from pagegraph.runtime.engine.ranks import LOOK_S, meet, store_at
from pagegraph.runtime.server.start_errors import sentence

log = logging.getLogger("pagegraph.rank")


def main(descriptor: int) -> None:
    """Follow until rank 0 ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to rank 0, who decides
    leader = socket.socket(fileno=descriptor)
    leader.set_inheritable(False)  # its end is seen by rank 0
    first = receive(leader)
    if first is None:
        return
    settings, rank, place, all_graphs, address = first
    config = config_from_dict(settings)
    messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(leader, messages), daemon=True).start()
    say(leader, "here")
    size = config.tensor_parallel_size
    try:
        options = compiler_options(config, rank=rank)
        group = meet(store_at(place, size), rank, size, options.device, address)
        built = build_compiled(options, progress=False, all_graphs=all_graphs)
        group.timeout_s = config.watchdog_timeout_s
        follow(built, messages)
    except Exception as error:
        if (reason := sentence(error)) is None:
            log.critical("rank %d of %d failed", rank, size, exc_info=True)
        else:
            log.critical("rank %d of %d: %s", rank, size, reason)
        with suppress(OSError):
            say(leader, "failed", reason or f"{type(error).__name__}: {error}")
        os._exit(1)


def _read(leader: socket.socket, messages: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Until rank 0 closes its end: then this process ends, wherever it is."""
    while (message := receive(leader)) is not None:
        messages.put(message)
    os._exit(0)


def follow(built: BuiltModel, messages: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Launch steps and capture graphs as they come. Raises what a step raises.

    Nothing waits for a step: on a GPU the next one is launched behind it.
    """
    launched: deque[Ticket] = deque()  # steps that may not have ended
    masked: Ticket | None = None  # a step that waits for masks, which a failure of rank 0 may keep from coming
    while True:
        while launched and launched[0].is_done:
            launched.popleft().wait()
        try:
            message = messages.get(timeout=LOOK_S if launched else None)
        except queue.Empty:
            continue
        match message:
            case ("launch", which, step, num_steps):
                ticket = built.steps[which].launch(step, num_steps)
                masked = None
                if ticket.masks is None:
                    launched.append(ticket)
                else:
                    masked = ticket
            case ("sample", masks):
                assert masked is not None and masked.masks is not None
                masked.masks[...] = masks
                masked.sample()
                launched.append(masked)
                masked = None
            case ("capture", which, bucket):
                built.steps[which].capture(bucket)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    main(int(sys.argv[1]))
