"""Triton: which draft tokens were accepted, and what to draft next, on the device, at the end of every step.

Queries of a slot stand together: its last token, then a draft token each. A draft token is accepted if it is what the
query before it drew. What the slot then holds is searched for what may follow, so the next step can be launched before
the host knows any of it. Knows no host and no model. See `kernels.ops`.

Verification and the search are in the CUDA graph of the step: the next step is launched before the host knows any of
it. The host counts draft tokens in flight as accepted, takes back what was not when ids arrive, and takes blocks for
the longest that a sequence can be. A sequence that may end within the draft tokens in flight waits for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.spec_decode.reference import MAX_MATCH

BLOCK = 1024
NUM_WARPS = 16
SEEN = tl.constexpr(MAX_MATCH)


@triton.jit
def _num_accepted(ids_ptr, token_ids_ptr, slots_ptr, query_start_ptr, query, num_seqs, LANES: tl.constexpr):
    """Of the slot that begins at `query`: (draft tokens, how many of them are accepted)."""
    slot = tl.load(slots_ptr + query)
    lane = tl.arange(0, LANES)
    draft = query + 1 + lane
    inside = draft < num_seqs
    begin = tl.load(query_start_ptr + draft, mask=inside, other=0)
    end = tl.load(query_start_ptr + draft + 1, mask=inside, other=0)
    ours = inside & (tl.load(slots_ptr + draft, mask=inside, other=-1) == slot) & (end > begin)
    # The first that is not of the slot ends it, whatever stands behind.
    draft_tokens = tl.min(tl.where(ours, LANES, lane), axis=0)
    fed = tl.load(token_ids_ptr + begin, mask=ours, other=0)
    drawn = tl.load(ids_ptr + query + lane, mask=ours, other=0)
    accepted = tl.min(tl.where(fed == drawn, LANES, lane), axis=0)
    return draft_tokens, tl.minimum(accepted, draft_tokens)


@triton.jit
def _begins_slot(slots_ptr, query_start_ptr, query):
    """Whether the query has tokens, and is the first of its slot."""
    live = tl.load(query_start_ptr + query + 1) > tl.load(query_start_ptr + query)
    before = tl.load(slots_ptr + tl.maximum(query - 1, 0))
    return live & ((query == 0) | (before != tl.load(slots_ptr + query)))


@triton.jit
def _accept(last_tokens_ptr, last_at_ptr, ids_ptr, seq_lens_ptr, slot, query):
    """What `query` drew is the last token of its slot."""
    tl.store(last_tokens_ptr + slot, tl.load(ids_ptr + query).to(tl.int32))
    tl.store(last_at_ptr + slot, tl.load(seq_lens_ptr + query))


@triton.jit(do_not_specialize=["num_seqs"])
def accept_kernel(
    last_tokens_ptr,
    last_at_ptr,
    ids_ptr,
    token_ids_ptr,
    slots_ptr,
    query_start_ptr,
    seq_lens_ptr,
    num_seqs,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    query = tl.program_id(0)
    if not _begins_slot(slots_ptr, query_start_ptr, query):
        return
    draft_tokens, accepted = _num_accepted(ids_ptr, token_ids_ptr, slots_ptr, query_start_ptr, query, num_seqs, LANES)
    if draft_tokens > 0:
        _accept(last_tokens_ptr, last_at_ptr, ids_ptr, seq_lens_ptr, tl.load(slots_ptr + query), query + accepted)


@triton.jit(do_not_specialize=["num_seqs"])
def propose_ngram_kernel(
    found_ptr,
    last_tokens_ptr,
    last_at_ptr,
    history_ptr,
    draft_tokens_ptr,
    ids_ptr,
    token_ids_ptr,
    slots_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sampled_ptr,
    num_seqs,
    WIDTH: tl.constexpr,
    NUM_DRAFT_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    MIN_NGRAM: tl.constexpr,
    MAX_NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    query = tl.program_id(0)
    begin = tl.load(query_start_ptr + query)
    end = tl.load(query_start_ptr + query + 1)
    fed = tl.load(token_ids_ptr + end - 1, mask=end > begin, other=0)
    tl.store(found_ptr + query, 0)
    tl.store(found_ptr + num_seqs + query, fed)
    if not _begins_slot(slots_ptr, query_start_ptr, query):
        return
    draft_tokens, accepted = _num_accepted(ids_ptr, token_ids_ptr, slots_ptr, query_start_ptr, query, num_seqs, LANES)
    slot = tl.load(slots_ptr + query).to(tl.int64)
    if draft_tokens > 0:
        _accept(last_tokens_ptr, last_at_ptr, ids_ptr, seq_lens_ptr, slot, query + accepted)
    text = history_ptr + slot * WIDTH
    length = tl.load(seq_lens_ptr + query)
    lane = tl.arange(0, BLOCK)
    for first in range(begin, end, BLOCK):
        token = first + lane
        inside = token < end
        tl.store(text + length - end + token, tl.load(token_ids_ptr + token, mask=inside, other=0), mask=inside)
    if (draft_tokens == 0) & (tl.load(sampled_ptr + query) == 0):
        return
    few = tl.arange(0, LANES)
    kept = (few <= accepted) & (length + few < WIDTH)
    tl.store(text + length + few, tl.load(ids_ptr + query + few, mask=kept, other=0).to(tl.int32), mask=kept)
    tl.debug_barrier()  # what this program wrote is read by its other threads
    known = tl.minimum(length + accepted + 1, WIDTH)
    last = tl.load(text + known - 1)
    # The longest match, of equals the latest, as one number: its length above 32 bits of where it ends.
    best = tl.full([BLOCK], -1, tl.int64)
    for start in range(0, known - 1, BLOCK):
        at = start + lane
        same = (at < known - 1) & (tl.load(text + at, mask=at < known - 1, other=-1) == last)
        if tl.max(same.to(tl.int32), axis=0) > 0:
            alike = same.to(tl.int64)
            for back in tl.static_range(1, MAX_NGRAM):
                wanted = tl.load(text + known - 1 - back, mask=known - 1 - back >= 0, other=-1)
                same = same & (at >= back)
                same = same & (tl.load(text + at - back, mask=same, other=-2) == wanted)
                alike += same.to(tl.int64)
            best = tl.maximum(best, tl.where(alike > 0, (alike << 32) + at, -1))
    key = tl.max(best, axis=0)
    matched = 0
    behind = known - 1
    if (key >> 32) >= MIN_NGRAM:
        place = key.to(tl.int32)
        back = tl.arange(0, SEEN)
        there = tl.load(text + place - back, mask=place >= back, other=-1)
        here = tl.load(text + known - 1 - back, mask=known - 1 >= back, other=-2)
        matched = tl.min(tl.where((place >= back) & (there == here), SEEN, back), axis=0)
        behind = place + 1
    first_draft = tl.load(draft_tokens_ptr + slot * NUM_DRAFT_TOKENS)
    hit = (first_draft == tl.load(ids_ptr + query).to(tl.int32)).to(tl.int32)
    tl.store(found_ptr + query, 2 * matched + hit)
    tl.debug_barrier()  # the old draft token is read before a new one takes its place
    following = tl.load(text + behind + few % (known - behind), mask=few < NUM_DRAFT_TOKENS, other=0)
    tl.store(draft_tokens_ptr + slot * NUM_DRAFT_TOKENS + few, following, mask=few < NUM_DRAFT_TOKENS)


def accept(
    ids: Tensor,
    token_ids: Tensor,
    slots: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
    max_draft_tokens: int,
) -> None:
    """See `kernels.ops`."""
    seqs = len(ids)
    accept_kernel[(seqs,)](
        last_tokens,
        last_at,
        ids,
        token_ids,
        slots,
        query_start,
        seq_lens,
        seqs,
        LANES=triton.next_power_of_2(max_draft_tokens + 1),
        num_warps=1,
        **dependent(ids.device),
    )


def propose_ngram(
    ids: Tensor,
    token_ids: Tensor,
    slots: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
    history: Tensor,
    draft_tokens: Tensor,
    min_ngram: int,
    max_ngram: int,
) -> Tensor:
    """See `kernels.ops`."""
    seqs = len(ids)
    found = torch.empty(2, seqs, dtype=torch.int32, device=ids.device)
    propose_ngram_kernel[(seqs,)](
        found,
        last_tokens,
        last_at,
        history,
        draft_tokens,
        ids,
        token_ids,
        slots,
        query_start,
        seq_lens,
        sampled,
        seqs,
        WIDTH=history.shape[1],
        NUM_DRAFT_TOKENS=draft_tokens.shape[1],
        LANES=triton.next_power_of_2(draft_tokens.shape[1] + 1),
        MIN_NGRAM=min_ngram,
        MAX_NGRAM=max_ngram,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **dependent(ids.device),
    )
    return found
