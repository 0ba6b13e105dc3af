"""What the engine process is told at start: one JSON file, written by the supervisor into the server's folder.

The process that compiles for the engine reads it as well. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pagegraph.runtime.config import Config, config_from_dict

REQUIRED_COMPILATION_FAILED = 3  # exit status of an engine that must not serve on; another would end so too
FACTS_FILE = "engine.json"  # beside the settings: what the engine tells once its model is loaded, see engine_process

STACKS_FILE = "engine-stacks.txt"  # beside the settings: where its threads stood when it got SIGUSR1

_PATHS = ("drain_flag", "pulse", "accounts", "compile_lock")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of one engine process."""

    config: Config
    engine_address: str  # ipc:// address to listen on
    drain_flag: Path  # once this file exists, the engine says `draining` in its EngineInfo
    pulse: Path  # where its loop says by when it will have moved on; see `runtime.server.pulse`
    rank: int = 0  # among the server's engines
    block_hash_key: str = ""  # of the hashes of all of them, as hexadecimal digits; empty: one of its own
    accounts: Path | None = None  # where several engines keep the accounts of keys; None: it has its own
    compile_lock: Path | None = None  # held by the engine that compiles, so that others find what it has compiled

    @property
    def name(self) -> str:
        """Of the process, in logs."""
        return engine_name(self.rank, self.config.data_parallel_size)

    def to_json(self) -> str:
        """Without the API key, for which the engine has no use."""
        config = dataclasses.asdict(dataclasses.replace(self.config, api_key=None))
        paths = {key: None if (path := getattr(self, key)) is None else str(path) for key in _PATHS}
        return json.dumps({**vars(self), "config": config, **paths}, indent=1)

    @classmethod
    def load(cls, path: Path) -> EngineSettings:
        """The inverse of `to_json`, from a file. Raises ConfigError for what no configuration may hold."""
        values = json.loads(path.read_text())
        values["config"] = config_from_dict(values["config"])
        values |= {key: None if values[key] is None else Path(values[key]) for key in _PATHS}
        return cls(**values)


def engine_name(rank: int, engines: int) -> str:
    """`engine`; `engine 1` where there are several."""
    return "engine" if engines == 1 else f"engine {rank}"
