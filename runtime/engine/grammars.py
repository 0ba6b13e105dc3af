"""Requests whose grammars are being compiled, beside the loop: they join the queue when that is done.

Knows who submitted what, and which of it is still wanted. Knows no grammar.
"""

from __future__ import annotations

from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass

from pagegraph.runtime.grammar.compiler import Grammar, GrammarCompiler
from pagegraph.runtime.grammar.step_masks import StepMasks
from pagegraph.runtime.ipc.protocol import Submit

LOOK_S = 0.005  # how long an engine without other work waits for a grammar before it looks for messages


@dataclass(slots=True)
class CompilingGroup:
    """Sequences that are submitted together, as far as they are still wanted, and the grammar of each."""

    client: bytes
    submits: list[Submit]
    grammars: list[Future[Grammar] | None]
    tell_admitted: bool
    taken: bool

    @property
    def is_done(self) -> bool:
        return all(one is None or one.done() for one in self.grammars)

    def drop(self, request_id: str) -> None:
        """This one is not wanted any more."""
        kept = [index for index, submit in enumerate(self.submits) if submit.request_id != request_id]
        self.submits = [self.submits[index] for index in kept]
        self.grammars = [self.grammars[index] for index in kept]


class Grammars:
    """Compiling groups in the order that they came in, and the masks of those that run."""

    def __init__(self, compiler: GrammarCompiler, masks: StepMasks) -> None:
        self.masks = masks
        self._compiler = compiler
        self._compiling: list[CompilingGroup] = []

    def __len__(self) -> int:
        """Sequences that wait for their grammar."""
        return sum(len(group.submits) for group in self._compiling)

    @property
    def num_tokens(self) -> int:
        """Of their prompts."""
        return sum(len(submit.token_ids) for group in self._compiling for submit in group.submits)

    def waiting_of(self, asker: str) -> tuple[int, int]:
        """Sequences of one key that wait for their grammar, and the tokens of their prompts."""
        own = [
            len(submit.token_ids) for group in self._compiling for submit in group.submits if submit.asker.name == asker
        ]
        return len(own), sum(own)

    @property
    def stalled_s(self) -> float:
        """For how long a thread has been at one grammar; compiling is bounded, so a long time means that it hangs."""
        return self._compiler.running_s

    def compile(self, client: bytes, submits: list[Submit], tell_admitted: bool, taken: bool) -> None:
        """Start compiling what a group asks for; `take_done` has it when that is done."""
        wanted = [submit.params.structured_outputs for submit in submits]
        grammars = [None if one is None else self._compiler.compile(one) for one in wanted]
        self._compiling.append(CompilingGroup(client, submits, grammars, tell_admitted, taken))

    def take_done(self, wait: bool) -> list[CompilingGroup]:
        """Groups whose grammars are compiled, or failed to. wait: there is nothing else to do, so wait a moment."""
        if not self._compiling:
            return []
        if wait:
            pending = [one for group in self._compiling for one in group.grammars if one is not None]
            futures.wait([one for one in pending if not one.done()], LOOK_S, futures.FIRST_COMPLETED)
        done = [group for group in self._compiling if group.is_done]
        self._compiling = [group for group in self._compiling if not group.is_done]
        return done

    def abort(self, client: bytes, request_id: str) -> None:
        """The sequence is not wanted any more, if it is here."""
        for group in self._compiling:
            if group.client == client:
                group.drop(request_id)
        self._compiling = [group for group in self._compiling if group.submits]

    def use_idle_time(self) -> bool:
        """Load what the first grammar will need -> whether that was to be done."""
        return self._compiler.use_idle_time()
