"""Penalties, filters and Gumbel-max in plain PyTorch: the specification and the oracle of the tests. Knows no device.

`apply_penalties` and `drop_filtered` are also what runs on every device (`compiler/step/sampling.py`).
"""

from __future__ import annotations

import torch


def apply_penalties(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    prompt_mask: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Penalties on float32 logits [S, V]; output_counts int32 [S, V], prompt_mask bool [S, V], the rest [S].

    Repetition (Keskar et al. 2019) divides positive and multiplies negative logits of every token seen in prompt
    or output; presence and frequency (OpenAI's definition) subtract for tokens of the output only.
    """
    in_output = output_counts > 0
    factor = repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(in_output | prompt_mask, repeated, logits)
    return logits - frequency[:, None] * output_counts - presence[:, None] * in_output


def mix32(words: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3 on int64 tensors holding unsigned 32-bit words."""
    low = 0xFFFFFFFF
    words = words & low
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & low
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & low
    return words ^ (words >> 16)


def streams(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the bits of all tokens are made of, int64 [S]: a function of (seed int64 [S], position int32 [S]) alone."""
    seeds = seeds.long()
    return mix32((seeds & 0xFFFFFFFF) ^ mix32((seeds >> 32) ^ mix32(positions.long() + 0x9E3779B9)))


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits, as int64 [S, vocab]: a function of (seed int64 [S], position int32 [S], token id) alone.

    Integer arithmetic only, so every device and the Triton kernel give the same bits.
    """
    tokens = torch.arange(vocab_size, device=seeds.device)
    return bits_of(streams(seeds, positions)[:, None], tokens[None])


def bits_of(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The random bits of tokens int64, each of its stream."""
    return mix32(stream ^ mix32(tokens + 1))


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise float32 [S, vocab] of `random_bits`."""
    return noise_of(random_bits(seeds, positions, vocab_size))


def noise_of(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float32 of random bits: -log(-log(1 - u)).

    Large noise comes from small u, which float32 holds to 32 bits and log1p keeps: equal noise of two tokens is
    rare in the upper tail even over a large vocabulary.
    """
    uniform = (bits.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """min-p, then top-k, then top-p on scaled logits [S, V]: tokens that fall out become -inf.

    top_k 0, top_p 1 and min_p 0 keep everything. The likeliest token always stays.
    """
    floor = logits.amax(dim=-1, keepdim=True) + torch.log(min_p)[:, None]
    logits = logits.masked_fill(logits < floor, -torch.inf)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)[None]
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    ordered = ordered.masked_fill(ranks >= limit, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = (before >= top_p[:, None]) & (top_p < 1)[:, None] & (ranks > 0)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered.masked_fill(beyond, -torch.inf))


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """See `kernels.ops`."""
    words = bitmask.long()[:, torch.arange(logits.shape[1], device=logits.device) // 32]
    allowed = (words >> torch.arange(logits.shape[1], device=logits.device) % 32) & 1
    logits[rows.long()] = logits[rows.long()].masked_fill(allowed == 0, -torch.inf)


def gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """logits [S, V], temperature float32 [S], seeds int64 [S], positions int32 [S] -> ids int64 [S].

    Adding Gumbel noise and taking the largest draws from softmax(logits / temperature) (Gumbel 1954).
    Temperature 0 takes the largest logit.
    """
    logits = logits.float()
    drawn = (temperature > 0)[:, None]
    noisy = logits / torch.where(drawn, temperature[:, None], 1.0) + gumbel(seeds, positions, logits.shape[-1])
    return torch.where(drawn, noisy, logits).argmax(dim=-1)


def drop_filtered(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Float32 logits [S, V] as they came, -inf where the filters at the row's temperature drop the token.

    Rows of temperature 0 are not filtered: their likeliest token always stays.
    """
    drawn = temperature > 0
    scaled = logits / torch.where(drawn, temperature, 1.0)[:, None]
    kept = filter_logits(scaled, top_k, top_p, min_p)
    return logits.masked_fill((kept == -torch.inf) & drawn[:, None], -torch.inf)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """float32 logits [S, V], parameters [S] -> ids int64 [S]: temperature, min-p, top-k, top-p, Gumbel-max."""
    return gumbel_argmax(drop_filtered(logits, temperature, top_k, top_p, min_p), temperature, seeds, positions)
