"""How far one model's next-token probabilities are from another's, over prompts: a quantised model against its original.

Knows two built models of one vocabulary and the definitions of the figures; knows no quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.verify.difference import Positions, joined, positions_of
from pagegraph.compiler.verify.steps import prompt_logits


@dataclass(frozen=True, slots=True)
class Quality:
    """Over all positions of all prompts; natural logarithms."""

    positions: int
    top1_agreement: float  # share of positions at which both find the same token likeliest
    kl: float  # mean of KL(original || other), in nats
    logprob_error: float  # mean magnitude of the difference in the log-probability of the prompt's own next token
    perplexity: float  # of the prompts, by the other model
    original_perplexity: float

    def __str__(self) -> str:
        return (
            f"top-1 agreement {100 * self.top1_agreement:.1f} %, KL {self.kl:.4f}, log-probability error {self.logprob_error:.3f}, "
            f"perplexity {self.perplexity:.2f} (original {self.original_perplexity:.2f}) over {self.positions} positions"
        )


def compare(original: BuiltModel, other: BuiltModel, prompts: Sequence[Sequence[int]]) -> Quality:
    """`other` against `original` on prompts of at least two token ids each, teacher-forced."""
    return summarize([(prompt_logits(original, ids), prompt_logits(other, ids), ids) for ids in prompts])


def summarize(runs: Sequence[tuple[torch.Tensor, torch.Tensor, Sequence[int]]]) -> Quality:
    """Of (original logits [T, vocab], other's logits, token ids [T]) of each prompt."""
    found = [positions_of(expected, got, _followed(ids)) for expected, got, ids in runs]
    each = joined(found)
    followed = joined([Positions(*(getattr(one, name)[:-1] for name in Positions.__slots__)) for one in found])
    return Quality(
        positions=len(each),
        top1_agreement=each.agreed.float().mean().item(),
        kl=each.kl.mean().item(),
        logprob_error=followed.error.mean().item(),
        perplexity=(-followed.other).mean().exp().item(),
        original_perplexity=(-followed.expected).mean().exp().item(),
    )


def _followed(ids: Sequence[int]) -> torch.Tensor:
    """The token that follows each one; behind the last, any."""
    return torch.tensor([*ids[1:], 0])
