"""From logits to the next token of every sequence of a step, in the documented order.

raw log-probabilities -> bitmask of a grammar -> allowed ids -> bias and min_tokens -> penalties -> temperature -> min-p -> top-k ->
top-p -> Gumbel noise keyed by (seed, position). The arithmetic is in `kernels`; this file moves parameters to
the device and skips what no sequence of the step asks for. Knows no requests.

Argmax or Gumbel-max, and the hand-over of the token to the next step, are captured with the forward: temperature and
seed travel in the step's metadata. Filters, penalties, bias and log-probabilities run behind the graph when asked
for.
"""

from __future__ import annotations

import numpy as np
import torch

from pagegraph.compiler.step.bitmask import Bitmask
from pagegraph.compiler.step.inputs import SamplingInput, StepLogprobs
from pagegraph.compiler.step.staging import Staged
from pagegraph.compiler.step.state import DeviceState
from pagegraph.kernels.sampling import reference


class StepLogprobTensors:
    """Log-probabilities of one step, still on the device."""

    def __init__(self, logits: torch.Tensor, chosen: torch.Tensor, num: int) -> None:
        logprobs = torch.log_softmax(logits, dim=-1)
        self.chosen = logprobs.gather(1, chosen[:, None])
        self.ranks = (logprobs > self.chosen).sum(dim=1) + 1
        self.top_values, self.top_ids = logprobs.topk(num, dim=-1)

    def numpy(self) -> StepLogprobs:
        """On the host; waits for the device."""
        return StepLogprobs(
            self.chosen[:, 0].cpu().numpy(),
            self.ranks.int().cpu().numpy(),
            self.top_ids.int().cpu().numpy(),
            self.top_values.cpu().numpy(),
        )


def sample(logits: torch.Tensor, staged: Staged, state: DeviceState) -> torch.Tensor:
    """Logits of the first s sequences of the step, [s, vocab] -> ids int64 [s], handed to the next step.

    Temperature, seed and position are all it reads. Nothing is copied to the host, so it is captured with the forward.
    """
    return torch.ops.pagegraph.sample(logits, *_arguments(len(logits), staged, state))


def sample_allowed(
    ids: torch.Tensor, logits: torch.Tensor, bitmask: Bitmask, staged: Staged, state: DeviceState
) -> torch.Tensor:
    """What `sample` gave of logits [s, vocab], where the bitmask allows it; else sampled anew, into ids int64 [s]."""
    torch.ops.pagegraph.sample_allowed(ids, *bitmask, logits, *_arguments(len(logits), staged, state))
    return ids


def _arguments(count: int, staged: Staged, state: DeviceState) -> tuple[torch.Tensor, ...]:
    """Of `pagegraph::sample`, behind the logits of the step's first `count` sequences."""
    metadata = staged.metadata
    read = (metadata.temperature, metadata.seeds, staged.seq_lens, metadata.slots, metadata.sampled)
    return *(one[:count] for one in read), state.last_tokens, state.last_at


def accept_drafts(ids: torch.Tensor, staged: Staged, state: DeviceState) -> torch.Tensor | None:
    """Accept the draft tokens that the sampled ids int64 [s] confirm; an n-gram proposer proposes the next ones.

    Returns int32 [2, s] of `pagegraph::propose_ngram`, or None. May be called again with other ids, which then count.
    """
    if not state.max_draft_tokens:
        return None
    metadata, ops, count = staged.metadata, torch.ops.pagegraph, len(ids)
    step = ids, staged.token_ids, metadata.slots[:count], metadata.query_start[: count + 1], staged.seq_lens[:count]
    last = state.last_tokens, state.last_at
    if state.ngram is None:
        ops.accept(*step, *last, state.max_draft_tokens)
        return None
    return ops.propose_ngram(*step, metadata.sampled[:count], *last, state.history, state.draft_tokens, *state.ngram)


def process_and_sample(
    logits: torch.Tensor,
    sampling: SamplingInput,
    staged: Staged,
    state: DeviceState,
    bitmask: Bitmask | None = None,
) -> tuple[torch.Tensor, StepLogprobTensors | None]:
    """logits [S, vocab] of the step's S sequences -> (token ids int64 [S], logprobs if any sequence asked).

    Applies bias, penalties and filters first; its ids replace those that were sampled with the forward.
    bitmask: on the logits' device, of the rows `sampling.masked`.
    """
    device, metadata, num_seqs = logits.device, staged.metadata, len(logits)
    raw = logits.float()
    logits = raw
    if bitmask is not None or sampling.allowed or sampling.bias:
        logits = logits.clone()
        if bitmask is not None:
            torch.ops.pagegraph.apply_bitmask(logits, *bitmask)
        _restrict(logits, sampling)
    slots = metadata.slots[:num_seqs].long()
    if penalties := sampling.penalties:
        for slot, prompt_ids, output_ids in sampling.penalty_reset:
            state.reset_slot(slot, prompt_ids, output_ids)
        outputs, prompt = state.penalty_counts()
        logits = reference.apply_penalties(
            logits,
            outputs[slots],
            prompt[slots],
            _to(penalties.repetition, device),
            _to(penalties.presence, device),
            _to(penalties.frequency, device),
        )
    if filters := sampling.filters:
        logits = reference.drop_filtered(
            logits,
            metadata.temperature[:num_seqs],
            _to(filters.top_k, device),
            _to(filters.top_p, device),
            _to(filters.min_p, device),
        )
    ids = sample(logits, staged, state)
    if penalties:
        outputs.index_put_((slots, ids), metadata.sampled[:num_seqs], accumulate=True)
    logprobs = StepLogprobTensors(raw, ids, sampling.num_logprobs) if sampling.num_logprobs >= 0 else None
    return ids, logprobs


def _restrict(logits: torch.Tensor, sampling: SamplingInput) -> None:
    """Allowed ids, then bias; `logits` is written to."""
    device = logits.device
    for row, allowed in sampling.allowed.items():
        mask = torch.ones(logits.shape[1], dtype=torch.bool, device=device)
        mask[_to(allowed, device).long()] = False
        logits[row].masked_fill_(mask, -torch.inf)
    if sampling.bias:
        rows, tokens, values = (_to(one, device) for one in sampling.bias)
        logits.index_put_((rows.long(), tokens.long()), values, accumulate=True)


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor
