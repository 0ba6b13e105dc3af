"""What a web worker is told at start: the JSON file that the supervisor writes for its children.

Knows no Flask. The file is shared with the engine, so keys that are not the web's are passed over.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Settings of one web worker. Times are seconds, sizes bytes."""

    engine_address: str  # ipc:// address of the engine
    model_dir: str  # folder that holds the tokenizer
    served_model_name: str
    api_key: str | None = None  # None: no key is asked
    metrics_url: str | None = None  # where the engine's metrics are read; None: not served
    drain_flag: str | None = None  # a file that exists while the server drains
    max_queue: int = 256  # waiting sequences beyond which a request gets 503
    threads: int = 80  # gunicorn's threads a worker
    max_body_bytes: int = 8 << 20
    keep_alive_s: float = 5.0  # between SSE comments while no token comes
    silence_s: float = 10.0  # without an answer of the engine, it counts as dead

    @property
    def max_streams(self) -> int:
        """Requests at once in this worker: below the threads, so that health checks always find one free."""
        return max(1, self.threads - min(16, self.threads // 2))

    @property
    def draining(self) -> bool:
        """Whether the supervisor has begun to shut the server down."""
        return self.drain_flag is not None and Path(self.drain_flag).exists()

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | WebSettings) -> WebSettings:
        """Settings from a JSON file or a mapping; raises ValueError naming a missing key."""
        if isinstance(source, WebSettings):
            return source
        values = source if isinstance(source, dict) else json.loads(Path(source).read_text(encoding="utf-8"))
        fields = {field.name: field for field in dataclasses.fields(cls)}
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := needed - values.keys():
            raise ValueError(f"web setting {sorted(missing)[0]!r} is missing")
        return cls(**{name: value for name, value in values.items() if name in fields})
