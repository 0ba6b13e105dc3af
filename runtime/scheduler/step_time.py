"""Model of how long a step takes, learnt from the steps that ran.

    ms = decode(decode tokens) + prompt tokens * token(their mean depth)

`decode` and `token` are lines. A step without prompts teaches the first, a step with them the second, by what it took
beyond the first. The depth of a token is how many tokens of its prompt stand before it: its attention reads those. Knows
no clock: durations are handed in. Knows no target: `runtime.scheduler.chunk_limit` does; nor what becomes of a step that
takes far longer than `expected_ms`: `runtime.server.pulse` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagegraph.runtime.scheduler.plan import Plan

DECAY = 0.98  # weight of the past at each observation: about the last fifty steps of a kind count
RIDGE = 0.1  # a slope counts in full only where sizes differ by more than this share of their mean
OUTLIER = 4.0  # a step that took longer than so many times its prediction (a compilation, a pause) counts as this
GROWTH = 2  # predictions are trusted up to so many times the largest recent number of tokens, and depth


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes. `decodes`: tokens of decodes, draft tokens too."""

    decodes: int
    prompt_tokens: int = 0
    depth: float = 0.0  # mean over the prompt tokens

    @staticmethod
    def of(plan: Plan) -> StepLoad:
        """A prompt's last token, alone, counts as a decode: it costs as one."""
        in_prompt = plan.counts > 1
        if not in_prompt.any():
            return StepLoad(len(plan))
        counts = plan.counts[in_prompt].astype(float)
        tokens = counts.sum()
        depth = (counts * (plan.starts[in_prompt] + counts / 2)).sum() / tokens
        return StepLoad(int(len(plan) - in_prompt.sum()), int(tokens), float(depth))


class Line:
    """Exponentially weighted least squares, y = intercept + slope * x, neither below 0."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._x2 = self._xy = 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        self._weight = self._weight * DECAY + weight
        self._x = self._x * DECAY + weight * x
        self._y = self._y * DECAY + weight * y
        self._x2 = self._x2 * DECAY + weight * x * x
        self._xy = self._xy * DECAY + weight * x * y

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return self._weight > 0

    def __call__(self, x: float) -> float:
        """Predicted y; 0 where nothing is known."""
        intercept, slope = self.coefficients()
        return intercept + slope * x

    def coefficients(self) -> tuple[float, float]:
        """(intercept, slope)."""
        if not self._weight:
            return 0.0, 0.0
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._x2 / self._weight - x * x + (RIDGE * x) ** 2
        slope = max((self._xy / self._weight - x * y) / spread, 0.0) if spread > 0 else 0.0
        if slope * x > y:
            slope = y / x
        return y - slope * x, slope


class StepTime:
    """The two lines, and how far they are trusted."""

    def __init__(self) -> None:
        self._decode = Line()  # ms of a step, by its decode tokens
        self._token = Line()  # ms of a prompt token, by its depth
        self._largest = 0.0  # prompt tokens of a recent step
        self._deepest = 0.0  # their depth
        self._most_decodes = 0.0

    def observe(self, load: StepLoad, ms: float) -> None:
        """A step took `ms` milliseconds."""
        self._most_decodes = max(self._most_decodes * DECAY, load.decodes)
        known = self._token if load.prompt_tokens else self._decode
        if known:
            ms = min(ms, OUTLIER * self.step_ms(load))
        if not load.prompt_tokens:
            self._decode.add(load.decodes, ms)
            return
        beyond = max(ms - self._decode(load.decodes), 0.0)
        self._token.add(load.depth, beyond / load.prompt_tokens, load.prompt_tokens)
        self._largest = max(self._largest * DECAY, load.prompt_tokens)
        self._deepest = max(self._deepest * DECAY, load.depth)

    def step_ms(self, load: StepLoad) -> float:
        """Predicted milliseconds of a step."""
        return self._decode(load.decodes) + load.prompt_tokens * self._token(load.depth)

    def expected_ms(self, load: StepLoad) -> float | None:
        """`step_ms` of a step that is like recent ones, and so right within a small factor; None of others."""
        seen = (self._most_decodes, self._largest, self._deepest)
        if any(one > GROWTH * most for one, most in zip((load.decodes, load.prompt_tokens, load.depth), seen)):
            return None
        return self.step_ms(load)

    def decode_ms(self, decodes: int) -> float | None:
        """Predicted milliseconds of a step of decodes alone; None before the first of them."""
        return self._decode(decodes) if self._decode else None

    def prompt_tokens_in(self, ms: float, depth: int) -> int:
        """Tokens of a prompt, from `depth` on, that lengthen a step by at most `ms`.

        At most `GROWTH` times as many as a recent step had: where a few tokens cost nothing, thousands still do.
        """
        most = GROWTH * self._largest
        intercept, slope = self._token.coefficients()
        first = intercept + slope * depth  # n tokens take n * first + n^2 * slope / 2
        if slope > 0:
            most = min(most, (math.sqrt(first * first + 2 * slope * max(ms, 0.0)) - first) / slope)
        elif first > 0:
            most = min(most, max(ms, 0.0) / first)
        return int(most)
