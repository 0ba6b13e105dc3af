"""What a largest step takes beside weights and blocks, before a device is there to measure it on.

The forward is run on the meta device, what lives at the same time is added up, and for CUDA handed to PyTorch's allocator as
`compiler.explain.allocator` has it: the same modules that `compiler.profile.memory` runs on a GPU, in the same order. What
follows the forward is run on the CPU on a few rows, by the code that does it, and grows with the rows. Knows no device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagegraph.compiler.build import LoadedModel, largest_step
from pagegraph.compiler.explain.allocator import Block, CachingAllocator
from pagegraph.compiler.explain.trace import META, meta_inputs
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.dummy import dummy_step, everything, read_whole
from pagegraph.compiler.step.prompt import MAX_LOGITS_BYTES, read_prompt
from pagegraph.compiler.step.sampling import process_and_sample
from pagegraph.compiler.step.staging import CpuStaging
from pagegraph.compiler.step.state import DeviceState
from pagegraph.kernels.workspaces import workspace_of

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
    pool: int  # that an allocator holds for the forward alone
    peak: int  # of all of it: on CUDA what an allocator comes to hold
    launches: int  # of kernels by the forward, each op one


def step_memory(options: CompilerOptions, model: LoadedModel) -> StepMemory:
    """Of a model that is planned, or loaded: what of it is run has no values."""
    largest = largest_step(options)
    tokens = min(largest.tokens, largest.seqs * model.max_model_len)
    state = model.state(replace(options, device=META), 1)
    cuda = options.device.type == "cuda"
    allocator = CachingAllocator()
    forward = outputs = pool = launches = 0
    results: Any = None
    if model.paged_model.model.device.type == "meta":
        inputs = meta_inputs(state, tokens, largest.seqs)
        with torch.no_grad(), _Held(allocator, 1, cuda) as held:
            results = model.paged_model(*inputs, *state.caches)
        forward, outputs, launches = held.most, allocator.used, held.launches
        pool = allocator.reserved
    prompts = _prompts(model, tokens, allocator, cuda) if model.paged_model.body else 0
    sampling = _sampling(options, model, allocator, cuda)
    del results
    peak = allocator.reserved if cuda else max(forward, outputs + max(sampling, prompts))
    return StepMemory(tokens, largest.seqs, forward, outputs, sampling, prompts, pool, peak, launches)


def _sampling(options: CompilerOptions, model: LoadedModel, allocator: CachingAllocator, cuda: bool) -> int:
    """Of ROWS rows of this vocabulary as if they were all, penalty counts of as many slots with them."""
    seqs = replace(options.step, max_num_seqs=ROWS, max_draft_tokens=0, ngram=None)
    few = replace(options, device=torch.device("cpu"), step=seqs)
    state = DeviceState(
        Caches.none(), block_size=few.kv_cache.block_size, max_num_seqs=ROWS - 1, max_blocks=2,
        vocab_size=model.vocab_size, device=few.device,
    )  # fmt: skip
    step = dummy_step([1] * ROWS, state.dummy_slot, everything(ROWS))
    staging = CpuStaging(state)
    staged = staging.unpack(staging.send(step, Bucket(ROWS, ROWS)))
    logits = torch.zeros(ROWS, model.vocab_size, dtype=model.dtype)
    with torch.no_grad(), _Held(allocator, largest_step(options).seqs // ROWS, cuda) as held:
        kept = process_and_sample(logits, step.sampling, staged, state)
    del kept
    return held.most


def _prompts(model: LoadedModel, tokens: int, allocator: CachingAllocator, cuda: bool) -> int:
    """Logits are made of a bounded number of rows at a time: float32 beside the model's own, and what is read of them."""
    size, hidden = model.dtype.itemsize, model.paged_model.hidden_size
    rows = min(max(MAX_LOGITS_BYTES // (4 * model.vocab_size), 1), tokens)
    prompt = read_whole([ROWS])
    states = torch.zeros(1, ROWS, hidden, dtype=model.dtype)

    def head(some: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(some), model.vocab_size, dtype=model.dtype)

    with torch.no_grad(), _Held(allocator, max(rows // ROWS, 1), cuda) as held:
        found = read_prompt(prompt, states, model.vocab_size, head)
    del found
    blocks = [allocator.take(tokens * hidden * each) for each in (size, 4)]  # rows picked out, and in float32
    for block in blocks:
        allocator.give_back(block)
    return max(held.most, tokens * hidden * (size + 4))


class _Held(TorchDispatchMode):
    """Takes of `allocator` what storages that are made within it do, each `times` its size.

    `most`: bytes at a time beside what was there before. workspaces: of ops on CUDA too.
    """

    def __init__(self, allocator: CachingAllocator, times: int, workspaces: bool) -> None:
        super().__init__()
        self.most = self.launches = 0
        self._allocator, self._times, self._workspaces = allocator, times, workspaces
        self._before = allocator.used
        self._blocks: dict[int, Block] = {}

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_id(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        out = function(*args, **kwargs)
        made = 0
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and (at := _id(one)) not in self._blocks and at not in given:
                self._blocks[at] = self._take(one.untyped_storage().nbytes())
                weakref.finalize(one.untyped_storage(), self._gone, at)
                made += 1
        if self._workspaces:
            names = [one.name for one in function._schema.arguments]
            within = [self._take(size) for size in workspace_of(function, dict(zip(names, args)) | kwargs)]
            for block in within:
                self._allocator.give_back(block)
        self.launches += bool(made and given)
        return out

    def _take(self, size: int) -> Block:
        block = self._allocator.take(size * self._times)
        self.most = max(self.most, self._allocator.used - self._before)
        return block

    def _gone(self, at: int) -> None:
        self._allocator.give_back(self._blocks.pop(at))


def _id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
