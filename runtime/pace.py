"""How long a step of so many tokens takes, learned from the steps themselves: ms = fixed + per_token * tokens.

Knows no clock: durations are handed in. Serves one question: how large a prompt chunk may be beside decodes.
"""

from __future__ import annotations

DECAY = 0.98  # weight of the past at each observation: about the last fifty steps count


class Pace:
    """Exponentially weighted least squares over (tokens, ms), against a target step time in ms."""

    def __init__(self, target_ms: float) -> None:
        self.target_ms = target_ms
        self._weight = self._tokens = self._ms = self._tokens2 = self._product = 0.0

    def observe(self, tokens: int, ms: float) -> None:
        """A step of `tokens` tokens took `ms` milliseconds."""
        self._weight = self._weight * DECAY + 1
        self._tokens = self._tokens * DECAY + tokens
        self._ms = self._ms * DECAY + ms
        self._tokens2 = self._tokens2 * DECAY + tokens * tokens
        self._product = self._product * DECAY + tokens * ms

    def step_ms(self, tokens: int) -> float | None:
        """Predicted milliseconds of a step; None before the first observation."""
        if not self._weight:
            return None
        fixed, per_token = self._fit()
        return fixed + per_token * tokens

    def prefill_tokens_beside(self, num_decodes: int) -> int | None:
        """Prompt tokens that keep a step with `num_decodes` decodes under the target; None: not known yet."""
        if not self._weight:
            return None
        fixed, per_token = self._fit()
        if per_token <= 0:
            return None
        return max(0, int((self.target_ms - fixed) / per_token) - num_decodes)

    def _fit(self) -> tuple[float, float]:
        mean_tokens, mean_ms = self._tokens / self._weight, self._ms / self._weight
        spread = self._tokens2 / self._weight - mean_tokens**2
        if spread < 1e-9 * max(mean_tokens**2, 1.0):
            return 0.0, mean_ms / mean_tokens  # one size seen so far: all cost is per token, a bound from above
        per_token = max((self._product / self._weight - mean_tokens * mean_ms) / spread, 0.0)
        return max(mean_ms - per_token * mean_tokens, 0.0), per_token
