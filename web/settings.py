"""What a web process is told at start: one JSON file, written by the supervisor.

Knows no Flask. An unknown key is an error, so that the two sides cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagegraph.runtime.askers import LIMITS
from pagegraph.runtime.config import API_KEY_VARIABLE
from pagegraph.runtime.ipc.protocol import SILENCE_S


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Settings of one web process. Times are seconds, sizes bytes."""

    engine_addresses: list[str]  # ipc:// addresses of the engines, by rank
    model: str  # folder that holds the tokenizer
    served_model_name: str
    threads: int  # of this worker, as gunicorn is told; a request holds one until its answer is sent
    enough_threads: int  # with so many, the engine's queue is full before they are
    api_key: str | None = None  # keys, one a line, as `runtime.askers` reads them; None: none is asked
    # Of each key whose line has none of its own; None: no limit.
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_parallel_requests: int | None = None
    prefix_cache_per_key: bool = True
    allowed_origins: str | None = None  # of web pages that browsers may let ask, with spaces between; `*`: any
    probe_address: str | None = None  # host:port that serves the engine's /metrics; None: not served
    otlp_traces_endpoint: str | None = None  # where spans are sent; None: there are none
    log_requests: bool = False  # a line for each answer
    tool_call_parser: str = "auto"  # a row of runtime.text.formats, or none
    reasoning_parser: str = "auto"
    response_store: str | None = None  # file of the responses that /v1/responses keeps; None: each process has its own
    response_store_bytes: int = 64 << 20  # 0: none is kept
    max_body_bytes: int = 8 << 20
    header_timeout_s: float = 10.0  # from a request's first byte, or from the connection, to the end of its headers
    body_timeout_s: float = 30.0  # between two reads of a body
    send_timeout_s: float = 30.0  # that a client may take nothing of its answer
    keep_alive_s: float = 5.0  # between SSE comments while no token comes
    block_hash_key: str | None = (
        None  # of the engines' block hashes, as hexadecimal digits; None: they cache no prefixes
    )
    comebacks: list[str] = field(
        default_factory=list
    )  # files of `runtime.server.comeback`, by rank; []: none comes back
    pulses: list[str] = field(default_factory=list)  # files of the engines' `runtime.server.pulse`, by rank
    silence_s: float = SILENCE_S  # without an answer of the engine, or without progress, it counts as dead

    @property
    def limits(self) -> dict[str, int | None]:
        """Of each key, by name."""
        return {name: getattr(self, name) for name in LIMITS}

    def comeback(self, rank: int) -> Path | None:
        """Of one engine."""
        return Path(self.comebacks[rank]) if self.comebacks else None

    def pulse(self, rank: int) -> Path | None:
        """Of one engine."""
        return Path(self.pulses[rank]) if self.pulses else None

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | WebSettings) -> WebSettings:
        """Settings from a JSON file or a mapping; raises ValueError naming an unknown or missing key.

        The API keys of a file's settings may come from the environment instead, so that no file need hold them.
        """
        if isinstance(source, WebSettings):
            return source
        values = source if isinstance(source, dict) else json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(source, dict) and API_KEY_VARIABLE in os.environ:
            values.setdefault("api_key", os.environ[API_KEY_VARIABLE])
        fields = {one.name: one for one in dataclasses.fields(cls)}
        if unknown := values.keys() - fields.keys():
            raise ValueError(f"unknown web setting {sorted(unknown)[0]!r}; known: {', '.join(fields)}")
        needed = {name for name, one in fields.items() if one.default is one.default_factory is dataclasses.MISSING}
        if missing := needed - values.keys():
            raise ValueError(f"web setting {sorted(missing)[0]!r} is missing")
        return cls(**values)
