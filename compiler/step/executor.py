"""What a padded step does on its device: unpack metadata, run the forward, sample, hand the ids to the next step.

Launches only, so that a CUDA graph can hold it. Knows no threads, streams or graphs: those are the runners'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pagegraph.compiler.model.paged import Forwarded, PagedModel
from pagegraph.compiler.step.bitmask import Bitmask
from pagegraph.compiler.step.forward import run_forward
from pagegraph.compiler.step.inputs import NgramOutput, StepInput, StepOutput
from pagegraph.compiler.step.prompt import PromptTensors, read_prompt
from pagegraph.compiler.step.sampling import (
    StepLogprobTensors,
    accept_drafts,
    process_and_sample,
    sample,
    sample_allowed,
)
from pagegraph.compiler.step.staging import Staged, Staging, StepMetadata
from pagegraph.compiler.step.state import DeviceState


class Outputs(NamedTuple):
    """Of a padded step of S sequences; of several steps in a row the last one's, but for the ids."""

    logits: torch.Tensor  # [S, vocab]
    hidden: torch.Tensor | None  # [1, T, H] what the head reads; None where the model does not give it
    ids: torch.Tensor  # int64 [S], of several steps [S, num_steps]
    # int32 [2, S] of `propose_ngram`: row 0 is 2 * match length + hit, row 1 the token fed; None without the n-gram
    # proposer
    found: torch.Tensor | None
    staged: Staged


class Sampled(NamedTuple):
    """What the step's own s sequences get."""

    ids: torch.Tensor  # int64 [s], of several steps [s, num_steps]
    found: torch.Tensor | None  # int32 [2, s]
    logprobs: StepLogprobTensors | None
    prompt: PromptTensors | None

    def of(self, seqs: int) -> Sampled:
        """Of the first sequences alone; the others are padding."""
        return self._replace(ids=self.ids[:seqs], found=None if self.found is None else self.found[:, :seqs])

    def output(self, step: StepInput) -> StepOutput:
        """On the host: `ids` and `found` are there already."""
        ngram = None
        if self.found is not None:
            matches, fed = self.found.numpy()
            ngram = NgramOutput(matches >> 1, matches & 1 if step.sampling.is_plain else None, fed)
        prompt = None if self.prompt is None or step.prompt is None else self.prompt.output(step.prompt)
        return StepOutput(self.ids.int().numpy(), self.logprobs.numpy() if self.logprobs else None, ngram, prompt)


class StepExecutor:
    """Runs padded steps by whatever forward there is: the modules, or what they are compiled to."""

    def __init__(self, paged_model: PagedModel, state: DeviceState, staging: Staging) -> None:
        self.forward: Callable[..., Forwarded] = paged_model
        self.head = paged_model.head
        self.deterministic = paged_model.deterministic
        self.state = state
        self.staging = staging

    def run(self, metadata: StepMetadata, num_steps: int = 1) -> Outputs:
        """One padded step, or `num_steps` of them in a row: all that a CUDA graph holds."""
        before = []
        for _ in range(num_steps - 1):
            before.append(self.run(metadata).ids)  # the other outputs are freed for the next step
            self.staging.advance(metadata)
        staged = self.staging.unpack(metadata)
        logits, hidden = run_forward(self.forward, staged, self.state)
        ids = sample(logits, staged, self.state)
        found = accept_drafts(ids, staged, self.state)
        return Outputs(logits, hidden, torch.stack([*before, ids], dim=1) if before else ids, found, staged)

    def repeat(self, metadata: StepMetadata, num_steps: int, run: Callable[[], Sampled]) -> Sampled:
        """Call `run` `num_steps` times, the metadata a token further each time -> its result, of several the ids alone."""
        if num_steps == 1:
            return run()
        sampled = []
        for _ in range(num_steps):
            sampled.append(run().ids.clone())
            self.staging.advance(metadata)
        return Sampled(torch.stack(sampled, dim=1), None, None, None)

    def finish(self, step: StepInput, outputs: Outputs, bitmask: Bitmask | None = None) -> Sampled:
        """What the step's own sequences get: ids sampled with the forward, or anew if the step asks for filters etc.

        bitmask: on the device, of a step with masked rows. Where nothing else is asked for, ids that it allows stay.
        """
        seqs, prompt = step.num_seqs, None
        if step.prompt is not None:
            prompt = read_prompt(step.prompt, outputs.hidden, self.state.vocab_size, self.head)
        if step.sampling.is_plain:
            return Sampled(outputs.ids, outputs.found, None, prompt).of(seqs)
        if bitmask is not None and step.sampling.is_plain_but_masked:
            return self.resample(outputs, bitmask).of(seqs)._replace(prompt=prompt)
        ids, logprobs = process_and_sample(outputs.logits[:seqs], step.sampling, outputs.staged, self.state, bitmask)
        return Sampled(ids, accept_drafts(ids, outputs.staged, self.state), logprobs, prompt)

    def resample(self, outputs: Outputs, bitmask: Bitmask) -> Sampled:
        """Sample anew, in place, what the bitmask forbids of the step's ids; launches only, and may be called again."""
        ids = sample_allowed(outputs.ids, outputs.logits, bitmask, outputs.staged, self.state)
        return Sampled(ids, accept_drafts(ids, outputs.staged, self.state), None, None)
