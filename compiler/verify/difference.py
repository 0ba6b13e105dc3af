"""How far probabilities of next tokens are from expected ones, position by position. Natural logarithms.

Knows logits alone: not where they come from, nor what is too far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 64  # of which tables over the vocabulary are held in float32


@dataclass(frozen=True, slots=True)
class Positions:
    """Float32 [T] each, but `agreed`, bool [T]."""

    agreed: torch.Tensor  # both find the same token likeliest
    margin: (
        torch.Tensor
    )  # expected logit of the likeliest token, less that of the token which the other finds likeliest
    kl: torch.Tensor  # KL(expected || other), in nats
    expected: torch.Tensor  # log-probability of the given token
    other: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """Magnitude of the difference in the log-probability of the given token."""
        return (self.expected - self.other).abs()

    def __len__(self) -> int:
        return len(self.kl)


def positions_of(expected: torch.Tensor, other: torch.Tensor, token_ids: torch.Tensor | None = None) -> Positions:
    """Of logits [T, vocab] and the token int64 [T] of each position; None: the one that is expected as the likeliest."""
    parts = []
    for begin in range(0, len(expected), ROWS_AT_ONCE):
        theirs, ours = (
            table[begin : begin + ROWS_AT_ONCE].float().cpu().log_softmax(-1) for table in (expected, other)
        )
        likeliest, found = theirs.argmax(-1), ours.argmax(-1)
        given = likeliest if token_ids is None else token_ids[begin : begin + ROWS_AT_ONCE]
        at = lambda table, ids: table.gather(1, ids[:, None])[:, 0]  # noqa: E731
        parts.append(
            (
                likeliest == found,
                at(theirs, likeliest) - at(theirs, found),
                (theirs.exp() * (theirs - ours)).nan_to_num(nan=torch.inf).sum(-1),
                at(theirs, given),
                at(ours, given),
            )
        )
    return Positions(*(torch.cat(column) for column in zip(*parts)))


def joined(parts: list[Positions]) -> Positions:
    """One behind the other."""
    names = Positions.__slots__
    return Positions(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, slots=True)
class Summary:
    """Over all positions."""

    positions: int
    top1: float  # share at which both find the same token likeliest
    margin: float  # largest expected margin where they do not; 0 where they always do
    kl: float  # mean
    mean: float  # of the error in log-probability
    largest: float


def summary_of(found: Positions) -> Summary:
    """NaN counts as infinitely far."""
    far = lambda values: values.double().nan_to_num(nan=torch.inf)  # noqa: E731
    return Summary(
        positions=len(found),
        top1=found.agreed.double().mean().item(),
        margin=far(found.margin).max().item(),
        kl=max(far(found.kl).mean().item(), 0.0),
        mean=far(found.error).mean().item(),
        largest=far(found.error).max().item(),
    )
