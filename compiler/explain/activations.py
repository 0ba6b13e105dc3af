"""What a largest step takes beside weights and blocks, before a device is there to measure it on.

The forward is run on the meta device and what lives at the same time is added up: the same modules that
`compiler.profile.memory` runs on a GPU. What follows it is run on the CPU on a few rows, by the code that does it, and
grows with the rows. Estimates leave out what an allocator holds between allocations. Knows no device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagegraph.compiler.build import LoadedModel, largest_step
from pagegraph.compiler.explain.trace import META, meta_inputs
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.dummy import dummy_step, everything, read_whole
from pagegraph.compiler.step.prompt import MAX_LOGITS_BYTES, read_prompt
from pagegraph.compiler.step.sampling import process_and_sample
from pagegraph.compiler.step.staging import CpuStaging
from pagegraph.compiler.step.state import DeviceState

ROWS = 2  # of sampling and of reading prompts, which are run for real


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes beside weights and blocks of the largest step: `tokens` of `seqs` sequences."""

    tokens: int
    seqs: int
    forward: int  # most at a time within the forward
    outputs: int  # logits and hidden states that it leaves
    sampling: int  # most at a time behind it, with all that requests can ask for
    prompts: int  # most at a time while prompts' log-probabilities are read

    @property
    def peak(self) -> int:
        return max(self.forward, self.outputs + max(self.sampling, self.prompts))


def step_memory(options: CompilerOptions, model: LoadedModel) -> StepMemory:
    """Of a model that is planned, or loaded: what of it is run has no values."""
    largest = largest_step(options)
    tokens = min(largest.tokens, largest.seqs * model.max_model_len)
    state = model.state(replace(options, device=META), 1)
    forward = outputs = 0
    if model.paged_model.model.device.type == "meta":
        inputs = meta_inputs(state, tokens, largest.seqs)
        with torch.no_grad(), _Peak() as peak:
            results = model.paged_model(*inputs, *state.caches)
        forward = peak.most
        outputs = sum(one.nbytes for one in results if one is not None)
    sampling = _sampling(options, model) * largest.seqs // ROWS
    prompts = _prompts(model, tokens) if model.paged_model.body else 0
    return StepMemory(tokens, largest.seqs, forward, outputs, sampling, prompts)


def _sampling(options: CompilerOptions, model: LoadedModel) -> int:
    """Of ROWS rows of this vocabulary, penalty counts of as many slots with them."""
    seqs = replace(options.step, max_num_seqs=ROWS, max_draft_tokens=0, ngram=None)
    few = replace(options, device=torch.device("cpu"), step=seqs)
    state = DeviceState(
        Caches([], [], [], []), block_size=few.kv_cache.block_size, max_num_seqs=ROWS, max_blocks=2,
        vocab_size=model.vocab_size, device=few.device,
    )  # fmt: skip
    step = dummy_step([1] * ROWS, state.dummy_slot, everything(ROWS))
    staging = CpuStaging(state)
    staged = staging.unpack(staging.send(step, Bucket(ROWS, ROWS)))
    logits = torch.zeros(ROWS, model.vocab_size, dtype=model.dtype)
    with torch.no_grad(), _Peak() as peak:
        kept = process_and_sample(logits, step.sampling, staged, state)
    del kept
    return peak.most


def _prompts(model: LoadedModel, tokens: int) -> int:
    """Logits are made of a bounded number of rows at a time: float32 beside the model's own, and what is read of them."""
    size, hidden = model.dtype.itemsize, model.paged_model.hidden_size
    rows = min(max(MAX_LOGITS_BYTES // (4 * model.vocab_size), 1), tokens)
    prompt = read_whole([ROWS])
    states = torch.zeros(1, ROWS, hidden, dtype=model.dtype)

    def head(some: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(some), model.vocab_size, dtype=model.dtype)

    with torch.no_grad(), _Peak() as peak:
        found = read_prompt(prompt, states, model.vocab_size, head)
    del found
    sums = tokens * hidden * (size + 4)  # rows picked out, and in float32
    return max(peak.most * rows // ROWS, sums)


class _Peak(TorchDispatchMode):
    """Most bytes at a time of storages that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_id(one) for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor) and (at := _id(one)) not in self._known and at not in given:
                self._known.add(at)
                self._now += (size := one.untyped_storage().nbytes())
                weakref.finalize(one.untyped_storage(), self._gone, at, size)
        self.most = max(self.most, self._now)
        return out

    def _gone(self, at: int, size: int) -> None:
        self._known.discard(at)
        self._now -= size


def _id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
