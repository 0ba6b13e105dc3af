"""Is the engine right on this device: captured graphs against eager, tokens against transformers; and the host's share.

`graphs` needs no weights, `parity` and `quality` a real model, `host` no device at all. Knows the engine by its public parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pagegraph.compiler.build import BuiltModel, build_compiled, build_model
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.cpu_runner import CpuRunner
from pagegraph.compiler.step.forward import run_forward
from pagegraph.compiler.step.graphs import GraphSet
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.runtime.config import load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.gpu.offline import Offline, Run, built_of, config_of, random_prompts, step_of
from perf.gpu.report import Report
from perf.host import decoding, loop_seconds

TIE = 1e-3  # two logits nearer than this may change places
LOGITS = 1e-4  # error of float32 logits relative to the largest
HOST_SEQS = 256
WAYS = {"logprobs": dict(logprobs=2), "plain": {}, "sampled": dict(temperature=0.8, seed=7)}


def graphs(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Greedy float32 tokens are the same compiled or not, with graphs or not; each bucket's logits equal eager ones."""
    settings = dict(
        max_num_seqs=32, max_num_batched_tokens=3000, num_blocks=1024, max_model_len=4096, kv_cache_memory=None
    )
    sizes = [int(n) for n in np.random.default_rng(0).integers(1, 300, 24)]
    prompts, lengths = random_prompts(0, sizes, 1000), [32] * len(sizes)
    first: dict[str, Run] = {}
    for compiled in (False, True):
        config = config_of(args, "tiny", compile=compiled, **settings)
        built = build_compiled(compiler_options(config), progress=False)
        name = "compiled" if compiled else "eager"
        report.fact(built=name, phases_s=built.timings.seconds)
        if built.device.type == "cuda":
            _check_buckets(report, config.block_size, built, name)
        for with_graphs in (False, True) if built.device.type == "cuda" else (False,):
            with _graphs_if(built, with_graphs):
                # With log-probabilities tokens are drawn outside the graph, without them inside.
                runs = {kind: Offline(config, built).run(prompts, lengths, **params) for kind, params in WAYS.items()}
            first = first or runs
            for kind, run in runs.items():
                expected = first["sampled" if kind == "sampled" else "logprobs"]
                differing, ties = _differences(report, f"{name}, graphs {with_graphs}, {kind}", run, expected)
                report.row(
                    forward=name, graphs=with_graphs, kind=kind, steps=len(run.steps), hits=run.graph_hits,
                    differing=differing, ties=ties,
                )  # fmt: skip
                if with_graphs and run.graph_hits != len(run.steps):
                    report.failure(
                        f"{name}: {len(run.steps) - run.graph_hits} of {len(run.steps)} steps ran outside a graph"
                    )
        built.step.close()


@contextmanager
def _graphs_if(built: BuiltModel, wanted: bool) -> Iterator[None]:
    """Without its graphs a step runs the forward itself."""
    runner = built.step.runner
    if wanted or isinstance(runner, CpuRunner):
        yield
        return
    kept, runner.graphs = runner.graphs, GraphSet()
    try:
        yield
    finally:
        runner.graphs = kept


def _differences(report: Report, name: str, run: Run, expected: Run) -> tuple[int, int]:
    """(requests whose tokens differ, those of them that part at a tie)."""
    differing = ties = 0
    for index, (mine, theirs) in enumerate(zip(run.outputs, expected.outputs)):
        if mine == theirs:
            continue
        differing += 1
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b)
        if not expected.logprobs[index]:  # noise decides, and no gap is known: one in so many may be a tie
            ties += not ties
            if differing > 1:
                report.failure(f"{name}: request {index} differs at token {at}")
            continue
        top = expected.logprobs[index][at].top_logprobs
        ties += top[0] - top[1] < TIE
        if top[0] - top[1] >= TIE:
            report.failure(f"{name}: request {index} differs at token {at}, top-2 logits {top[0] - top[1]:.1e} apart")
    return differing, ties


def _check_buckets(report: Report, block_size: int, built: BuiltModel, name: str) -> None:
    """Replays against the plain modules on random steps; unused blocks hold NaN."""
    rng = np.random.default_rng(1)
    checked, worst = 0, 0.0
    for bucket in built.step.runner.capture_sizes.buckets():
        for rows in _rows_of(rng, bucket):
            lengths = rows + rng.integers(0, 100, len(rows))
            one = step_of(
                rng, rows, lengths, vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=block_size
            )
            error = _bucket_error(built, one, bucket)
            checked, worst = checked + 1, max(worst, error)
            if not error < LOGITS:  # NaN is an error too
                report.failure(
                    f"{name}: {bucket}, {one.num_tokens} tokens of {one.num_seqs} sequences: error {error:.1e}"
                )
    report.row(forward=name, buckets=len(built.step.runner.capture_sizes.buckets()), steps=checked, worst=worst)


def _rows_of(rng: np.random.Generator, bucket: Bucket) -> Iterator[np.ndarray]:
    """Rows of each sequence of steps that fit the bucket: full, and with padding; decodes, and ragged ones."""
    if bucket.tokens == bucket.seqs:
        yield np.ones(bucket.seqs, np.int64)
        yield np.ones(int(rng.integers(1, bucket.seqs + 1)), np.int64)
    for tokens in (
        (bucket.tokens, int(rng.integers(bucket.tokens // 2 + 1, bucket.tokens + 1))) if bucket.tokens > 1 else ()
    ):
        seqs = int(rng.integers(1, min(bucket.seqs, tokens) + 1))
        cuts = np.sort(rng.choice(np.arange(1, tokens), seqs - 1, replace=False))
        yield np.diff(np.concatenate([[0], cuts, [tokens]]))


@torch.inference_mode()
def _bucket_error(built: BuiltModel, one: StepInput, bucket: Bucket) -> float:
    """Largest error of replayed logits, of drawn tokens' logits and of written blocks, relative to the largest value."""
    step, state = built.step, built.step.state
    caches = [*state.caches.key_caches, *state.caches.value_caches]
    num_blocks = torch.from_numpy(one.new_blocks[:, 2]).long().cuda()
    for cache in caches:
        cache.fill_(torch.nan)
        cache[num_blocks] = torch.randn(len(num_blocks), *cache.shape[1:], device=cache.device, dtype=cache.dtype)
    before = [cache[num_blocks] for cache in caches]
    # Some decodes take their token from the device, as those of a running engine do.
    state.last_tokens.random_(0, built.vocab_size)
    single = np.flatnonzero(np.diff(one.query_start) == 1)[::2]
    one.token_ids[one.query_start[single]] = -1
    stand = torch.from_numpy(one.slots[single]).cuda(), torch.from_numpy(one.starts[single]).cuda()
    state.last_at[stand[0]] = stand[1]
    staged = step.staging.unpack(step.staging.send(one, bucket))
    expected = run_forward(step.paged_model, staged, state)[0][: one.num_seqs].clone()
    written = [cache[num_blocks] for cache in caches]
    for cache, old in zip(caches, before):
        cache[num_blocks] = old
    state.last_at[stand[0]] = stand[1]
    step.staging.send(one, bucket)
    outputs = step.runner.graphs.replay(bucket)
    if outputs is None:
        return float("nan")
    logits, ids = (output[: one.num_seqs] for output in (outputs.logits, outputs.ids))
    best = expected.amax(dim=-1)
    pairs = [(logits, expected), (expected.gather(1, ids[:, None])[:, 0], best)]
    pairs += zip((cache[num_blocks] for cache in caches), written)
    errors = [((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs]
    return float("nan") if any(np.isnan(errors)) else max(errors)


def parity(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Greedy float32 tokens of a real model equal those of transformers' generate; ties are printed."""
    from transformers import AutoModelForCausalLM

    from pagegraph.runtime.ipc.protocol import SamplingParams
    from pagegraph.runtime.llm import LLM
    from tests.prompts import PROMPTS

    num_tokens = 48
    settings = dict(
        dtype="float32", device=args.device, max_model_len=1024, max_num_seqs=16, num_blocks=512,
        compile=not args.no_compile,
    )  # fmt: skip
    llm = LLM(load_config(args.weights, settings).config, progress=False)
    report.fact(phases_s=llm.built.timings.seconds)
    prompts = [llm.tokenizer.encode(text) for text in PROMPTS[: max(1, round(len(PROMPTS) * args.scale))]]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    outputs = [done.token_ids for done in llm.generate(prompts, params)]
    report.fact(ours_s=time.perf_counter() - start)
    model = AutoModelForCausalLM.from_pretrained(llm.built.folder, dtype=torch.float32, attn_implementation="sdpa")
    model = model.eval().to(args.device)
    model.generation_config.eos_token_id = None  # EOS is a token like others, not a forbidden one
    equal = 0
    start = time.perf_counter()
    for index, (ids, mine) in enumerate(zip(prompts, outputs)):
        given = torch.tensor([ids], device=args.device)
        with torch.inference_mode():
            out = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=num_tokens, do_sample=False
            )
        theirs = out[0, len(ids) :].tolist()
        equal += mine == theirs
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
            with torch.inference_mode():
                top = model(torch.tensor([ids + theirs[:at]], device=args.device)).logits[0, -1].float().topk(2).values
            gap = (top[0] - top[1]).item()
            report.row(prompt=index, differs_at=at, top2_gap=gap, tie=gap < TIE)
            if gap >= TIE:
                report.failure(f"prompt {index} differs from transformers at token {at}, top-2 logits {gap:.1e} apart")
    report.fact(prompts=len(prompts), equal=equal, tokens_each=num_tokens, theirs_s=time.perf_counter() - start)
    llm.close()


def quality(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """What each way to quantise a real model costs, by this device's products, against the same model in bfloat16.

    Prompts are long enough for products of many rows; `rounds`: whether those may round states to 8 bits.
    """
    from pagegraph.runtime.text.tokenizer import Tokenizer
    from perf.quality import compare
    from tests.prompts import PROMPTS

    def built(**settings: object) -> BuiltModel:
        fixed = dict(dtype="bfloat16", device=args.device, max_model_len=1024, kv_cache_memory="64MiB", max_num_seqs=4)
        return build_model(compiler_options(load_config(args.weights, fixed | settings).config), progress=False)

    original = built()
    ids = Tokenizer.load(original.folder).encode(" ".join(PROMPTS))
    prompts = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
    report.fact(tokens=[len(one) for one in prompts])
    ways = [
        dict(quantization=method, round_activations=rounds)
        for method in ("fp8", "int8", "int4", "gguf")
        for rounds in (True, False)
    ]
    for way in [*ways, dict(kv_cache_dtype="fp8")]:
        found = compare(original, built(**way), prompts)
        report.row(
            method=way.get("quantization", "blocks"), rounds=way.get("round_activations", ""), top1=found.top1_agreement, kl=found.kl,
            error=found.logprob_error, perplexity=found.perplexity, original=found.original_perplexity,
        )  # fmt: skip


def memory(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Arrivals that fragment a full pool, with all that sampling can ask for: no request fails, memory stays in its share."""
    config, built = built_of(shared)
    rng = np.random.default_rng(0)
    count = 48 if args.tiny else 200
    longest = built.max_model_len - 300
    sizes = np.minimum(rng.exponential(longest / 4, count).astype(int) + 1, longest)
    prompts = random_prompts(0, sizes.tolist(), built.vocab_size)
    lengths = rng.integers(1, 300, count).tolist()
    # Fewer blocks than the prompts of a full batch want: sequences wait, and are preempted.
    num_blocks = max(
        -(-built.max_model_len // config.block_size) + 1,
        int(sizes.sum() / count * config.max_num_seqs / config.block_size / 4),
    )
    small = dataclasses.replace(built, num_blocks=min(built.num_blocks, num_blocks))
    for kind, params in {
        **WAYS,
        "all": dict(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.1, logprobs=5),
    }.items():
        if report.out_of_time(kind):
            return
        offline = Offline(dataclasses.replace(config, enable_prefix_caching=True), small)
        offline.run(prompts, lengths, **params)
        offline.engine.scheduler.check_integrity()
        facts = dict(
            kind=kind,
            requests=count,
            num_blocks=small.num_blocks,
            preemptions=offline.engine.scheduler.counters.preemptions,
        )
        if built.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            facts.update(used=1 - free / total, allowed=config.gpu_memory_utilization)
            if facts["used"] > config.gpu_memory_utilization:
                report.failure(
                    f"{kind}: {facts['used']:.3f} of the device in use, {config.gpu_memory_utilization} allowed"
                )
        report.row(**facts)


def host(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Microseconds of the host's work in one step of decoding sequences, by part, the device left out.

    `loops` is the same in rounds of a fixed Python loop: machines differ less in it.
    """
    run, loop = decoding(HOST_SEQS), loop_seconds()
    report.fact(sequences=HOST_SEQS, decode_steps=run.decode_turns, transfers=run.transfers, loop_us=loop * 1e6)
    for name, seconds in run.seconds.items():
        report.row(part=name, us=seconds * 1e6, us_a_seq=seconds * 1e6 / HOST_SEQS, loops=seconds / loop)
