"""The configuration of a run: one flat frozen value, built once from a YAML file or a model name and flags.

Knows the keys, their types, ranges and defaults, and how keys constrain each other. Knows no device, no
model contents and no torch: what depends on the device (`batched_tokens`, `cpu_kv_cache_memory`) is asked
with the device as an argument, and what depends on the model is checked where the model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pagegraph.compiler.quantization import methods as quant_methods

CPU_BATCHED_TOKENS = 2048
CUDA_BATCHED_TOKENS = 8192
CPU_KV_CACHE_MEMORY = 1 << 30  # bytes
METHODS = ("ngram", "suffix", "draft", "ngram+draft", "suffix+draft")  # of speculation
AUTO_DRAFT_TOKENS = 15  # a sequence at most, where their number is left to the engine
DRAFT_STEP_TOKENS = 64  # sequences and draft tokens that a step has room for at least, where there is speculation
API_KEY_VARIABLE = "PAGEGRAPH_API_KEY"  # of the environment; comes after flags and before files
MOST_THREADS = 4096  # of a web process
SPARE_THREADS = 32  # for what is short, is being tokenised, or is about to be refused
# Keys of the mapping `speculative` of a file, and what they are called here.
SPECULATIVE = {
    "method": "speculative_method", "model": "speculative_model", "num_speculative_tokens": "num_speculative_tokens",
    "prompt_lookup_min": "prompt_lookup_min", "prompt_lookup_max": "prompt_lookup_max",
}  # fmt: skip

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "K": 1 << 10, "M": 1 << 20}
_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the key and a value that works."""


Parser = Callable[[Any], Any]  # raises ValueError with the rest of the sentence "<key>=<value> ..."


def parse_whole(value: Any) -> int:
    """A whole number; as text also `8k` (8000) and `8K` (8192), likewise `m` and `M`."""
    if isinstance(value, bool):
        raise ValueError("is not a whole number")
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(-?[0-9][0-9_]*)([kKmM]?)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is not a whole number such as 4096, 8k (8000) or 8K (8192)")
    return int(match[1].replace("_", "")) * _POWERS[match[2]]


def parse_number(value: Any) -> float:
    """A finite number."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is not a number")
    return number


def parse_bytes(value: Any) -> int:
    """A size in bytes: a whole number, or text such as `512MiB`, `1.5GiB` or `2GB` (10^9)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError("is not a size such as 1GiB, 512MiB or 2GB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def parse_flag(value: Any) -> bool:
    """true or false; as text also yes/no, on/off, 1/0."""
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError("is neither true nor false")
    return text in _TRUE


def parse_compile(value: Any) -> bool | str:
    """true, false, or `required`."""
    if value == "required":
        return value
    try:
        return parse_flag(value)
    except ValueError:
        raise ValueError("is none of true, false and required") from None


def parse_text(value: Any) -> str:
    """Non-empty text without control characters."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; give a text, or leave it out")
    if not isinstance(value, str):
        raise ValueError("is not a text; quote it if it looks like a number")
    if not value.isprintable():
        raise ValueError("contains control characters")
    return value


def _one_of(*choices: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in choices:
            hint = difflib.get_close_matches(str(value), choices, n=1)
            raise ValueError(
                f"is not known; known: {', '.join(choices)}" + (f"; did you mean {hint[0]}?" if hint else "")
            )
        return value

    return parse


def _between(parse: Parser, low: float, high: float = math.inf, low_is_open: bool = False) -> Parser:
    def checked(value: Any) -> Any:
        number = parse(value)
        if number < low or number > high or (low_is_open and number == low):
            if high == math.inf:
                raise ValueError(f"is too small: it must be {'above' if low_is_open else 'at least'} {low}")
            raise ValueError(f"is outside {'(' if low_is_open else '['}{low}, {high}]")
        return number

    return checked


def _block_size(value: Any) -> int:
    size = parse_whole(value)
    if size < 8 or size & (size - 1):
        nearest = max(8, 1 << max(size, 1).bit_length() - 1)
        raise ValueError(f"is not a power of two of at least 8; {nearest} works")
    return size


def _option(default: Any, parse: Parser, help: str, group: str, unset: tuple[str, ...] = ()) -> Any:
    """One key. `unset`: words that, like null, mean None; allowed only where the default is None."""
    return field(default=default, metadata={"parse": parse, "help": help, "group": group, "unset": unset})


_NONE, _AUTO = ("none",), ("none", "auto")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. Sizes are in tokens, bytes or blocks as each help text says."""

    model: str = _option("", parse_text, "folder, .gguf file or Hugging Face name of the model", "model")
    gguf_file: str | None = _option(
        None, parse_text, "name of the .gguf file inside the model folder or repository", "model", _NONE
    )
    revision: str | None = _option(None, parse_text, "branch, tag or commit of a Hugging Face model", "model", _NONE)
    tokenizer: str | None = _option(None, parse_text, "folder of the tokenizer (none: the model's)", "model", _NONE)
    served_model_name: str | None = _option(
        None, parse_text, "name in the HTTP API (none: last part of model)", "model", _NONE
    )
    dtype: str = _option(
        "auto",
        _one_of("auto", "float32", "bfloat16", "float16"),
        "weights and activations: auto, float32, bfloat16, float16",
        "model",
    )
    device: str = _option("auto", _one_of("auto", "cpu", "cuda"), "auto (cuda if there is one), cpu or cuda", "model")
    load_format: str = _option(
        "auto",
        _one_of("auto", "safetensors", "gguf", "dummy"),
        "auto, safetensors, gguf, or dummy (random weights)",
        "model",
    )
    quantization: str | None = _option(
        None,
        _one_of(*quant_methods.METHODS),
        "awq, gptq, compressed-tensors or gguf (as the checkpoint is), fp8, int8 or int4 (made while loading); none: what the checkpoint says",
        "model",
        _NONE,
    )
    round_activations: bool = _option(
        True,
        parse_flag,
        "in steps of more than about 64 tokens round activations to 8 bits in front of quantised weights, where a GPU is faster so",
        "model",
    )
    trust_remote_code: bool = _option(False, parse_flag, "run Python code that comes with the model", "model")
    seed: int = _option(
        0, _between(parse_whole, 0, 2**63 - 1), "seed of requests that bring none: 0 to 2^63 - 1", "model"
    )
    generation_config: str = _option(
        "auto",
        _one_of("auto", "none"),
        "sampling of requests that do not say: auto (as the model's generation_config.json has it) or none",
        "model",
    )

    max_model_len: int | None = _option(
        None,
        _between(parse_whole, 1),
        "longest prompt plus output, in tokens; 8k = 8000, 8K = 8192 (auto: the model's limit)",
        "memory",
        _AUTO,
    )
    block_size: int = _option(16, _block_size, "tokens in a KV block: a power of two, at least 8", "memory")
    num_blocks: int | None = _option(
        None, _between(parse_whole, 2), "KV blocks, block 0 being scrap (auto: what the memory holds)", "memory", _AUTO
    )
    kv_cache_memory: int | None = _option(
        None,
        _between(parse_bytes, 1),
        "bytes of the KV cache, such as 1GiB (auto: measured on a GPU, 1GiB on a CPU)",
        "memory",
        _AUTO,
    )
    kv_cache_dtype: str = _option(
        "auto",
        _one_of("auto", "fp8"),
        "keys and values in the cache: auto (as activations) or fp8 (half the bytes)",
        "memory",
    )
    gpu_memory_utilization: float = _option(
        0.9, _between(parse_number, 0, 1, low_is_open=True), "share of the GPU's memory to use, in (0, 1]", "memory"
    )

    max_num_seqs: int = _option(256, _between(parse_whole, 1), "sequences in one step", "scheduling")
    max_num_batched_tokens: int | None = _option(
        None, _between(parse_whole, 1), "tokens in one step (auto: 8192 on a GPU, 2048 on a CPU)", "scheduling", _AUTO
    )
    enable_prefix_caching: bool = _option(True, parse_flag, "share KV blocks of equal prefixes", "scheduling")
    enable_chunked_prefill: bool = _option(True, parse_flag, "split long prompts over steps", "scheduling")
    inter_token_target_ms: float | None = _option(
        None,
        _between(parse_number, 0, low_is_open=True),
        "shrink prompt chunks to keep steps under this many ms",
        "scheduling",
        _NONE,
    )

    speculative_method: str | None = _option(
        None, _one_of(*METHODS), f"who proposes tokens ahead: {', '.join(METHODS)} (none: nobody)", "speculation", _NONE
    )
    speculative_model: str | None = _option(
        None, parse_text, "smaller model of the same vocabulary that drafts, for method draft", "speculation", _NONE
    )
    num_speculative_tokens: int | None = _option(
        None,
        _between(parse_whole, 1, 64),
        "draft tokens a sequence and step (auto: as many as pay, 0 too)",
        "speculation",
        ("auto",),
    )
    prompt_lookup_min: int = _option(
        2, _between(parse_whole, 1), "shortest run of tokens that methods ngram and suffix look up", "speculation"
    )
    prompt_lookup_max: int = _option(
        5, _between(parse_whole, 1), "longest run of tokens that method ngram looks up", "speculation"
    )

    compile: bool | str = _option(
        True,
        parse_compile,
        "compile the model (false: run it as plain PyTorch; required: a server whose compilation fails ends, instead of serving uncompiled)",
        "compiler",
    )
    merge_linears: bool = _option(
        True, parse_flag, "merge q/k/v and gate/up projections into one matmul each", "compiler"
    )
    skinny_linears: bool = _option(
        True, parse_flag, "GPU: own kernels for products of few rows, where measured faster", "compiler"
    )
    fuse_rope: bool = _option(True, parse_flag, "GPU: rotate queries and keys and store them in one kernel", "compiler")
    fuse_rows: bool = _option(
        True, parse_flag, "GPU: norms, residual additions and gated SiLU as kernels that overlap", "compiler"
    )
    fuse_linears: bool = _option(
        True,
        parse_flag,
        "GPU: norms, residual additions and gated SiLU inside the products beside them, for few rows",
        "compiler",
    )
    rotary_once: bool = _option(
        True, parse_flag, "compute rotary cosines and sines once a step, not in every layer", "compiler"
    )
    compile_cache_dir: str | None = _option(
        None, parse_text, "folder of compiled artefacts (none: ~/.cache/pagegraph)", "compiler", _NONE
    )
    num_threads: int | None = _option(
        None, _between(parse_whole, 1, 4096), "CPU threads of the engine (auto: PyTorch's choice)", "compiler", _AUTO
    )

    host: str = _option("127.0.0.1", parse_text, "address to listen on; 0.0.0.0 for every interface", "server")
    port: int = _option(8000, _between(parse_whole, 0, 65535), "port of the API (0: any free one)", "server")
    probe_host: str = _option(
        "127.0.0.1", parse_text, "address of probe_port; 0.0.0.0 lets other machines probe, without a key", "server"
    )
    probe_port: int | None = _option(
        None,
        _between(parse_whole, 0, 65535),
        "port of /health and /metrics beside the API (auto: a free one)",
        "server",
        _AUTO,
    )
    workers: int = _option(2, _between(parse_whole, 1, 64), "web processes", "server")
    threads: int | None = _option(
        None,
        _between(parse_whole, 2, MOST_THREADS),
        "threads of each web process; a request holds one (auto: max_num_seqs + max_queue and some)",
        "server",
        ("auto",),
    )
    max_queue: int = _option(
        256,
        _between(parse_whole, 1),
        "waiting requests, of all web processes together, beyond which new ones get 503",
        "server",
    )
    drain_timeout_s: float = _option(
        20.0,
        _between(parse_number, 0),
        "seconds that running requests get to end at shutdown; stopping takes up to 7 more",
        "server",
    )
    watchdog_timeout_s: float = _option(
        300.0,
        _between(parse_number, 1),
        "seconds with work and without a finished step after which the engine counts as hung and the server ends",
        "server",
    )
    api_key: str | None = _option(
        None,
        parse_text,
        "key that clients must send (none: open); on the command line others see it: rather use api_key_file or PAGEGRAPH_API_KEY",
        "server",
        _NONE,
    )
    api_key_file: str | None = _option(None, parse_text, "file that holds the key alone", "server", _NONE)
    log_level: str = _option(
        "info", _one_of("debug", "info", "warning", "error"), "debug, info, warning or error", "server"
    )

    @property
    def model_name(self) -> str:
        """Name in the HTTP API. A local path gives only its last part: paths stay out of answers."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model.endswith(".gguf") or is_local_path(self.model):
            return Path(self.model).name.removesuffix(".gguf")
        return self.model

    @property
    def method(self) -> str | None:
        """Who proposes; naming a model alone means it."""
        return self.speculative_method or ("draft" if self.speculative_model else None)

    @property
    def draft(self) -> Config | None:
        """The configuration under which the draft model is loaded; None if there is none."""
        if self.method is None or "draft" not in self.method:
            return None
        # What is made while loading is made of it too; what a checkpoint says holds for that checkpoint.
        quantization = self.quantization if self.quantization in quant_methods.ONLINE else None
        return dataclasses.replace(
            self, model=self.speculative_model, gguf_file=None, revision=None, tokenizer=None, quantization=quantization,
            speculative_method=None, speculative_model=None,
        )  # fmt: skip

    @property
    def max_draft_tokens(self) -> int:
        """A sequence and step; 0 without speculation."""
        return 0 if self.method is None else self.num_speculative_tokens or AUTO_DRAFT_TOKENS

    @property
    def enough_threads(self) -> int:
        """Threads with which one web process alone can fill the engine and its queue: any connection may come to any process."""
        return min(MOST_THREADS, self.max_num_seqs + self.max_queue + SPARE_THREADS)

    @property
    def looks_up_on_device(self) -> bool:
        """Whether a step itself makes the draft tokens for the next one."""
        return self.method == "ngram"

    @property
    def max_entries(self) -> int:
        """Sequences and draft tokens of one step, as far as its token budget goes."""
        wanted = min(
            self.max_num_seqs * (1 + self.max_draft_tokens),
            DRAFT_STEP_TOKENS,
            self.max_num_batched_tokens or DRAFT_STEP_TOKENS,
        )
        return max(self.max_num_seqs, wanted)

    def batched_tokens(self, device: str) -> int:
        """Token budget of one step on `device` ("cpu" or "cuda"); ConfigError if it is below `max_num_seqs`."""
        chosen = self.max_num_batched_tokens
        budget = chosen if chosen is not None else CPU_BATCHED_TOKENS if device == "cpu" else CUDA_BATCHED_TOKENS
        if self.max_num_seqs > budget:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds max_num_batched_tokens={budget}"
                f"{'' if chosen is not None else f' (the default on {device})'}: each running sequence takes at least one"
                f" token of a step; set max_num_seqs to {budget} or less, or max_num_batched_tokens to {self.max_num_seqs} or more"
            )
        return budget

    def cpu_kv_cache_memory(self) -> int:
        """Bytes of the KV cache on a CPU, where free memory is not ours to measure and take."""
        return self.kv_cache_memory if self.kv_cache_memory is not None else CPU_KV_CACHE_MEMORY


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}


@dataclass(frozen=True)
class Resolved:
    """A checked configuration and, for each key, where its value came from ("default", "file:line", "--flag")."""

    config: Config
    sources: Mapping[str, str]


def flag_of(key: str) -> str:
    """The command-line spelling of a key."""
    return "--" + key.replace("_", "-")


def is_local_path(model: str) -> bool:
    """Whether `model` can only be, or is, a path on this machine rather than a hub name."""
    return model.startswith(("/", "./", "../", "~")) or Path(model).exists()


def load_config(
    path_or_model: str, overrides: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Resolved:
    """Read a YAML file, or take `path_or_model` as the model, then apply `overrides` (key to value; None: not given).

    A path in a file that starts with `./` or `../` is relative to the file's folder. The API key may also come from the
    variable PAGEGRAPH_API_KEY of `environment`, and from the file that `api_key_file` names.
    Raises ConfigError naming the key, the arithmetic and a value that works.
    """
    given: dict[str, tuple[Any, str]] = {}
    if path_or_model.endswith((".yaml", ".yml")):
        given.update(_read_yaml(Path(path_or_model)))
    else:
        given["model"] = (path_or_model, "argument")
    flags = {key: (value, flag_of(key)) for key, value in (overrides or {}).items() if value is not None}
    # A key from a later place, in whatever form, takes the place of an earlier one.
    for later in (
        {"api_key": (environment[API_KEY_VARIABLE], API_KEY_VARIABLE)} if API_KEY_VARIABLE in environment else {},
        flags,
    ):
        if later.keys() & _API_KEYS:
            given = {key: found for key, found in given.items() if key not in _API_KEYS}
        given.update(later)
    values = {key: _parse(key, value, source) for key, (value, source) in given.items()}
    sources = {key: given[key][1] if key in given else "default" for key in FIELDS}
    if values.get("api_key_file") is not None:
        if values.get("api_key") is not None:
            raise ConfigError("api_key and api_key_file both give the key that clients must send; set one of them")
        values["api_key"] = _read_key(values["api_key_file"], sources["api_key_file"])
        sources["api_key"] = f"api_key_file, {sources['api_key_file']}"
    config = Config(**values)
    check(config)
    return Resolved(config, sources)


_API_KEYS = {"api_key", "api_key_file"}


def _read_key(path: str, source: str) -> str:
    where = "" if source.startswith("--") else f"{source}: "
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{where}api_key_file={path} cannot be read: {reason}") from error
    if not key or not key.isprintable():
        raise ConfigError(
            f"{where}api_key_file={path} does not hold a key: one line of text is expected, and nothing else"
        )
    return key


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict(config)`, checked like any other input."""
    config = Config(**{key: _parse(key, value, "stored configuration") for key, value in values.items()})
    check(config)
    return config


def _read_yaml(path: Path) -> dict[str, tuple[Any, str]]:
    """Top-level keys of a YAML file to (value, "file:line")."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} is not a list of `key: value` lines")
        read: dict[str, tuple[Any, str]] = {}
        for key_node, value_node in root.value:
            key, source = str(loader.construct_object(key_node)), f"{path}:{key_node.start_mark.line + 1}"
            if key in read:
                raise ConfigError(f"{source}: {key} is set twice; first in {read[key][1]}")
            value = loader.construct_object(value_node, deep=True)
            if key == "speculative":
                read.update(_speculative(path.parent, value, source))
            else:
                read[key] = (_anchored(path.parent, key, value), source)
        return read
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def _speculative(folder: Path, value: Any, source: str) -> dict[str, tuple[Any, str]]:
    """The mapping `speculative` of a file as keys of the configuration."""
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: speculative={value} is not a mapping; give it keys such as method: ngram")
    if unknown := sorted(set(map(str, value)) - set(SPECULATIVE)):
        raise ConfigError(f"{source}: unknown key speculative.{unknown[0]}; known: {', '.join(SPECULATIVE)}")
    return {(key := SPECULATIVE[name]): (_anchored(folder, key, one), source) for name, one in value.items()}


def _anchored(folder: Path, key: str, value: Any) -> Any:
    """A `./` or `../` path of a configuration file, made independent of where the command is run."""
    if (
        key in ("model", "tokenizer", "speculative_model", "api_key_file")
        and isinstance(value, str)
        and value.startswith(("./", "../"))
    ):
        return str((folder / value).resolve())
    return value


def _parse(key: str, value: Any, source: str) -> Any:
    where = "" if source.startswith("--") else f"{source}: "
    if key not in FIELDS:
        near = difflib.get_close_matches(key.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`runtime config --keys` lists the known keys"
        raise ConfigError(f"{where}unknown key {key}; {hint}")
    option = FIELDS[key]
    if option.default is None and (
        value is None or (isinstance(value, str) and value.lower() in option.metadata["unset"])
    ):
        return None
    try:
        return option.metadata["parse"](value)
    except ValueError as error:
        shown = "***" if key == "api_key" else value
        raise ConfigError(f"{where}{key}={shown} {error}") from error


def check(config: Config) -> None:
    """Refuse combinations that no device could serve; raises ConfigError."""
    if not config.model:
        raise ConfigError("model is missing: name a folder, a .gguf file or a Hugging Face model")
    # `auto` is held to the larger budget here; the engine asks again once it knows its device.
    budget = config.batched_tokens("cpu" if config.device == "cpu" else "cuda")
    length = config.max_model_len
    if not config.enable_chunked_prefill and length is not None and budget < length:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is below max_model_len={length} with enable_chunked_prefill=false:"
            f" a prompt of {length} tokens would never fit a step; set max_num_batched_tokens to {length}, or enable_chunked_prefill to true"
        )
    if config.num_blocks is not None and config.kv_cache_memory is not None:
        raise ConfigError("num_blocks and kv_cache_memory both fix the size of the KV cache; set one of them")
    if config.num_blocks is not None and length is not None:
        _check_one_sequence_fits(config.num_blocks, config.block_size, length)
    if config.load_format == "gguf" and config.gguf_file is None and not config.model.endswith(".gguf"):
        raise ConfigError(f"load_format=gguf but model={config.model} is no .gguf file; name the file in gguf_file")
    if config.quantization == "gguf" and config.gguf_file is None and not config.model.endswith(".gguf"):
        raise ConfigError(f"quantization=gguf but model={config.model} is no .gguf file; name the file in gguf_file")
    _check_speculation(config)
    if config.probe_port and config.probe_port == config.port:
        raise ConfigError(
            f"probe_port={config.probe_port} is also port; probes need their own, such as {config.port % 65535 + 1}"
        )


def _check_speculation(config: Config) -> None:
    method = config.method
    drafts = method is not None and "draft" in method
    if drafts and config.speculative_model is None:
        raise ConfigError(
            f"speculative_method={method} needs a draft model; name it in speculative_model, or use ngram"
        )
    if method is not None and not drafts and config.speculative_model is not None:
        raise ConfigError(
            f"speculative_model={config.speculative_model} is of no use to speculative_method={method}; use {method}+draft"
        )
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise ConfigError(
            f"prompt_lookup_min={config.prompt_lookup_min} is above prompt_lookup_max={config.prompt_lookup_max};"
            f" set prompt_lookup_min to {config.prompt_lookup_max} or less"
        )


def _check_one_sequence_fits(num_blocks: int, block_size: int, length: int) -> None:
    largest = (num_blocks - 1) * block_size
    if largest < length:
        needed = -(-length // block_size) + 1
        raise ConfigError(
            f"num_blocks={num_blocks} holds ({num_blocks} - 1 scrap) x block_size {block_size} = {largest} tokens, fewer than"
            f" max_model_len={length}; set max_model_len to {largest} or less, or num_blocks to {needed} or more"
        )


def require_local_files(config: Config) -> None:
    """Raise ConfigError if `model` or `tokenizer` names something on this machine that is not there."""
    path = Path(config.model).expanduser()
    is_path = config.model.startswith(("/", "./", "../", "~")) or config.model.endswith(".gguf")
    if is_path and not path.exists():
        hint = "; `make model` fetches it" if path.parent.name == "models" else ""
        raise ConfigError(f"model={config.model} does not exist{hint}")
    if config.draft is not None:
        require_local_files(config.draft)
    if config.tokenizer is not None and not Path(config.tokenizer, "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer={config.tokenizer} is not a folder with a tokenizer.json; leave it out to use the model's own"
        )
