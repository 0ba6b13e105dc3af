"""What a step brings back of its prompts' tokens: log-probabilities of those that follow, sums of hidden states.

Runs behind the forward, captured or not, on the hidden states that it leaves, in steps where a sequence asks for it. The
head is called on few rows at a time, so that logits of a long prompt take little memory. Knows no requests, and not
what sums are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pagegraph.compiler.step.inputs import PromptInput, PromptOutput, StepLogprobs
from pagegraph.compiler.step.sampling import StepLogprobTensors

MAX_LOGITS_BYTES = 64 << 20  # of the float32 logits that are there at a time

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [R, H] -> logits [R, vocab]


class PromptTensors(NamedTuple):
    """Of R rows and Q sums; on the device, or on their way to the host."""

    chosen: torch.Tensor | None  # float32 [R]
    ranks: torch.Tensor | None  # int32 [R]
    top_ids: torch.Tensor | None  # int32 [R, n]
    top_values: torch.Tensor | None  # float32 [R, n]
    sums: torch.Tensor | None  # float32 [Q, H]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PromptTensors:
        """With every tensor changed."""
        return PromptTensors(*(None if one is None else change(one) for one in self))

    def output(self, prompt: PromptInput) -> PromptOutput:
        """On the host; waits for what is on the device."""
        chosen, ranks, top_ids, top_values, sums = (None if one is None else one.cpu().numpy() for one in self)
        logprobs = None
        if chosen is not None:
            assert ranks is not None and top_ids is not None and top_values is not None
            logprobs = StepLogprobs(chosen, ranks, top_ids, top_values)
        return PromptOutput(prompt, logprobs, sums)


def read_prompt(prompt: PromptInput, hidden: torch.Tensor | None, vocab_size: int, head: Head) -> PromptTensors:
    """What `prompt` asks for, of the step's hidden states [1, T, H]. Launches only; nothing is waited for."""
    if hidden is None:
        raise ValueError("the model's forward gives no hidden states")
    found = PromptTensors(None, None, None, None, None)
    if len(prompt.rows):
        found = _logprobs(prompt, hidden[0], vocab_size, head)
    if prompt.num_summed.any():
        rows = hidden[0, _to(prompt.summed, hidden.device)].float()
        sums = torch.segment_reduce(rows, "sum", lengths=_to(prompt.num_summed, hidden.device), unsafe=True)
        found = found._replace(sums=sums)
    return found


def _logprobs(prompt: PromptInput, hidden: torch.Tensor, vocab_size: int, head: Head) -> PromptTensors:
    rows, targets = _to(prompt.rows, hidden.device), _to(prompt.targets, hidden.device)
    size = max(MAX_LOGITS_BYTES // (4 * vocab_size), 1)
    parts = []
    for some, theirs in zip(rows.split(size), targets.split(size)):
        part = StepLogprobTensors(head(hidden[some]).float(), theirs, prompt.num_logprobs)
        parts.append((part.chosen[:, 0], part.ranks.int(), part.top_ids.int(), part.top_values))
    chosen, ranks, top_ids, top_values = (torch.cat(column) for column in zip(*parts))
    return PromptTensors(chosen, ranks, top_ids, top_values, None)


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 on the device."""
    tensor = torch.from_numpy(values.astype(np.int64))
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor
