"""The engine as a process of its own, started by the supervisor with a file of settings.

Loads the model. On a CPU it answers on its socket at once with the uncompiled step, and swaps the compiled one in when
it is ready; on CUDA it compiles and captures the first CUDA graphs before it answers. Writes engine.json beside the
settings once loaded; ends with a non-zero status on any error that is not one request's own, but for a failed
compilation, which it serves without; and leaves the reason beside the settings where it is the user's to mend.
"""

from __future__ import annotations

import pagegraph.runtime.server.driver  # isort: skip  # noqa: F401  starts CUDA beside the imports below

import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from prometheus_client import start_http_server

from pagegraph.compiler.build import BuiltModel, Timings, build_model
from pagegraph.compiler.step.step import RanksLost
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.account_book import SharedBook
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.engine.engine import Engine
from pagegraph.runtime.engine.ranks import Followers
from pagegraph.runtime.ipc.mailbox import Mailbox
from pagegraph.runtime.sampling_params import describe_defaults
from pagegraph.runtime.server import compile_process, logs
from pagegraph.runtime.server.engine_settings import (
    FACTS_FILE,
    REQUIRED_COMPILATION_FAILED,
    STACKS_FILE,
    EngineSettings,
)
from pagegraph.runtime.server.pulse import Pulse
from pagegraph.runtime.server.start_errors import REASON_FILE, load_tokenizer, sentence
from pagegraph.runtime.server.start_report import process_age

log = logging.getLogger("pagegraph.engine")


def main(path: str) -> None:
    """Serve until SIGTERM; `path` is a file of EngineSettings."""
    timings = Timings({"imports": process_age()})
    faulthandler.enable()
    # The supervisor sends it to an engine that hangs, and reads all threads' stacks: no lines of their own in the log.
    stacks = Path(path).with_name(STACKS_FILE).open("w")  # noqa: SIM115  open as long as the process
    faulthandler.register(signal.SIGUSR1, stacks)
    settings = EngineSettings.load(Path(path))
    config = settings.config
    logs.configure(config.log_level, config.log_format, settings.name)
    followers: Followers | None = None
    try:
        with timings.stage("tokenizer"):
            load_tokenizer(config)  # what the web processes will do: a fault of it is found before the model loads
        options = compiler_options(config)
        if config.tensor_parallel_size > 1:
            with timings.stage("ranks"):
                followers = Followers(config, options.device, partial(_end, Path(path)), all_graphs=False)
        built = build_model(options, progress=sys.stderr.isatty(), timings=timings)
        # Compiled, numbers are rounded elsewhere than uncompiled: an answer must not depend on when it was asked for.
        # Ranks compile at the same time, and steps beside that would sum with another's.
        beside = config.compile and built.device.type == "cpu" and not config.deterministic and followers is None
        if beside:
            built.compile_state = "compiling"  # before any client asks
        elif config.compile:
            with compile_process.lock(settings.compile_lock):
                _compile(config, built)
        built.capture_graphs(progress=sys.stderr.isatty(), all_graphs=False)
        if followers is not None:
            followers.follow(built, config.watchdog_timeout_s)
        with timings.stage("engine"):
            pulse = Pulse(settings.pulse, config.watchdog_timeout_s)
            mailbox = Mailbox(settings.engine_address)
            key = bytes.fromhex(settings.block_hash_key) or None
            book = None if settings.accounts is None else SharedBook(settings.accounts, settings.rank)
            engine, metrics = engine_of(
                config, built, mailbox, settings.drain_flag.exists, beat=pulse.beat, rank=settings.rank,
                block_hash_key=key, book=book,
            )  # fmt: skip
            _tell_of_compilers(config, built, pulse.beat)
    except Exception as error:
        if isinstance(error, RanksLost):  # the other ranks did not come: it says which, and why
            _end(Path(path), str(error))
        if isinstance(error, RuntimeError) and followers is not None:
            log.error("the start failed", exc_info=error)
            _end(Path(path), str(followers.lost(error)))
        if (reason := sentence(error)) is None:
            raise
        log.debug("the start failed", exc_info=True)
        Path(path).with_name(REASON_FILE).write_text(reason)
        sys.exit(1)
    _stop_on_signal(engine)
    served, _ = start_http_server(0, "127.0.0.1", registry=metrics)
    _announce(Path(path).with_name(FACTS_FILE), built, served.server_port)
    log.info("loaded: %s", built.timings)
    if config.data_parallel_size > 1:
        log.info(
            "engine %d of %d on %s: %d CPU threads of %d CPUs%s", settings.rank, config.data_parallel_size, built.device,
            torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            " for each of its ranks" if config.tensor_parallel_size > 1 else "",
        )  # fmt: skip
    log.info("%s", describe_defaults(engine.info().sampling_defaults))
    if beside:
        fill_cache = partial(compile_process.fill_cache, built, Path(path), settings.compile_lock)
        threading.Thread(target=_compile_beside, args=(config, built, fill_cache), name="compile", daemon=True).start()
    _freeze()
    try:
        engine.run()
    except RanksLost as error:
        _end(Path(path), str(error))
    built.close()


def _end(settings: Path, why: str) -> None:
    """End this process, whatever its threads wait for; the supervisor starts another."""
    log.critical("%s", why)
    settings.with_name(REASON_FILE).write_text(why)
    os._exit(1)


def _compile(config: Config, built: BuiltModel, first: Callable[[], None] = lambda: None) -> None:
    """Do `first`, then swap the compiled step in. If that fails, the engine serves uncompiled, or ends if it must not."""
    try:
        with built.timings.stage("compile"):
            built.compile(sys.stderr.isatty() and built.device.type == "cuda", first)
    except BaseException:
        if config.compile == "required" or config.deterministic or config.tensor_parallel_size > 1:
            needed = (
                "deterministic=true" if config.deterministic else f"tensor_parallel_size={config.tensor_parallel_size}"
            )
            needed = "compile=required" if config.compile == "required" else needed
            log.critical("compilation failed, and %s: the engine ends", needed, exc_info=True)
            os._exit(REQUIRED_COMPILATION_FAILED)
        log.critical(
            "compilation failed: the engine serves on, uncompiled and slower; compile=false starts so without trying, "
            "compile=required ends the server instead",
            exc_info=True,
        )
    else:
        log.info("compiled after %.1f s: steps run the compiled graph from here on", built.timings.seconds["compile"])


def _compile_beside(config: Config, built: BuiltModel, first: Callable[[], None]) -> None:
    _compile(config, built, first)
    _freeze()


def _freeze() -> None:
    """What is built stays; with it, looking for garbage would hold up a step for half a second now and then."""
    gc.collect()  # garbage that is frozen is never freed
    gc.freeze()


def _tell_of_compilers(config: Config, built: BuiltModel, beat: Callable[[float | None], None]) -> None:
    """What a step is the first to need is compiled then, however long that takes: no step hangs."""
    if config.compile:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(lambda _: beat(None))
    if built.device.type == "cuda":
        from triton import knobs

        def compiles(**_: object) -> bool:
            beat(None)
            return False  # go on

        knobs.runtime.jit_cache_hook = compiles


def _announce(path: Path, built: BuiltModel, metrics_port: int) -> None:
    facts = {
        "model_dir": str(built.folder), "pid": os.getpid(), "metrics_port": metrics_port, **asdict(built.timings)
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    partial.rename(path)


def _stop_on_signal(engine: Engine) -> None:
    def stop(*_: object) -> None:
        engine.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the supervisor, who decides
    threading.current_thread().name = "engine"


if __name__ == "__main__":
    main(sys.argv[1])
