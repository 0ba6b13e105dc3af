"""The settings of a run by subject: keys, types, ranges, defaults and help, one class a subject.

A subject is a group of `--help`. `runtime.config.Config` is all of them in one flat value. Knows no device, no model's
contents and no torch: what depends on the device (`batched_tokens`, `cpu_kv_cache_memory`) is asked with the device as
an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagegraph.compiler.quantization import methods as quant_methods
from pagegraph.runtime.askers import parse_keys
from pagegraph.runtime.config_values import (
    Parser,
    between,
    one_of,
    parse_block_size,
    parse_bytes,
    parse_compile,
    parse_flag,
    parse_number,
    parse_origins,
    parse_target,
    parse_text,
    parse_url,
    parse_whole,
)
from pagegraph.runtime.text import formats

CPU_BATCHED_TOKENS = 2048
CUDA_BATCHED_TOKENS = 8192
CPU_KV_CACHE_MEMORY = 1 << 30  # bytes
STATE_CACHE_MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}  # bytes, by type of device
METHODS = ("ngram", "suffix", "draft", "ngram+draft", "suffix+draft")  # of speculation
AUTO_DRAFT_TOKENS = 15  # a sequence at most, where their number is left to the engine
DRAFT_STEP_TOKENS = 64  # sequences and draft tokens that a step has room for at least, where there is speculation
MOST_THREADS = 4096  # of a web process
SPARE_THREADS = 32  # for what is short, is being tokenised, or is about to be refused


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the key and a value that works."""


def _option(default: Any, parse: Parser, help: str, unset: tuple[str, ...] = ()) -> Any:
    """One key. `unset`: words that, like null, mean None; allowed only where the default is None."""
    return field(default=default, metadata={"parse": parse, "help": help, "unset": unset})


_NONE, _AUTO = ("none",), ("none", "auto")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, where it is, and in what numbers it is computed."""

    model: str = _option("", parse_text, "folder, .gguf file or Hugging Face name of the model")
    gguf_file: str | None = _option(
        None, parse_text, "name of the .gguf file inside the model folder or repository", _NONE
    )
    revision: str | None = _option(None, parse_text, "branch, tag or commit of a Hugging Face model", _NONE)
    tokenizer: str | None = _option(None, parse_text, "folder of the tokenizer (none: the model's)", _NONE)
    served_model_name: str | None = _option(None, parse_text, "name in the HTTP API (none: last part of model)", _NONE)
    dtype: str = _option(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16"),
        "weights and activations: auto, float32, bfloat16, float16",
    )
    device: str = _option("auto", one_of("auto", "cpu", "cuda"), "auto (cuda if there is one), cpu or cuda")
    load_format: str = _option(
        "auto", one_of("auto", "safetensors", "gguf", "dummy"), "auto, safetensors, gguf, or dummy (random weights)"
    )
    quantization: str | None = _option(
        None,
        one_of(*quant_methods.METHODS),
        "awq, gptq, compressed-tensors or gguf (as the checkpoint is), fp8, int8 or int4 (made while loading);"
        " none: what the checkpoint says",
        _NONE,
    )
    round_activations: bool = _option(
        True,
        parse_flag,
        "in steps of more than about 64 tokens round activations to 8 bits in front of quantised weights, of more than 8 in front of"
        " experts in fp8 with a scale a row or tensor, where a GPU is faster so",
    )
    tensor_parallel_size: int = _option(
        1,
        between(parse_whole, 1),
        "processes that share the model's weights and its KV cache, each of which holds a part of every layer; on GPUs one each",
    )
    nnodes: int = _option(
        1,
        between(parse_whole, 1, 1024),
        "machines that the ranks of tensor_parallel_size are on, as many on each; every one runs `runtime serve` with its node_rank",
    )
    node_rank: int = _option(
        0, between(parse_whole, 0), "which of nnodes this is; node 0 has the engine and the API (also: NODE_RANK)"
    )
    master_addr: str | None = _option(
        None, parse_text, "address of node 0 that the other nodes reach (none: MASTER_ADDR of the environment)", _NONE
    )
    master_port: int = _option(
        29500, between(parse_whole, 1, 65535), "port on master_addr at which nodes meet (also: MASTER_PORT)"
    )
    expert_parallel: bool = _option(
        False,
        parse_flag,
        "each rank of tensor_parallel_size holds whole experts of a mixture, and not a part of every expert",
    )
    data_parallel_size: int = _option(
        1,
        between(parse_whole, 1, 64),
        "engines of a server behind its one address, each with a copy of the model, a KV cache and a queue of its own; a"
        " request goes to the one that has most of its prefix cached, unless others have less to do",
    )
    trust_remote_code: bool = _option(False, parse_flag, "run Python code that comes with the model")
    seed: int = _option(0, between(parse_whole, 0, 2**63 - 1), "seed of requests that bring none: 0 to 2^63 - 1")
    generation_config: str = _option(
        "auto",
        one_of("auto", "none"),
        "sampling of requests that do not say: auto (as the model's generation_config.json has it) or none",
    )
    pooling: str = _option(
        "auto",
        one_of("auto", "last", "mean", "cls"),
        "hidden states that an embedding is made of: auto (as the model's 1_Pooling/config.json has it, else last),"
        " last, mean or cls (the first)",
    )

    @property
    def is_gguf(self) -> bool:
        """Whether a .gguf file is named."""
        return self.gguf_file is not None or self.model.endswith(".gguf")

    @property
    def model_name(self) -> str:
        """Name in the HTTP API. A local path gives only its last part: paths stay out of answers."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model.endswith(".gguf") or is_local_path(self.model):
            return Path(self.model).name.removesuffix(".gguf")
        return self.model


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How long a sequence may be, and the blocks of the KV cache."""

    max_model_len: int | None = _option(
        None,
        between(parse_whole, 1),
        "longest prompt plus output, in tokens; 8k = 8000, 8K = 8192 (auto: the model's limit)",
        _AUTO,
    )
    block_size: int = _option(16, parse_block_size, "tokens in a KV block: a power of two, at least 8")
    num_blocks: int | None = _option(
        None, between(parse_whole, 2), "KV blocks, block 0 being the null block (auto: what the memory holds)", _AUTO
    )
    kv_cache_memory: int | None = _option(
        None,
        between(parse_bytes, 1),
        "bytes of the KV cache, such as 1GiB (auto: measured on a GPU, 1GiB on a CPU)",
        _AUTO,
    )
    kv_cache_dtype: str = _option(
        "auto", one_of("auto", "fp8"), "keys and values in the cache: auto (as activations) or fp8 (half the bytes)"
    )
    state_cache_memory: int | None = _option(
        None,
        between(parse_bytes, 0),
        "bytes of kept recurrent states, without which models with such layers find no prefix in the cache (auto: 4GiB on"
        " a GPU, 256MiB on a CPU; 0: none)",
        _AUTO,
    )
    gpu_memory_utilization: float = _option(
        0.9, between(parse_number, 0, 1, low_is_open=True), "share of the GPU's memory to use, in (0, 1]"
    )

    def state_memory(self, device: str) -> int:
        """Bytes of kept recurrent states on a device of that type."""
        return STATE_CACHE_MEMORY[device] if self.state_cache_memory is None else self.state_cache_memory

    def cpu_kv_cache_memory(self) -> int:
        """Bytes of the KV cache on a CPU, where free memory is not ours to measure and take."""
        return self.kv_cache_memory if self.kv_cache_memory is not None else CPU_KV_CACHE_MEMORY


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one step holds."""

    max_num_seqs: int = _option(256, between(parse_whole, 1), "sequences in one step")
    max_num_batched_tokens: int | None = _option(
        None, between(parse_whole, 1), "tokens in one step (auto: 8192 on a GPU, 2048 on a CPU)", _AUTO
    )
    enable_prefix_caching: bool = _option(True, parse_flag, "share KV blocks of equal prefixes")
    enable_chunked_prefill: bool = _option(True, parse_flag, "split long prompts over steps")
    inter_token_target_ms: float | str = _option(
        "auto",
        parse_target,
        "shrink prompt chunks to keep steps with decodes under this many ms; auto: on a server a small multiple of what"
        " the decodes alone take, more while many prompts wait; none: off",
    )

    def batched_tokens(self, device: str) -> int:
        """Token budget of one step on `device` ("cpu" or "cuda"); ConfigError if it is below `max_num_seqs`."""
        chosen = self.max_num_batched_tokens
        budget = chosen if chosen is not None else CPU_BATCHED_TOKENS if device == "cpu" else CUDA_BATCHED_TOKENS
        if self.max_num_seqs > budget:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds max_num_batched_tokens={budget}"
                f"{'' if chosen is not None else f' (the default on {device})'}: each running sequence takes at least"
                f" one token of a step; set max_num_seqs to {budget} or less,"
                f" or max_num_batched_tokens to {self.max_num_seqs} or more"
            )
        return budget


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Who drafts tokens, and how many."""

    speculative_method: str | None = _option(
        None, one_of(*METHODS), f"who proposes tokens ahead: {', '.join(METHODS)} (none: nobody)", _NONE
    )
    speculative_model: str | None = _option(
        None, parse_text, "smaller model of the same vocabulary that drafts, for method draft", _NONE
    )
    num_speculative_tokens: int | None = _option(
        None, between(parse_whole, 1, 64), "draft tokens a sequence and step (auto: as many as pay, 0 too)", ("auto",)
    )
    prompt_lookup_min: int = _option(
        2, between(parse_whole, 1), "shortest run of tokens that methods ngram and suffix look up"
    )
    prompt_lookup_max: int = _option(5, between(parse_whole, 1), "longest run of tokens that method ngram looks up")

    @property
    def method(self) -> str | None:
        """Who proposes; naming a model alone means it."""
        return self.speculative_method or ("draft" if self.speculative_model else None)

    @property
    def max_draft_tokens(self) -> int:
        """A sequence and step; 0 without speculation."""
        return 0 if self.method is None else self.num_speculative_tokens or AUTO_DRAFT_TOKENS

    @property
    def proposes_on_device(self) -> bool:
        """Whether a step itself makes the draft tokens for the next one."""
        return self.method == "ngram"


@dataclass(frozen=True, kw_only=True)
class CompilationConfig:
    """What the compiler does with the model."""

    compile: bool | str = _option(
        True,
        parse_compile,
        "compile the model (false: run it as plain PyTorch; required: a server whose compilation fails ends,"
        " instead of serving uncompiled)",
    )
    merge_linears: bool = _option(True, parse_flag, "merge q/k/v and gate/up projections into one matmul each")
    skinny_linears: bool = _option(True, parse_flag, "GPU: own kernels for products of few rows, where measured faster")
    fuse_rope: bool = _option(True, parse_flag, "GPU: rotate queries and keys and store them in one kernel")
    fuse_rows: bool = _option(
        True,
        parse_flag,
        "GPU: norms, residual additions and gated SiLU as our own Triton kernels, launched with programmatic dependent"
        " launch",
    )
    fuse_linears: bool = _option(
        True, parse_flag, "GPU: norms, residual additions and gated SiLU inside the products beside them, for few rows"
    )
    fuse_routers: bool = _option(
        True,
        parse_flag,
        "GPU: the choice of a mixture's experts and their weights in one kernel, where softmax makes them",
    )
    fuse_states: bool = _option(
        True,
        parse_flag,
        "GPU: layers with recurrent state read what their convolutions, delta rules and scans take where it lies, without copies",
    )
    deterministic: bool = _option(
        False,
        parse_flag,
        "the same tokens and log-probabilities, bit by bit, whatever else is computed with a request: other requests, chunks of"
        " prompts, prefix cache, preemption, draft tokens; slower",
    )
    rotary_once: bool = _option(True, parse_flag, "compute rotary cosines and sines once a step, not in every layer")
    compile_cache_dir: str | None = _option(
        None,
        parse_text,
        "folder of what starts compile and measure for later ones; may be emptied (none: ~/.cache/pagegraph)",
        _NONE,
    )
    num_threads: int | None = _option(
        None, between(parse_whole, 1, 4096), "CPU threads of the engine (auto: PyTorch's choice)", _AUTO
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Addresses, processes, limits and the key of the HTTP server."""

    host: str = _option("127.0.0.1", parse_text, "address to listen on; 0.0.0.0 for every interface")
    port: int = _option(8000, between(parse_whole, 0, 65535), "port of the API (0: any free one)")
    probe_host: str = _option(
        "127.0.0.1", parse_text, "address of probe_port; 0.0.0.0 lets other machines probe, without a key"
    )
    probe_port: int | None = _option(
        None, between(parse_whole, 0, 65535), "port of /health and /metrics beside the API (auto: a free one)", _AUTO
    )
    workers: int = _option(2, between(parse_whole, 1, 64), "web processes")
    threads: int | None = _option(
        None,
        between(parse_whole, 2, MOST_THREADS),
        "threads of each web process; a request holds one (auto: max_num_seqs + max_queue and some)",
        ("auto",),
    )
    max_queue: int = _option(
        256, between(parse_whole, 1), "waiting requests, of all web processes together, beyond which new ones get 503"
    )
    max_queue_tokens: int | None = _option(
        None,
        between(parse_whole, 1),
        "prompt tokens of waiting requests beyond which new ones get 503: what the engine computes in the longest time that"
        " a request shall wait (none: no limit)",
        _NONE,
    )
    tool_call_parser: str = _option(
        "auto",
        one_of("auto", "none", *formats.CALLS),
        f"how the model writes tool calls: auto (as its chat template says), none, {', '.join(formats.CALLS)}",
    )
    reasoning_parser: str = _option(
        "auto",
        one_of("auto", "none", *formats.REASONING),
        f"how the model writes reasoning: auto, none, {', '.join(formats.REASONING)}",
    )
    response_store_size: int = _option(
        64 << 20,
        between(parse_bytes, 0),
        "bytes of responses that /v1/responses keeps for a day, in a private file that ends with the server (0: none)",
    )
    drain_timeout_s: float = _option(
        20.0,
        between(parse_number, 0),
        "seconds that running requests get to end at shutdown; stopping takes up to 7 more",
    )
    watchdog_timeout_s: float = _option(
        300.0,
        between(parse_number, 1, 1_000_000),
        "seconds with work and without a finished step after which the engine counts as hung and is started anew; a step"
        " like recent ones has 30 times what it should take, at least 30 s or a tenth of this, and at most this",
    )
    max_engine_restarts: int = _option(
        3,
        between(parse_whole, 0),
        "times within restart_window_s that an engine which died or hung is started anew; at one more the server"
        " ends (0: at the first)",
    )
    restart_window_s: float = _option(
        600.0, between(parse_number, 1), "seconds within which max_engine_restarts counts"
    )
    api_key: str | None = _option(
        None,
        parse_keys,
        "key that clients must send, or a list of keys, whose users share neither prefix cache nor stored responses (none:"
        " open); limits of its own may follow a key: `sk-1234 requests_per_minute=60`; on the command line others see it:"
        " rather use api_key_file or PAGEGRAPH_API_KEY",
        _NONE,
    )
    api_key_file: str | None = _option(
        None, parse_text, "file that holds the keys, one a line, with their limits", _NONE
    )
    requests_per_minute: int | None = _option(
        None,
        between(parse_whole, 1),
        "requests that a key may make, beyond which it gets 429; of all clients together where there is one key or none."
        " A minute's may come at once; the room comes back evenly. A line of a key may have its own (none: no limit)",
        _NONE,
    )
    tokens_per_minute: int | None = _option(
        None,
        between(parse_whole, 1),
        "tokens that a key may have computed, of prompts and answers, as requests_per_minute (none: no limit)",
        _NONE,
    )
    max_parallel_requests: int | None = _option(
        None,
        between(parse_whole, 1),
        "requests that a key may have running and waiting, each of several sequences counted, beyond which it gets 429"
        " (none: no limit)",
        _NONE,
    )
    prefix_cache_per_key: bool = _option(
        True,
        parse_flag,
        "users of different keys share no prefix cache, so that nobody learns what others ask; false: for keys that trust"
        " each other",
    )
    allowed_origins: str | None = _option(
        None,
        parse_origins,
        "origins of web pages whose scripts browsers may let ask, a list or with spaces between; * is any (none: no other"
        " page's)",
        _NONE,
    )
    otlp_traces_endpoint: str | None = _option(
        None,
        parse_url,
        "where spans of requests are sent (OpenTelemetry, OTLP over HTTP), such as http://localhost:4318/v1/traces; needs the"
        " extra pagegraph[otel] (none: no spans)",
        _NONE,
    )
    log_level: str = _option("info", one_of("debug", "info", "warning", "error"), "debug, info, warning or error")
    log_format: str = _option("text", one_of("text", "json"), "of the server's logs: text, or json, an object a line")
    log_stats_interval_s: float = _option(
        10.0,
        between(parse_number, 0),
        "seconds between two lines of the engine's log that say what it does; none while it is idle (0: never)",
    )
    log_requests: bool = _option(
        False,
        parse_flag,
        "a line of the log for each answer: method, path, status, duration, request id; no text of it",
    )


def is_path(model: str) -> bool:
    """Whether `model` can only be a path, there or not."""
    return model.startswith(("/", "./", "../", "~"))


def is_local_path(model: str) -> bool:
    """Whether `model` can only be, or is, a path on this machine rather than a hub name."""
    return is_path(model) or Path(model).exists()
