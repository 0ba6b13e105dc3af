"""The configuration of a run: one flat frozen value, built once from a YAML file or a model name and flags.

Knows where values come from, and how keys constrain each other. The keys themselves are in `config_groups`, how their
values are read in `config_values`. What depends on the model is checked where the model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pagegraph.compiler.quantization import methods as quant_methods
from pagegraph.runtime.askers import KEY_SHARE, parse_keys, read_line
from pagegraph.runtime.config_groups import (
    DRAFT_STEP_TOKENS,
    MOST_THREADS,
    SPARE_THREADS,
    CacheConfig,
    CompilationConfig,
    ConfigError,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculativeConfig,
    is_path,
)

API_KEY_VARIABLE = "PAGEGRAPH_API_KEY"  # of the environment; comes after flags and before files
# Of the environment too, where there are several nodes: the names that launchers of PyTorch give them.
NODE_VARIABLES = {"node_rank": "NODE_RANK", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
# Keys of the mapping `speculative` of a file, and what they are called here.
SPECULATIVE = {
    "method": "speculative_method", "model": "speculative_model", "num_speculative_tokens": "num_speculative_tokens",
    "prompt_lookup_min": "prompt_lookup_min", "prompt_lookup_max": "prompt_lookup_max",
}  # fmt: skip


# The bases stand in reverse, because a dataclass takes the fields of the last one first.
@dataclass(frozen=True, kw_only=True)
class Config(ServerConfig, CompilationConfig, SpeculativeConfig, SchedulerConfig, CacheConfig, ModelConfig):
    """Every setting of a run, flat. What concerns one subject can ask for that class alone."""

    @property
    def draft(self) -> Config | None:
        """The configuration under which the draft model is loaded; None if there is none."""
        if self.method is None or "draft" not in self.method:
            return None
        # What is made while loading is made of it too; what a checkpoint says holds for that checkpoint.
        quantization = self.quantization if self.quantization in quant_methods.ONLINE else None
        return dataclasses.replace(
            self, model=self.speculative_model, gguf_file=None, revision=None, tokenizer=None,
            quantization=quantization, speculative_method=None, speculative_model=None,
        )  # fmt: skip

    @property
    def nodes_meet_at(self) -> tuple[str, int] | None:
        """Host and port; None where there is one node."""
        return None if self.nnodes == 1 or self.master_addr is None else (self.master_addr, self.master_port)

    @property
    def num_keys(self) -> int:
        """That are told apart; 0 where all clients share one, or need none."""
        lines = (self.api_key or "").count("\n") + 1
        return lines if lines > 1 else 0

    @property
    def enough_threads(self) -> int:
        """Threads with which one web process can fill all engines and their queues: any process may get any connection."""
        places = (self.max_num_seqs + self.max_queue) * self.data_parallel_size
        if self.num_keys:  # one leaves a share to others, and each may always have one waiting
            places += places // KEY_SHARE + self.num_keys
        return min(MOST_THREADS, places + SPARE_THREADS)

    @property
    def web_threads(self) -> int:
        """Threads of each web process."""
        return self.threads or self.enough_threads

    @property
    def max_decode_tokens(self) -> int:
        """Sequences and draft tokens of one step, as far as its token budget goes."""
        wanted = min(
            self.max_num_seqs * (1 + self.max_draft_tokens),
            DRAFT_STEP_TOKENS,
            self.max_num_batched_tokens or DRAFT_STEP_TOKENS,
        )
        return max(self.max_num_seqs, wanted)


# Heading of each group: its keys.
GROUPS = {
    heading: [one.name for one in dataclasses.fields(group)]
    for heading, group in (
        ("model", ModelConfig),
        ("memory", CacheConfig),
        ("scheduling", SchedulerConfig),
        ("speculation", SpeculativeConfig),
        ("compiler", CompilationConfig),
        ("server", ServerConfig),
    )
}
FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}


@dataclass(frozen=True)
class Resolved:
    """A checked configuration and, for each key, where its value came from ("default", "file:line", "--flag")."""

    config: Config
    sources: Mapping[str, str]


def flag_of(key: str) -> str:
    """The command-line spelling of a key."""
    return "--" + key.replace("_", "-")


def shown(key: str, value: object) -> str:
    """A value as a file or a flag may have it; keys are not shown."""
    if value is None:
        return FIELDS[key].metadata["unset"][-1]
    if key == "api_key":
        return "***"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    if values.get("nnodes", 1) > 1:
        for key, variable in NODE_VARIABLES.items():
            if variable in environment and key not in flags:
                given[key] = (environment[variable], variable)
                values[key] = _parse(key, *given[key])
    sources = {key: given[key][1] if key in given else "default" for key in FIELDS}
    if values.get("api_key_file") is not None:
        if values.get("api_key") is not None:
            raise ConfigError("api_key and api_key_file both give the key that clients must send; set one of them")
        values["api_key"] = _read_keys(values["api_key_file"], sources["api_key_file"])
        sources["api_key"] = f"api_key_file, {sources['api_key_file']}"
    config = Config(**values)
    check(config)
    return Resolved(config, sources)


def first_key(environment: Mapping[str, str]) -> str | None:
    """The key that a client sends: PAGEGRAPH_API_KEY holds one a line, if a server is to know several. None: none is given.

    Raises ConfigError for a line that no server takes.
    """
    lines = (line.strip() for line in environment.get(API_KEY_VARIABLE, "").split("\n"))
    first = next((line for line in lines if line), None)
    try:
        return None if first is None else read_line(first)[0]
    except ValueError as error:
        raise ConfigError(f"{API_KEY_VARIABLE}=*** {error}") from None


_API_KEYS = {"api_key", "api_key_file"}


def _read_keys(path: str, source: str) -> str:
    where = "" if source.startswith("--") else f"{source}: "
    try:
        return parse_keys(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{where}api_key_file={path} cannot be read: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"{where}api_key_file={path} {error}: a key a line is expected, and nothing else") from error


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
            f" a prompt of {length} tokens would never fit a step; set max_num_batched_tokens to {length},"
            " or enable_chunked_prefill to true"
        )
    if config.num_blocks is not None and config.kv_cache_memory is not None:
        raise ConfigError("num_blocks and kv_cache_memory both fix the size of the KV cache; set one of them")
    if config.num_blocks is not None and length is not None:
        _check_one_sequence_fits(config.num_blocks, config.block_size, length)
    for key in ("load_format", "quantization"):
        if getattr(config, key) == "gguf" and not config.is_gguf:
            raise ConfigError(f"{key}=gguf but model={config.model} is no .gguf file; name the file in gguf_file")
    if config.deterministic and not config.compile:
        raise ConfigError(
            "deterministic=true needs the compiled model, and compile=false; set compile to true, or deterministic to false:"
            " PyTorch's own loops compute the last elements of an array otherwise than the others"
        )
    if config.deterministic and config.tensor_parallel_size > 1:
        raise ConfigError(
            f"deterministic=true computes on one device, and tensor_parallel_size={config.tensor_parallel_size}: the order of sums over"
            " ranks depends on the tokens of a step; set tensor_parallel_size to 1, or deterministic to false"
        )
    if config.expert_parallel and config.tensor_parallel_size == 1:
        raise ConfigError(
            "expert_parallel=true spreads experts over ranks, and tensor_parallel_size=1; set that to 2 or more, or expert_parallel to"
            " false"
        )
    _check_nodes(config)
    if config.otlp_traces_endpoint is not None and not _has_opentelemetry():
        raise ConfigError(
            f"otlp_traces_endpoint={config.otlp_traces_endpoint} needs OpenTelemetry: pip install 'pagegraph[otel]', or"
            " leave it out"
        )
    _check_speculation(config)
    if config.probe_port and config.probe_port == config.port:
        raise ConfigError(
            f"probe_port={config.probe_port} is also port; probes need their own, such as {config.port % 65535 + 1}"
        )


def _check_nodes(config: Config) -> None:
    size, nodes = config.tensor_parallel_size, config.nnodes
    if nodes == 1 and config.node_rank == 0:
        return
    if size % nodes:
        raise ConfigError(
            f"tensor_parallel_size={size} ranks are to be on nnodes={nodes} machines, as many on each; set it to {nodes} or"
            f" {2 * nodes}, or nnodes to 1"
        )
    if config.node_rank >= nodes:
        raise ConfigError(
            f"node_rank={config.node_rank} is none of nnodes={nodes}: set nnodes to the number of machines, or node_rank to"
            f" {'0' if nodes == 1 else f'one of 0 to {nodes - 1}'}"
        )
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={config.data_parallel_size} has engines on one machine, and nnodes={nodes}; set it to 1, and serve"
            " several such servers behind one address"
        )
    if config.master_addr is None:
        raise ConfigError(
            f"master_addr is missing: nnodes={nodes} meet at an address of node 0 that the others reach, such as 10.0.0.1"
        )
    host, colon, port = config.master_addr.partition(":")
    if colon and ":" not in port:  # an address of IPv6 has more of them
        raise ConfigError(
            f"master_addr={config.master_addr} has a port; set master_addr to {host or '10.0.0.1'}, and master_port to"
            f" {port or config.master_port}"
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
            f"speculative_model={config.speculative_model} is of no use to speculative_method={method};"
            f" use {method}+draft"
        )
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise ConfigError(
            f"prompt_lookup_min={config.prompt_lookup_min} is above prompt_lookup_max={config.prompt_lookup_max};"
            f" set prompt_lookup_min to {config.prompt_lookup_max} or less"
        )


def _has_opentelemetry() -> bool:
    return all(find_spec(name) for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"))


def _check_one_sequence_fits(num_blocks: int, block_size: int, length: int) -> None:
    largest = (num_blocks - 1) * block_size
    if largest < length:
        needed = -(-length // block_size) + 1
        raise ConfigError(
            f"num_blocks={num_blocks} holds ({num_blocks} - 1 null block) x block_size {block_size} = {largest} tokens,"
            f" fewer than max_model_len={length}; set max_model_len to {largest} or less,"
            f" or num_blocks to {needed} or more"
        )


def _is_hub_name(model: str) -> bool:
    """Whether a hub could have a model of this name: the rule of `huggingface_hub.utils.validate_repo_id`, whose import is slow."""
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    return (
        re.fullmatch(rf"({part}/)?{part}", model) is not None
        and len(model) <= 96
        and not re.search(r"--|\.\.|\.git$", model)
    )


def require_one_engine(config: Config, command: str) -> None:
    """Raise ConfigError where a server is to have several engines, of which `command` is one."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"{command} runs one engine, and data_parallel_size={config.data_parallel_size}, which is for runtime serve; set it"
            " to 1"
        )


def require_one_process(config: Config, command: str) -> None:
    """Raise ConfigError where ranks are to share the model, or engines a server, which `command` does not start."""
    require_one_engine(config, command)
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"{command} runs one process, and tensor_parallel_size={config.tensor_parallel_size}; set it to 1"
        )


def require_local_files(config: Config) -> None:
    """Raise ConfigError if `model` or `tokenizer` names something on this machine that is not there."""
    path = Path(config.model).expanduser()
    if (is_path(config.model) or config.model.endswith(".gguf")) and not path.exists():
        hint = "; `make model` fetches it" if path.parent.name == "models" else ""
        raise ConfigError(f"model={config.model} does not exist{hint}")
    if not path.exists() and not _is_hub_name(config.model):
        raise ConfigError(
            f"model={config.model} is no folder or file on this machine, and no hub name such as org/name"
        )
    if config.draft is not None:
        require_local_files(config.draft)
    if config.tokenizer is not None and not Path(config.tokenizer, "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer={config.tokenizer} is not a folder with a tokenizer.json; leave it out to use the model's own"
        )
