"""Puts an engine together from a configuration: built model, block pool, scheduler, loop.

Shared by the offline API and the engine process; holds no loop of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.profile.latency import measure_latency
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.account_book import Book
from pagegraph.runtime.engine.engine import Engine, Mailbox
from pagegraph.runtime.engine.grammars import Grammars
from pagegraph.runtime.engine.limits import Limits
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.engine.stats import EngineStats
from pagegraph.runtime.grammar.compiler import GrammarCompiler
from pagegraph.runtime.grammar.step_masks import StepMasks
from pagegraph.runtime.grammar.vocabulary import load_vocabulary
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.pooling import pooler_of
from pagegraph.runtime.sampling_params import model_defaults
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.chunk_limit import LEAST_TOKENS, ChunkLimit
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.state_snapshots import StateSnapshots
from pagegraph.runtime.scheduler.step_time import StepTime
from pagegraph.runtime.spec_decode.device_drafter import DeviceDrafter
from pagegraph.runtime.spec_decode.draft_model import DraftModel
from pagegraph.runtime.spec_decode.drafter import Drafter
from pagegraph.runtime.spec_decode.grammar_drafter import GrammarDrafter
from pagegraph.runtime.spec_decode.host_drafter import HostDrafter
from pagegraph.runtime.spec_decode.model_drafter import ModelDrafter
from pagegraph.runtime.spec_decode.num_draft_tokens import StepCosts
from pagegraph.runtime.spec_decode.proposer import NgramProposer, NoProposer, Proposer
from pagegraph.runtime.spec_decode.suffix import SuffixProposer

log = logging.getLogger("pagegraph.engine")


def engine_of(
    config: Config,
    built: BuiltModel,
    mailbox: Mailbox,
    draining: Callable[[], bool] = lambda: False,
    max_queue: int | None = None,
    beat: Callable[[float | None], None] = lambda _: None,
    rank: int = 0,
    block_hash_key: bytes | None = None,
    book: Book | None = None,
) -> tuple[Engine, EngineMetrics]:
    """An engine over `built`, reading messages from `mailbox`, and what it counts.

    `draining` tells web processes whether the server is on its way down. `max_queue` overrides the configuration's limits of the queue.
    `beat`: as `Engine` has it. `rank`: among the engines of a server, and `block_hash_key` and `book`: that they share.
    """
    snapshots = _snapshots(config, built)
    enable_prefix_caching = config.enable_prefix_caching and (snapshots is not None or not built.slot_bytes)
    max_queue_tokens = config.max_queue_tokens if max_queue is None else None
    max_queue = config.max_queue if max_queue is None else max_queue
    metrics = EngineMetrics(config.model_name, built.max_model_len, rank=rank)
    metrics.compile_state = lambda: built.compile_state
    metrics.cache_config = {
        "block_size": str(config.block_size),
        "num_gpu_blocks": str(built.num_blocks),  # vLLM's name, on a CPU too
        "cache_dtype": config.kv_cache_dtype,
        "enable_prefix_caching": str(enable_prefix_caching),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
    }
    pool = BlockPool(built.num_blocks, config.block_size, enable_prefix_caching, block_hash_key)
    scheduler = Scheduler(
        pool,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.batched_tokens(built.device.type),
        max_model_len=built.max_model_len,
        enable_chunked_prefill=config.enable_chunked_prefill,
        chunk_limit=_chunk_limit(config, built.device.type),
        max_decode_tokens=config.max_decode_tokens,
        snapshots=snapshots,
    )
    sampling_defaults = model_defaults(built.generation_config) if config.generation_config == "auto" else {}
    pooler = pooler_of(built.folder, built.hidden_size, config.pooling)
    limits = Limits(
        built.vocab_size, built.max_model_len, built.eos_ids, max_queue, pooler, built.has_head, max_queue_tokens
    )

    def info() -> EngineInfo:
        return EngineInfo(
            model=config.model_name,
            device=str(built.device),
            dtype=str(built.dtype).removeprefix("torch."),
            vocab_size=built.vocab_size,
            max_model_len=built.max_model_len,
            num_blocks=built.num_blocks,
            block_size=config.block_size,
            compile_state=built.compile_state,
            draining=draining(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            sampling_defaults=sampling_defaults,
            pooler=pooler,
            stalled_s=engine.stalled_s,
        )

    grammars, drafter = _grammars(config, built, scheduler), _drafter(config, built, scheduler)
    stats = EngineStats(metrics, scheduler, built.step.counts, config.log_stats_interval_s)
    engine = Engine(
        built.step, scheduler, mailbox, limits, info, time.monotonic, stats, seed=config.seed + rank,
        use_idle_time=lambda: grammars.use_idle_time() or built.use_idle_time(),
        drafter=None if drafter is None else GrammarDrafter(scheduler, drafter, config.max_draft_tokens),
        grammars=grammars,
        book=book,
        # A compilation beside the steps holds them up for as long as it likes.
        beat=lambda expected_s: beat(None if built.compile_state == "compiling" else expected_s),
    )  # fmt: skip
    return engine, metrics


def _snapshots(config: Config, built: BuiltModel) -> StateSnapshots | None:
    """Of recurrent states, if there are any and slots to keep them in; the log says what that means for the prefix cache."""
    if not built.slot_bytes:
        return None
    first = built.step.state.dummy_slot + 1
    kept, size = built.num_slots - first, built.slot_bytes / (1 << 20)
    log.info("layers keep recurrent state: %d slots of %.2f MiB, and %d for kept states", first, size, kept)
    if kept:
        return StateSnapshots(kept, first, config.block_size)
    if config.enable_prefix_caching:
        log.warning("the prefix cache is off: state_cache_memory is less than one state of %.2f MiB", size)
    return None


def _chunk_limit(config: Config, device: str) -> ChunkLimit | None:
    target = config.inter_token_target_ms
    if target == "none":
        return None
    if isinstance(target, str):
        return ChunkLimit(StepTime(), least=max(LEAST_TOKENS[device], config.block_size))
    return ChunkLimit(StepTime(), target, least=config.block_size)


def _grammars(config: Config, built: BuiltModel, scheduler: Scheduler) -> Grammars:
    folder = Path(config.tokenizer) if config.tokenizer else built.folder
    compiler = GrammarCompiler(lambda: load_vocabulary(folder, built.vocab_size, built.eos_ids))
    return Grammars(compiler, StepMasks(scheduler.batch, compiler, built.eos_ids))


def _drafter(config: Config, built: BuiltModel, scheduler: Scheduler) -> Drafter | None:
    if config.method is None:
        return None
    state = built.step.state
    if state.max_draft_tokens < config.max_draft_tokens or (config.proposes_on_device and state.ngram is None):
        raise ValueError(
            f"the model was built without draft tokens by {config.method}: build it with that configuration"
        )
    costs = None
    if config.num_speculative_tokens is None:
        most = scheduler.max_decode_tokens
        costs = StepCosts(built.step.decode_sizes(most), measure_latency(built.step, most))
    if config.proposes_on_device:
        return DeviceDrafter(scheduler, config.max_draft_tokens, costs)
    proposer = _proposer(config.method, config)
    if built.draft is None:
        return HostDrafter(scheduler, proposer, config.max_draft_tokens, costs)
    model = DraftModel(
        built.draft, scheduler.batch, scheduler.max_num_batched_tokens, scheduler.max_decode_tokens,
        together=built.device.type == "cuda",
    )  # fmt: skip
    model_ms = 1.0 if costs is None else min(measure_latency(built.draft, 2).values())
    return ModelDrafter(scheduler, proposer, config.max_draft_tokens, costs, model, model_ms)


def _proposer(method: str, config: Config) -> Proposer:
    """Who searches text, by the first part of the method; with method draft, nobody."""
    match method.partition("+")[0]:
        case "suffix":
            return SuffixProposer(config.prompt_lookup_min)
        case "ngram":
            return NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
    return NoProposer()
