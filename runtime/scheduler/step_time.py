"""Model of how long a step takes, fitted to the steps that ran: ms = fixed + per_token * tokens.

Knows no clock: durations are handed in. Serves one question: how large a prompt chunk may be beside decodes.
"""

from __future__ import annotations

DECAY = 0.98  # weight of the past at each observation: about the last fifty steps count
OUTLIER = 4.0  # a step that took longer than so many times its prediction (a compilation, a pause) counts as this
GROWTH = 2  # a prediction is trusted up to so many times the largest recent step


class StepTime:
    """Exponentially weighted least squares over (tokens, ms), against a target step time in ms."""

    def __init__(self, target_ms: float) -> None:
        self.target_ms = target_ms
        self._weight = self._tokens = self._ms = self._tokens2 = self._product = 0.0
        self._largest = 0.0

    def observe(self, tokens: int, ms: float) -> None:
        """A step of `tokens` tokens (at least 1) took `ms` milliseconds."""
        expected = self.step_ms(tokens)
        if expected is not None:
            # The mean bounds the clipping from below: sizes far from those seen are predicted badly at first.
            ms = min(ms, OUTLIER * max(expected, self._ms / self._weight))
        self._weight = self._weight * DECAY + 1
        self._tokens = self._tokens * DECAY + tokens
        self._ms = self._ms * DECAY + ms
        self._tokens2 = self._tokens2 * DECAY + tokens * tokens
        self._product = self._product * DECAY + tokens * ms
        self._largest = max(self._largest * DECAY, tokens)

    def step_ms(self, tokens: int) -> float | None:
        """Predicted milliseconds of a step; None before the first observation."""
        if not self._weight:
            return None
        fixed, per_token = self._fit()
        return fixed + per_token * tokens

    def prefill_tokens_beside(self, num_decodes: int) -> int | None:
        """Prompt tokens that keep a step with `num_decodes` decodes under the target; None: nothing known yet.

        At most `GROWTH` times the largest recent step in all, so that a line fitted to small steps of equal
        cost does not promise that a huge one is free.
        """
        if not self._weight:
            return None
        fixed, per_token = self._fit()
        tokens = GROWTH * self._largest
        if self.target_ms <= fixed:
            tokens = 0.0
        elif per_token > 0:
            tokens = min(tokens, (self.target_ms - fixed) / per_token)
        return max(0, int(tokens) - num_decodes)

    def _fit(self) -> tuple[float, float]:
        mean_tokens, mean_ms = self._tokens / self._weight, self._ms / self._weight
        spread = self._tokens2 / self._weight - mean_tokens**2
        if spread < 1e-9 * max(mean_tokens**2, 1.0):
            return 0.0, mean_ms / mean_tokens  # one size seen so far: all cost is per token, a bound from above
        per_token = max((self._product / self._weight - mean_tokens * mean_ms) / spread, 0.0)
        return max(mean_ms - per_token * mean_tokens, 0.0), per_token
