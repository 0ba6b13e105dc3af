"""What `--help=KEY` says: a key, its default, and how its value enters into what the server does, with the figures at hand.

Keys that mean what their one line of help says have no arithmetic here. What depends on a model's sizes `runtime explain`
computes; here it is a formula and an example. Imports no torch.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable

from pagegraph.runtime.askers import KEY_SHARE
from pagegraph.runtime.config import FIELDS, GROUPS, Config, Resolved, flag_of, shown
from pagegraph.runtime.config_groups import (
    CPU_BATCHED_TOKENS,
    CPU_KV_CACHE_MEMORY,
    CUDA_BATCHED_TOKENS,
    DRAFT_STEP_TOKENS,
    MOST_THREADS,
    SPARE_THREADS,
    STATE_CACHE_MEMORY,
)
from pagegraph.runtime.server import pulse

WIDTH = 100
# Of an example: Llama-3-8B has 32 layers of 8 KV heads of 128 numbers.
_LAYERS, _KV_HEADS, _HEAD_SIZE, _BYTES = 32, 8, 128, 2
_TOKEN_BYTES = 2 * _LAYERS * _KV_HEADS * _HEAD_SIZE * _BYTES


def explain(name: str, resolved: Resolved | None = None) -> str:
    """The text for a key, in any spelling, or for a group of keys. `resolved`: whose figures are used; None: the defaults'.

    Raises ValueError with what there is, where the name is neither.
    """
    key = name.strip("-").replace("-", "_")
    if key in FIELDS:
        return _of_key(key, resolved)
    if key in GROUPS:
        return "\n\n".join(_of_key(one, resolved) for one in GROUPS[key])
    meant = [one for one in FIELDS if key and key in one]
    meant = meant or difflib.get_close_matches(key, [*FIELDS, *GROUPS], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(meant[:3])}? " if meant else ""
    raise ValueError(f"no key {name}; {hint}`--help` lists all; a group of them works too: {', '.join(GROUPS)}")


def _of_key(key: str, resolved: Resolved | None) -> str:
    option = FIELDS[key]
    lines = [f"{key}  ({flag_of(key)}; in YAML {key}: VALUE)", *_wrapped(option.metadata["help"])]
    lines.append(f"  default  {shown(key, option.default) or 'none: it has to be given'}")
    if resolved is not None:
        lines.append(f"  here     {shown(key, getattr(resolved.config, key))}  ({resolved.sources[key]})")
    if key in ARITHMETIC:
        config = Config(model="org/name") if resolved is None else resolved.config
        lines += ["", *(line for part in ARITHMETIC[key](config) for line in _wrapped(part))]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _batched(config: Config) -> str:
    chosen = config.max_num_batched_tokens
    return f"{chosen:,}" if chosen else f"{CPU_BATCHED_TOKENS:,} on a CPU, {CUDA_BATCHED_TOKENS:,} on a GPU"


def _max_model_len(config: Config) -> list[str]:
    length = config.max_model_len or 8192
    blocks = -(-length // config.block_size)
    return [
        f"A sequence of {length:,} tokens takes ceil({length:,} / block_size {config.block_size}) = {blocks:,} KV blocks,"
        f" so num_blocks has to be {blocks + 1:,} at least, block 0 being the null block.",
        "A request is refused where prompt + max_tokens is more; the chat APIs' default of max_tokens is what is left.",
    ]


def _block_size(config: Config) -> list[str]:
    size = config.block_size
    return [
        f"A sequence wastes {size - 1} tokens of memory at most, in its last block.",
        f"The prefix cache shares whole blocks: of a prompt of P tokens at most floor((P - 1) / {size}) x {size} are cached.",
    ]


def _num_blocks(config: Config) -> list[str]:
    size = config.block_size
    return [
        "bytes of a block = 2 (keys and values) x layers x KV heads x head size x bytes of a number x block_size."
        f" Llama-3-8B in bfloat16: 2 x {_LAYERS} x {_KV_HEADS} x {_HEAD_SIZE} x {_BYTES} x {size} ="
        f" {_TOKEN_BYTES * size / 2**20:g} MiB.",
        f"num_blocks = memory of the KV cache / bytes of a block; (num_blocks - 1) x {size} tokens fit.",
        "`runtime explain CONFIG` has the figures of a model.",
    ]


def _kv_cache_memory(config: Config) -> list[str]:
    memory = config.cpu_kv_cache_memory()
    tokens = memory // _TOKEN_BYTES
    return [
        f"auto is {CPU_KV_CACHE_MEMORY / 2**30:g} GiB on a CPU. On a GPU it is total memory x gpu_memory_utilization"
        f" {config.gpu_memory_utilization:g} - weights - the most that a step of max_num_batched_tokens ({_batched(config)}) takes"
        " - CUDA graphs, all measured at the start.",
        f"{memory / 2**30:g} GiB hold {tokens:,} tokens of Llama-3-8B in bfloat16 ({_TOKEN_BYTES // 1024} KiB each), which is"
        f" {tokens / 1024:.1f} sequences of 1,024.",
    ]


def _state_cache_memory(config: Config) -> list[str]:
    return [
        "A state is of fixed size, whatever the prompt: with 36 layers of 32 heads of 128 x 128 float32 numbers it is 72 MiB, so"
        f" {STATE_CACHE_MEMORY['cuda'] / 2**30:g} GiB keep {STATE_CACHE_MEMORY['cuda'] // (72 << 20)}.",
        "One is kept for each prompt of 64 tokens or more, the least recently used gives way. Running sequences have theirs"
        f" beside: max_num_seqs {config.max_num_seqs} and one for padding.",
    ]


def _gpu_memory_utilization(config: Config) -> list[str]:
    share = config.gpu_memory_utilization
    return [
        f"Of 80 GiB it leaves {80 * (1 - share):.1f} GiB to others. KV cache = {share:g} x total - weights - the peak of a step -"
        " CUDA graphs. kv_cache_memory and num_blocks fix the cache instead.",
    ]


def _kv_cache_dtype(config: Config) -> list[str]:
    return [
        "fp8 has 1 byte a number for 2 of bfloat16 and 4 of float32: twice or four times the tokens in the same memory."
    ]


def _max_num_seqs(config: Config) -> list[str]:
    return [
        f"Each takes a token of a step at least, so it may not exceed max_num_batched_tokens ({_batched(config)}).",
        "More sequences share the reading of the weights: tokens a second rise, and each stream slows down. How many find"
        " memory is (num_blocks - 1) x block_size / tokens of a sequence; `runtime explain CONFIG` says it.",
        f"Behind them max_queue {config.max_queue} may wait.",
    ]


def _max_num_batched_tokens(config: Config) -> list[str]:
    budget = config.max_num_batched_tokens or CPU_BATCHED_TOKENS
    return [
        f"A prompt of P tokens takes ceil(P / {budget:,}) steps where nothing else runs: 32,000 take {-(-32_000 // budget)}.",
        "Decodes come first, a token each; prompts share what is left, and less beside decodes: inter_token_target_ms.",
        "It bounds the memory of activations, which the KV cache lacks.",
    ]


def _num_speculative_tokens(config: Config) -> list[str]:
    return [
        f"A step verifies up to max(max_num_seqs, min(max_num_seqs x (1 + draft tokens), {DRAFT_STEP_TOKENS},"
        f" max_num_batched_tokens)) = {config.max_decode_tokens:,} tokens of sequences and drafts here.",
        "With a share a of draft tokens accepted, k of them give (1 - a^(k+1)) / (1 - a) tokens a step: a = 0.7, k = 4 give"
        f" {(1 - 0.7**5) / 0.3:.2f}. auto takes the k with the most tokens a millisecond, by measured steps, 0 too.",
    ]


def _threads(config: Config) -> list[str]:
    shares = (config.max_num_seqs + config.max_queue) // KEY_SHARE
    keys = (
        f" + 1/{KEY_SHARE} of both that one API key leaves to others {shares} + keys {config.num_keys}"
        if config.num_keys
        else ""
    )
    return [
        "A request holds one until its answer is sent, and any web process may get any connection, so each has enough for all:"
        f" auto = max_num_seqs {config.max_num_seqs} + max_queue {config.max_queue}{keys} + {SPARE_THREADS} ="
        f" {config.enough_threads:,}, at most {MOST_THREADS:,}. They are started as they are needed.",
    ]


def _max_queue(config: Config) -> list[str]:
    seqs = config.max_num_seqs
    return [
        f"The last of {config.max_queue} waits for about {config.max_queue} / {seqs} (max_num_seqs) ="
        f" {config.max_queue / seqs:.2g} times as long as a sequence runs. For a longest wait of t seconds with r requests"
        " answered a second: t x r.",
        "Of several API keys one has 8/9 of it at most: docs/keys.md.",
    ]


def _max_queue_tokens(config: Config) -> list[str]:
    return [
        "For a longest wait of t seconds: t x prompt tokens that the device computes a second. 5 s at 40,000 tokens/s: 200,000."
        " `runtime bench serve` measures the rate.",
    ]


def _requests_per_minute(config: Config) -> list[str]:
    limit = config.requests_per_minute or 60
    return [
        f"With {limit:,}: {limit:,} at once, then one every 60 / {limit:,} = {60 / limit:.3g} s; in the first minute"
        f" 2 x {limit:,} at most.",
    ]


def _tokens_per_minute(config: Config) -> list[str]:
    limit = config.tokens_per_minute or 60_000
    return [
        f"With {limit:,}: {limit / 60:,.0f} tokens a second come back. A prompt of 1,000 and an answer of 500 tokens cost 1,500,"
        f" so {limit / 1500:.3g} such requests a minute go on.",
    ]


def _watchdog_timeout_s(config: Config) -> list[str]:
    limit = config.watchdog_timeout_s
    least = min(limit, max(pulse.LEAST_S, pulse.LEAST_SHARE * limit))
    return [
        f"A step like recent ones may take min({limit:g}, max({pulse.LEAST_S:g}, {pulse.LEAST_SHARE:g} x {limit:g},"
        f" {pulse.STRETCH:g} x its expected time)) = {least:g} s at least; all others {limit:g} s.",
        f"/health is 503 after min({pulse.UNREADY_S:g} s, {pulse.LATE_SHARE:g} of that):"
        f" {min(pulse.UNREADY_S, pulse.LATE_SHARE * least):g} s at least.",
    ]


def _restarts(config: Config) -> list[str]:
    most, window = config.max_engine_restarts, config.restart_window_s
    return [
        f"{most} times within {window:g} s: an engine that ends every {window / max(most, 1):g} s or more seldom is started anew for"
        " ever, one that ends more often ends the server.",
    ]


def _drain_timeout_s(config: Config) -> list[str]:
    limit = config.drain_timeout_s
    return [
        f"Whoever stops the server (systemd, Kubernetes) should give it {limit:g} + 7 = {limit + 7:g} s before it kills it."
    ]


ARITHMETIC: dict[str, Callable[[Config], list[str]]] = {
    "max_model_len": _max_model_len,
    "block_size": _block_size,
    "num_blocks": _num_blocks,
    "kv_cache_memory": _kv_cache_memory,
    "state_cache_memory": _state_cache_memory,
    "kv_cache_dtype": _kv_cache_dtype,
    "gpu_memory_utilization": _gpu_memory_utilization,
    "max_num_seqs": _max_num_seqs,
    "max_num_batched_tokens": _max_num_batched_tokens,
    "num_speculative_tokens": _num_speculative_tokens,
    "threads": _threads,
    "max_queue": _max_queue,
    "max_queue_tokens": _max_queue_tokens,
    "requests_per_minute": _requests_per_minute,
    "tokens_per_minute": _tokens_per_minute,
    "watchdog_timeout_s": _watchdog_timeout_s,
    "max_engine_restarts": _restarts,
    "restart_window_s": _restarts,
    "drain_timeout_s": _drain_timeout_s,
}  # paragraphs, by key
