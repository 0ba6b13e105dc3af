"""From logits to the next token of every sequence of a step, in the documented order.

raw log-probabilities -> allowed ids -> bias and min_tokens -> penalties -> temperature -> min-p -> top-k ->
top-p -> Gumbel noise keyed by (seed, position). The arithmetic is in `kernels`; this file moves parameters to
the device and skips what no sequence of the step asks for. Knows no requests.
"""

from __future__ import annotations

import numpy as np
import torch

from compiler.state import DeviceState, Staged
from compiler.step_input import SamplingInput, StepLogprobs
from kernels import reference


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


def draw(logits: torch.Tensor, staged: Staged, state: DeviceState) -> torch.Tensor:
    """The tail of every step: logits [S, vocab], padding rows included -> ids int64 [S], handed to the next step.

    Temperature, seed and position are all it looks at. Nothing is read back, so it is captured with the forward.
    """
    ids = torch.ops.pagegraph.gumbel_argmax(logits, staged.temperature, staged.seeds, staged.draw_positions)
    _hand_over(ids, staged, state, logits.shape[0])
    return ids


def is_plain(sampling: SamplingInput) -> bool:
    """Whether `draw` is all that the step asks for."""
    return not (
        sampling.allowed
        or len(sampling.bias_rows)
        or sampling.penalty_reset
        or sampling.num_logprobs >= 0
        or _has_penalties(sampling)
        or _has_filters(sampling)
    )


def sample(
    logits: torch.Tensor, sampling: SamplingInput, staged: Staged, state: DeviceState
) -> tuple[torch.Tensor, StepLogprobTensors | None]:
    """logits [S, vocab] of the step's S sequences -> (token ids int64 [S], logprobs if any sequence asked).

    Everything that `draw` does not know; its ids replace those that `draw` handed over.
    """
    device = logits.device
    num_seqs = logits.shape[0]
    raw = logits.float()
    logits = raw
    if sampling.allowed or len(sampling.bias_rows):
        logits = _restrict(logits.clone(), sampling)
    for row, prompt_ids, output_ids in sampling.penalty_reset:
        state.reset_row(row, prompt_ids, output_ids)
    rows = staged.rows[:num_seqs].long()
    if penalised := _has_penalties(sampling):
        outputs, prompt = state.penalty_counts()
        logits = reference.apply_penalties(
            logits,
            outputs[rows],
            prompt[rows],
            _to(sampling.repetition, device),
            _to(sampling.presence, device),
            _to(sampling.frequency, device),
        )
    if _has_filters(sampling):
        logits = reference.drop_filtered(
            logits,
            staged.temperature[:num_seqs],
            _to(sampling.top_k, device),
            _to(sampling.top_p, device),
            _to(sampling.min_p, device),
        )
    ids = torch.ops.pagegraph.gumbel_argmax(
        logits, staged.temperature[:num_seqs], staged.seeds[:num_seqs], staged.draw_positions[:num_seqs]
    )
    _hand_over(ids, staged, state, num_seqs)
    if penalised:
        outputs.index_put_((rows, ids), staged.sampled[:num_seqs], accumulate=True)
    logprobs = StepLogprobTensors(raw, ids, sampling.num_logprobs) if sampling.num_logprobs >= 0 else None
    return ids, logprobs


def _hand_over(ids: torch.Tensor, staged: Staged, state: DeviceState, num_seqs: int) -> None:
    """The rows' last tokens, for the next step's unknown ids; rows that sampled nothing keep theirs."""
    rows = staged.rows[:num_seqs].long()
    kept = state.last_tokens[rows]
    state.last_tokens.index_put_((rows,), torch.where(staged.sampled[:num_seqs] > 0, ids.int(), kept))


def _has_filters(sampling: SamplingInput) -> bool:
    return bool((sampling.top_k > 0).any() or (sampling.top_p < 1).any() or sampling.min_p.any())


def _has_penalties(sampling: SamplingInput) -> bool:
    return bool((sampling.repetition != 1).any() or sampling.presence.any() or sampling.frequency.any())


def _restrict(logits: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Allowed ids, then bias; `logits` is written to."""
    device = logits.device
    for row, allowed in sampling.allowed.items():
        mask = torch.ones(logits.shape[1], dtype=torch.bool, device=device)
        mask[_to(allowed, device).long()] = False
        logits[row].masked_fill_(mask, -torch.inf)
    if len(sampling.bias_rows):
        at = (_to(sampling.bias_rows, device).long(), _to(sampling.bias_tokens, device).long())
        logits.index_put_(at, _to(sampling.bias_values, device), accumulate=True)
    return logits


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor
