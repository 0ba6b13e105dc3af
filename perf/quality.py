"""How far one model's next-token probabilities are from another's, over prompts: a quantised model against its original.

Knows two built models of one vocabulary and the definitions of the figures; knows no quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagegraph.compiler.build import BuiltModel


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


@torch.inference_mode()
def prompt_logits(built: BuiltModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Float32 logits [T, vocab] at every position of one prompt, on the CPU; overwrites the first blocks of the cache.

    Nothing may be running. Raises ValueError where the cache does not hold the prompt.
    """
    state, size = built.step.state, len(token_ids)
    num_blocks = -(-size // state.block_size)
    if num_blocks >= built.num_blocks:
        raise ValueError(f"a prompt of {size} tokens takes {num_blocks} blocks, the cache holds {built.num_blocks - 1}")

    def tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=built.device)

    positions = tensor(range(size))
    logits, _ = built.step.paged_model(
        tensor(token_ids),
        positions,
        positions + state.block_size,  # block 0 is the null block
        tensor(range(1, num_blocks + 1))[None],
        tensor([0, size]),
        tensor([size]),
        torch.arange(size, device=built.device),
        state.key_caches,
        state.value_caches,
    )
    return logits.float().cpu()


def compare(original: BuiltModel, other: BuiltModel, prompts: Sequence[Sequence[int]]) -> Quality:
    """`other` against `original` on prompts of at least two token ids each, teacher-forced."""
    return summarize([(prompt_logits(original, ids), prompt_logits(other, ids), ids) for ids in prompts])


def summarize(runs: Sequence[tuple[torch.Tensor, torch.Tensor, Sequence[int]]]) -> Quality:
    """Of (original logits [T, vocab], other's logits, token ids [T]) of each prompt."""
    agreed, divergence, error, losses = [], [], [], []
    for expected, got, ids in runs:
        expected, got = expected.log_softmax(-1), got.log_softmax(-1)
        agreed.append(expected.argmax(-1) == got.argmax(-1))
        divergence.append((expected.exp() * (expected - got)).sum(-1))
        following = torch.tensor(ids[1:])[:, None]
        own = [table[:-1].gather(1, following)[:, 0] for table in (expected, got)]
        error.append((own[0] - own[1]).abs())
        losses.append(-torch.stack(own))
    original, other = torch.cat(losses, dim=1).mean(1).exp().tolist()
    return Quality(
        positions=sum(map(len, agreed)),
        top1_agreement=torch.cat(agreed).float().mean().item(),
        kl=torch.cat(divergence).mean().item(),
        logprob_error=torch.cat(error).mean().item(),
        perplexity=other,
        original_perplexity=original,
    )
