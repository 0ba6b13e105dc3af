"""Every op in plain PyTorch, in the order of its formula: the specification and the oracle of the tests.

Slow on purpose where a loop says it more plainly. Knows no device, no pages beyond their layout, no Triton.
"""

from __future__ import annotations

import numpy as np
import torch

INT8_MAX, FP8_MAX = 127.0, 448.0
SECOND_DIGIT = 2 * INT8_MAX  # what a rounding to int8 leaves is at most half: this many steps fill the next int8
NIBBLE_SPAN = 32  # columns that `pack_nibbles` keeps together
FRAGMENT = (
    64  # rows and columns of a weight that `fragments` lays together: Hopper's matrix instruction takes so many rows
)
CODED_GROUP = 128  # columns of a row of x that share a scale, where both sides of a product are integer codes
LOOKUP_SEEN = 32  # a match is measured up to so many tokens


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] at `slots` (int32 [T], page * block_size + offset), in place.

    A cache of e4m3 holds them by a scale of 1; what lies beyond its largest, 448, becomes that.
    """
    where = slots.long()
    for heads, cache in ((key, key_cache), (value, value_cache)):
        if cache.dtype == torch.float8_e4m3fn:
            heads = heads.float().clamp(-FP8_MAX, FP8_MAX)
        cache.view(-1, *cache.shape[2:])[where] = heads.to(cache.dtype)


def norm_and_rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """heads [T, H, D], cos and sin [T, D], norm [D] -> [T, H, D]: RMS norm where given, then half-split rotation.

    RoFormer's rotation (Su et al. 2021) with element i paired with i + D / 2, as GPT-NeoX lays it out.
    """
    wide = heads.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.float()
    low, high = wide.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (wide * cos.float()[:, None] + turned * sin.float()[:, None]).to(heads.dtype)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> torch.Tensor:
    """Softmax attention over pages, one sequence after the other, in float32; shapes as in `kernels.ops`."""
    write_kv(key, value, key_cache, value_cache, slots)
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start == rows.stop:
            continue
        keys = _read(key_cache, block_tables[sequence], length)
        values = _read(value_cache, block_tables[sequence], length)
        out[rows] = attend(query[rows], keys, values, sinks, scale, window, softcap, chunk).to(out.dtype)
    return out


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> torch.Tensor:
    """query [Q, Hq, D], the last Q positions of keys [N, Hkv, D] and values [N, Hkv, Dv] -> float32 [Q, Hq, Dv]."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible(query.shape[0], keys.shape[0], window, chunk, query.device), -torch.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
        weights = torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def visible(num_queries: int, num_keys: int, window: int, chunk: int, device: torch.device) -> torch.Tensor:
    """Which keys each of the last `num_queries` positions attends to: bool [Q, N]."""
    at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    mask = keys <= at
    if window:
        mask &= keys > at - window
    if chunk:
        mask &= keys // chunk == at // chunk
    return mask


def _read(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    pages = -(-length // cache.shape[1])
    return cache[table[:pages].long()].flatten(0, 1)[:length]


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


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits, as int64 [S, vocab]: a function of (seed int64 [S], position int32 [S], token id) alone.

    Integer arithmetic only, so every device and the Triton kernel give the same bits.
    """
    seeds = seeds.long()
    stream = mix32((seeds & 0xFFFFFFFF) ^ mix32((seeds >> 32) ^ mix32(positions.long() + 0x9E3779B9)))
    tokens = mix32(torch.arange(1, vocab_size + 1, device=seeds.device))
    return mix32(stream[:, None] ^ tokens[None])


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise float32 [S, vocab] of `random_bits`: -log(-log(1 - u)).

    Large noise comes from small u, which float32 holds to 32 bits and log1p keeps: equal noise of two tokens is
    rare in the upper tail even over a large vocabulary.
    """
    uniform = (random_bits(seeds, positions, vocab_size).float() + 0.5) * 2.0**-32
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


def update_tables(tables: torch.Tensor, pages: torch.Tensor, num_pages: torch.Tensor) -> None:
    """See `kernels.ops`."""
    rows, index, page = pages[: int(num_pages)].long().unbind(1)
    tables[rows, index] = page.int()


def unpack(
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    starts: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    draft_tokens: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    counts = query_start.diff()
    padding = len(token_ids) - int(query_start[-1])
    rows = rows.long()

    def of_tokens(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values.repeat_interleave(counts), (0, padding))

    live = torch.arange(len(token_ids)) < query_start[-1]
    first = token_ids[query_start[:-1].long().clamp(max=len(token_ids) - 1)]
    starts = torch.where(first < 0, last_at[rows] - 1 - first, starts)
    positions = (torch.arange(len(token_ids), dtype=torch.int32) + of_tokens(starts - query_start[:-1])).masked_fill(
        ~live, 0
    )
    token_rows = of_tokens(rows)
    draft = draft_tokens[token_rows, (-2 - token_ids).clamp(min=0).long()]
    known = torch.where(token_ids == -1, last_tokens[token_rows], torch.where(token_ids < 0, draft, token_ids))
    ids = known.masked_fill(~live, 0)
    blocks = torch.div(positions, block_size, rounding_mode="floor")
    slots = (tables[token_rows, blocks.long()] * block_size + positions % block_size).masked_fill(~live, 0)
    seq_lens = torch.where(counts > 0, starts + counts, 0)
    used = torch.arange(width)[None] * block_size < seq_lens[:, None]
    out_tables = tables[rows, :width].masked_fill(~used, 0)
    return ids, positions, slots, out_tables, seq_lens, (query_start[1:].long() - 1).clamp(min=0)


def verify(
    ids: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor, query_start: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every live row of a step, in order: (its first entry, the entry behind the draft tokens that hold, its last); int64 [R].

    The entries of a row stand together, the second and later ones a draft token each.
    """
    begins = query_start.numpy()
    live = int((begins[1:] > begins[:-1]).sum())  # padding comes last
    ids, rows, starts = ids.numpy()[:live], rows.numpy()[:live], begins[:live]
    draft = np.zeros(live, bool)
    draft[1:] = rows[1:] == rows[:-1]
    if not draft.any():
        alone = np.arange(live)
        return alone, alone, alone
    wrong = np.zeros(live, bool)
    wrong[1:] = draft[1:] & (token_ids.numpy()[starts[1:]] != ids[:-1])
    first = np.flatnonzero(~draft)
    last = np.append(first[1:], live) - 1
    total = np.cumsum(wrong)
    row = np.cumsum(~draft) - 1
    held = total == total[first][row]
    return first, first + np.bincount(row, held, minlength=len(first)).astype(np.int64) - 1, last


def accept(
    ids: torch.Tensor,
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    most: int,
) -> None:
    """See `kernels.ops`."""
    _accept(verify(ids, token_ids, rows, query_start), ids, rows, seq_lens, last_tokens, last_at)


def _accept(
    held: tuple[np.ndarray, np.ndarray, np.ndarray],
    ids: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
) -> None:
    first, kept, last = held
    kept = kept[last > first]
    owners = rows.numpy()[kept]
    last_tokens.numpy()[owners], last_at.numpy()[owners] = ids.numpy()[kept], seq_lens.numpy()[kept]


def look_up(
    ids: torch.Tensor,
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sampled: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    history: torch.Tensor,
    draft_tokens: torch.Tensor,
    least: int,
    most: int,
) -> torch.Tensor:
    """See `kernels.ops`."""
    found = np.zeros((2, len(ids)), np.int32)
    firsts, kepts, lasts = held = verify(ids, token_ids, rows, query_start)
    _accept(held, ids, rows, seq_lens, last_tokens, last_at)
    if not len(firsts):
        return torch.from_numpy(found)
    text, tokens, drawn = history.numpy(), token_ids.numpy(), ids.numpy()
    lengths, begins, owners = seq_lens.numpy(), query_start.numpy(), rows.numpy()
    found[1, : lasts[-1] + 1] = tokens[begins[1 : lasts[-1] + 2] - 1]
    ended = (lasts > firsts) | (sampled.numpy()[firsts] > 0)
    for first, kept, sampling in zip(firsts.tolist(), kepts.tolist(), ended.tolist()):
        row, begin, end, length = owners[first], begins[first], begins[first + 1], int(lengths[first])
        text[row, length - (end - begin) : length] = tokens[begin:end]
        if sampling:
            text[row, length : length + kept - first + 1] = drawn[first : kept + 1][: text.shape[1] - length]
    first, kept = firsts[ended], kepts[ended]
    if not len(first):
        return torch.from_numpy(found)
    at, known = owners[first], np.minimum(lengths[kept] + 1, text.shape[1])
    hit = draft_tokens.numpy()[at, 0] == drawn[first]
    proposed, matched = lookup(text[at, : known.max()], known, draft_tokens.shape[1], least, most)
    draft_tokens.numpy()[at] = proposed
    found[0, first] = 2 * matched + hit
    return torch.from_numpy(found)


def lookup(text: np.ndarray, known: np.ndarray, count: int, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """text int32 [R, W], of which known[i] >= 1 tokens are row i's -> (draft tokens int32 [R, count], matched int32 [R]).

    The latest place where the row's last `least` to `most` tokens stood before, as many of them as stood anywhere; what
    followed there is drafted, going on with its period where that ends. matched: tokens alike, up to LOOKUP_SEEN; 0
    where there is no such place, and the last token is drafted then.
    """
    row, width = np.arange(len(text)), text.shape[1]
    at = np.arange(width)
    same = at < known[:, None] - 1
    length = np.zeros(same.shape, np.int32)
    for back in range(most):
        wanted = text[row, np.maximum(known - 1 - back, 0)]
        same[:, back:] &= text[:, : width - back] == wanted[:, None]
        same[:, :back] = False
        if not same.any():
            break
        length += same
    best = length.max(axis=1)
    end = width - 1 - (length[:, ::-1] == best[:, None]).argmax(axis=1)
    back = np.arange(LOOKUP_SEEN)
    before = end[:, None] - back
    alike = (before >= 0) & (
        text[row[:, None], np.maximum(before, 0)] == text[row[:, None], np.maximum(known[:, None] - 1 - back, 0)]
    )
    matched = np.where(best >= least, np.logical_and.accumulate(alike, axis=1).sum(axis=1), 0)
    begin = np.where(matched > 0, end + 1, known - 1)
    return text[row[:, None], begin[:, None] + np.arange(count) % (known - begin)[:, None]], matched.astype(np.int32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.ops`; rounds as transformers' modules do."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.ops`; float32 inside."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def linear_norm_linear(
    x: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    second: torch.Tensor,
    second_bias: torch.Tensor | None,
    gated: bool,
    query_start: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + linear(x, first), linear of its RMS norm, gated or not)."""
    total, normed = add_rms_norm(residual, torch.nn.functional.linear(x, first, first_bias), norm, eps)
    out = torch.nn.functional.linear(normed, second, second_bias)
    return total, silu_mul(out) if gated else out


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [N, K] in -8..7, K a multiple of 32 -> uint8 [N, K / 2].

    Of every 32 columns the first 16 are the low halves of 16 bytes, the last 16 the high halves, each plus 8: a kernel
    gets two runs of neighbouring columns from one load.
    """
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, NIBBLE_SPAN // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, K / 2] -> int8 [N, K]."""
    spans = packed.unflatten(1, (-1, NIBBLE_SPAN // 2))
    return (torch.stack([spans & 15, spans >> 4], dim=2).to(torch.int8) - 8).flatten(1)


def fragments(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [N, K], in -8..7 at 4 bits -> [N / 64, K / 64, 128, 16] uint8, at 8 bits [.., 256, 16] int8: operands of the matrix unit.

    Blocks of 64 rows and columns, filled up with codes of 0, lie as threads hold the operand A of wgmma m64k16 (PTX ISA, "Register
    Fragments for wgmma"): thread 32 * w + 4 * q + r has rows 16 * w + q + 8 * h, and of every 16 columns those of 8 * c + 2 * r + p,
    for h, c, p of 0 and 1. At 4 bits 16 columns are a word of a thread: bits from 4 * (4 * p + 2 * h + c) on are the code plus 8.
    At 8 bits 8 columns are a word, byte 2 * p + h a code, and the last 32 columns of a block follow the first. `kernels.quant.dequant` wants words so.
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % FRAGMENT, 0, -len(codes) % FRAGMENT))
    row_blocks, blocks = len(codes) // FRAGMENT, codes.shape[1] // FRAGMENT
    if bits == 8:  # block, w, h, q, block, half, step, c, r, p
        parts = codes.view(row_blocks, 4, 2, 8, blocks, 2, 2, 2, 4, 2).permute(0, 4, 5, 1, 3, 8, 6, 7, 9, 2)
        return parts.reshape(row_blocks, blocks, 256, 16)
    parts = (
        (codes + 8).view(row_blocks, 4, 2, 8, blocks, 4, 2, 4, 2).permute(0, 4, 1, 3, 7, 5, 8, 2, 6)
    )  # the last are halves c
    low, high = parts.to(torch.uint8).unbind(-1)
    return (low | high << 4).reshape(row_blocks, blocks, 128, 16)


def from_fragments(laid: torch.Tensor, rows: int, size: int) -> torch.Tensor:
    """The inverse of `fragments`: int8 [rows, size]."""
    row_blocks, blocks = laid.shape[:2]
    if laid.dtype == torch.int8:
        parts = laid.view(row_blocks, blocks, 2, 4, 8, 4, 2, 2, 2, 2).permute(0, 3, 9, 4, 1, 2, 6, 7, 5, 8)
    else:
        parts = torch.stack([laid & 15, laid >> 4], dim=-1).to(torch.int8) - 8
        parts = parts.view(row_blocks, blocks, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 8, 4, 6)
    return parts.reshape(row_blocks * FRAGMENT, -1)[:rows, :size].contiguous()


def exchanged_columns(values: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [N, K'], K filled up to a multiple of 64 with zeros: of every 64 columns first those of thread r = 0 of `fragments`.

    So 16 neighbours are the part of a row that a thread's operand has: column 16 * step + 8 * c + 2 * r + p is at 16 * r + 4 * step + 2 * c + p.
    """
    padded = values.new_zeros(len(values), -(-values.shape[1] // FRAGMENT) * FRAGMENT)
    padded[:, : values.shape[1]] = values
    return padded.view(len(values), -1, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(padded.shape)


def restored_columns(exchanged: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `exchanged_columns`: [N, size]."""
    return exchanged.view(len(exchanged), -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(exchanged.shape)[:, :size]


def fragment_pairs(scale: torch.Tensor, group: int, size: int) -> torch.Tensor:
    """Scales or shifts [N, groups] of `group` columns each -> [N / 64, blocks, 32, 2 * n] beside `fragments`, n groups to a block.

    Or a group is of several blocks, or of all. At 8 * w + q are n pairs, of row 16 * w + q and of that 8 rows on.
    """
    n = 1 if group >= size else max(1, FRAGMENT // group)
    scale = torch.nn.functional.pad(scale, (0, -scale.shape[1] % n, 0, -len(scale) % FRAGMENT))
    parts = scale.view(len(scale) // FRAGMENT, 4, 2, 8, scale.shape[1] // n, n).permute(0, 4, 1, 3, 5, 2)
    return parts.reshape(len(scale) // FRAGMENT, scale.shape[1] // n, 32, 2 * n)


def from_fragment_pairs(pairs: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `fragment_pairs`: [rows, groups], of as many columns as it holds scales for."""
    parts = pairs.view(*pairs.shape[:2], 4, 8, pairs.shape[3] // 2, 2).permute(0, 2, 5, 3, 1, 4)
    return parts.reshape(len(pairs) * FRAGMENT, -1)[:rows, :groups]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> codes of `dtype` (int8 or float8_e4m3fn) [..., K], float32 scale [..., 1]: x is about codes * scale.

    Symmetric: the largest magnitude of a row becomes 127, or 448, the largest of e4m3 (Micikevicius et al. 2022).
    """
    wide = x.float()
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = (wide.abs().amax(dim=-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (wide / scale).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 codes [T, K'], float32 scale [K' / 128, T]; K' is K filled up to a multiple of 128 with zeros.

    Every 128 columns have a scale of their own. Of each 16 columns, column 8 * c + 2 * r + p is at 4 * r + 2 * c + p: so four
    neighbours are the four bytes of a register of the matrix unit whose other operand is made of `fragments`.
    """
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % CODED_GROUP)).unflatten(1, (-1, CODED_GROUP))
    codes, scale = quantize_rows(wide, torch.int8)
    return _as_bytes_of_registers(codes.flatten(1)), scale[..., 0].t().contiguous()


def e4m3_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] -> float8_e4m3fn codes [T, K'], float32 scale [T], the sums of every 128 codes float32 [K' / 128, T]; columns as `int8_rows`."""
    codes, scale = quantize_rows(
        torch.nn.functional.pad(x.float(), (0, -x.shape[1] % CODED_GROUP)), torch.float8_e4m3fn
    )
    sums = codes.float().unflatten(1, (-1, CODED_GROUP)).sum(2)
    return _as_bytes_of_registers(codes), scale[:, 0], sums.t().contiguous()


def _as_bytes_of_registers(codes: torch.Tensor) -> torch.Tensor:
    """[T, K] with columns in the order that `int8_rows` tells of."""
    return codes.view(len(codes), -1, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(codes.shape)


def decoded_rows(codes: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """What `int8_rows` stands for, or `e4m3_rows` with its scale as [1, T]: float32 [T, size]."""
    plain = codes.view(len(codes), -1, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(len(codes), -1, CODED_GROUP)
    return (plain.float() * scale.t()[:, :, None]).flatten(1)[:, :size]


def two_digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 high and low [T, K], float32 scale [T, 1]: x is about (high + low / 254) * scale."""
    high, scale = quantize_rows(x, torch.int8)
    rest = x.float() / scale - high
    return high, (rest * SECOND_DIGIT).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def quantize_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] -> int8 codes [N, K] in -8..7, float32 scale and shift [N, K / group]: 16 even steps from least to most."""
    wide = weight.float().unflatten(1, (-1, group))
    low, high = wide.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((wide - low) / scale).round().clamp(0, 15) - 8
    return codes.to(torch.int8).flatten(1), scale[..., 0], (low + 8 * scale)[..., 0]


def dequantize(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, group: int) -> torch.Tensor:
    """Float32 weight [N, K]: codes * scale + shift of the column's group; see `pagegraph::quant_linear` for the shapes."""
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes)
    size = codes.shape[1]
    weight = codes.float() * scale.float().repeat_interleave(group, dim=1)[:, :size]
    return weight if shift is None else weight + shift.float().repeat_interleave(group, dim=1)[:, :size]


def quant_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """See `kernels.ops`: the product with the dequantised weight, rounded to x's dtype."""
    return torch.nn.functional.linear(x, dequantize(codes, scale, shift, group).to(x.dtype), bias)


def fragment_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    out_size: int,
    rounds: bool,
    gated: bool = False,
) -> torch.Tensor:
    """See `kernels.ops`: the product with the dequantised weight, rounded to x's dtype."""
    size = x.shape[-1]
    if codes.dtype == torch.float8_e4m3fn:
        codes = restored_columns(codes, size)
    else:
        scale, shift = (
            None if one is None else from_fragment_pairs(one, out_size, -(-size // group)) for one in (scale, shift)
        )
        codes = from_fragments(codes, out_size, size)
    product = quant_linear(x, codes, scale, shift, bias, group)
    return silu_mul(product) if gated else product


def norm_fragment_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    out_size: int,
    rounds: bool,
    *second: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    total, normed = add_rms_norm(x, residual, norm, eps)
    followed = second[0] is not None
    out = fragment_linear(normed, codes, scale, shift, bias, group, out_size, rounds, followed)
    return total, fragment_linear(out, *second, rounds) if followed else out
