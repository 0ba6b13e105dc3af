"""How far the engine may be from stock transformers, by dtype: the one place that says so, and why.

Both sides compute the same function of the same weights, so they differ by rounding alone, and rounding depends on the
model: on its depth, and on how large a few of its activations are. So what is allowed is measured, where there is
something to measure: transformers itself, in the engine's dtype, is compared with transformers one precision up, and
the engine may be TIMES as far from there as that is. Floors are for models where that happens to be next to nothing.

float32     There is no precision up that all models run in: both sides are float32, in another order of sums. Over tens
            of layers this moves logits by 1e-5 to 1e-4; the floors are ten times that, and every fault that was planted
            in the tests is far above.
bfloat16    8 bits of significand: a sum of rounded terms is off by about 2^-8 of them. Sums in other orders, merged or
            split, err by as much as the library's and not in the same direction.
float16     11 bits: an eighth of that.
quantised   Weights are the same, dequantised. In front of them a device may round activations to 8 bits (a scale a
            token), and scales to 16; a KV cache in fp8 has 4 bits of significand. None of that is in what transformers
            does. On a CPU, where activations keep 16 bits, SmolLM2 in int8 and in its file's Q4_1 is as near as in
            bfloat16 (KL 0.0014). The floors are a guess at what 8 bits of an activation may cost, not measured on a GPU.

In a mixture a router's scores may tie: rounding then chooses another expert, and that token's logits are others, as far
apart as experts are. So STRAYS of the positions may be anywhere; their means count as everywhere.

A greedy token may be another where it is a tie: the two logits are no further apart than where transformers' own rounding
chose another token, or than TIE_MEANS of its mean error, whose tail is long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pagegraph.compiler.verify.difference import Positions, Summary, summary_of

TIMES = 2.0
STRAYS = 0.03
TIE_MEANS = 10.0
LARGEST_TIMES = 3.0  # of the largest of some hundred errors, which varies by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What is allowed; natural logarithms."""

    kl: float  # mean
    mean: float  # error in the log-probability of a token
    largest: float  # the same, of any one position
    tie: float  # between the logits of two tokens
    layer: float  # error of a module's output given the same input, as a share of what it adds
    strays: float = 0.0  # share of the positions that may be beyond `largest` and `tie`

    def widened(self, own: Summary) -> Band:
        """By what transformers' own rounding was measured to be."""
        return replace(
            self,
            kl=max(self.kl, TIMES * own.kl),
            mean=max(self.mean, TIMES * own.mean),
            largest=max(self.largest, LARGEST_TIMES * own.largest),
            tie=max(self.tie, own.margin, TIE_MEANS * own.mean),
        )

    def strayed(self, errors: Sequence[float], margins: Sequence[float]) -> int:
        """How many positions are further than any may be; 0 where there are no more of them than the band lets stray."""
        count = sum(not (error <= self.largest and margin <= self.tie) for error, margin in zip(errors, margins))
        return count if count > self.strays * len(errors) else 0

    def leaves(self, found: Positions) -> list[str]:
        """What of `found` is outside, in words; none where all is within."""
        whole = summary_of(found)
        over = [
            f"{words} {value:.3g}, allowed {allowed:.3g}"
            for words, value, allowed in (
                ("mean KL", whole.kl, self.kl),
                ("mean log-probability error", whole.mean, self.mean),
            )
            if not value <= allowed
        ]
        if count := self.strayed(found.error.tolist(), found.margin.tolist()):
            over.append(
                f"{count} positions beyond a log-probability error of {self.largest:.3g} or a tie of {self.tie:.3g}:"
                f" up to {whole.largest:.3g} and {whole.margin:.3g}"
            )
        return over


FLOORS = {
    torch.float32: Band(kl=1e-6, mean=2e-4, largest=2e-3, tie=2e-3, layer=2e-4),
    torch.bfloat16: Band(kl=2e-3, mean=0.02, largest=0.15, tie=0.1, layer=0.02),
    torch.float16: Band(kl=2e-4, mean=0.003, largest=0.02, tie=0.02, layer=0.003),
}
QUANTISED = Band(kl=0.03, mean=0.15, largest=1.5, tie=1.0, layer=0.1)
# Of `deterministic: true` against itself: no bit differs, and two tokens that are as likely are no excuse.
BIT_FOR_BIT = Band(kl=0.0, mean=0.0, largest=0.0, tie=-math.inf, layer=0.0)


def floor_of(dtype: torch.dtype, quantised: bool, mixture: bool = False) -> Band:
    """Of an engine in `dtype`; quantised: its weights or its KV cache; mixture: of experts."""
    band = QUANTISED if quantised else FLOORS[dtype]
    rounds = quantised or dtype != torch.float32
    return replace(band, strays=STRAYS) if mixture and rounds else band
