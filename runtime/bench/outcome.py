"""What became of one request, in seconds of one clock. Knows neither how it was sent nor what is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """Times, counts and text of one answer, or the error it ended with."""

    start_time: float = 0.0  # when it was sent, on the monotonic clock
    ttft: float = 0.0  # to the first event with output
    itl: list[float] = field(default_factory=list)  # gaps between events with output
    latency: float = 0.0  # to the last event with output
    queue_time: float = 0.0  # from its arrival until it was sent: waiting for --max-concurrency
    prompt_len: int = 0
    output_tokens: int = 0
    has_usage: bool = False  # whether both counts are the server's; else prompt_len is what was meant, and events count
    text: str = ""
    error: str = ""

    @property
    def success(self) -> bool:
        return not self.error

    @property
    def tpot(self) -> float | None:
        """Seconds an output token behind the first; None where there is no second."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None
