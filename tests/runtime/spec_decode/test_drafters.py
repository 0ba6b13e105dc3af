"""The engine's loop with draft tokens, against a device that is simulated: what it says is a script, what it takes a formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.inputs import Deferred, StepInput, StepOutput
from pagegraph.compiler.step.step import Ticket
from pagegraph.kernels.spec_decode import reference
from pagegraph.runtime.engine.engine import Engine
from pagegraph.runtime.engine.limits import Limits
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.engine.stats import EngineStats
from pagegraph.runtime.ipc.protocol import SamplingParams, Submit, Tokens
from pagegraph.runtime.llm import LocalMailbox
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.device_drafter import DeviceDrafter
from pagegraph.runtime.spec_decode.drafter import Drafter
from pagegraph.runtime.spec_decode.host_drafter import HostDrafter
from pagegraph.runtime.spec_decode.model_drafter import ModelDrafter
from pagegraph.runtime.spec_decode.num_draft_tokens import StepCosts
from pagegraph.runtime.spec_decode.proposer import NgramProposer, NoProposer
from tests.runtime.fake_step import FakeStep

MAX_LEN = 2000
RNG = np.random.default_rng(0)
RANDOM = RNG.integers(0, 1000, MAX_LEN)
REPEATED = np.tile(RNG.integers(0, 1000, 60), -(-MAX_LEN // 60))
BOTH = np.concatenate([RANDOM[:400], REPEATED[:400], RANDOM[400:]])
HOST_MS = 0.3  # from results to the next launch


class Device(FakeStep):
    """Says the script, by position; steps take `cost(queries)` ms each in their order, on a clock of its own."""

    def __init__(self, script: np.ndarray, cost: Callable[[int], float], on_device: bool = False) -> None:
        says = lambda history, seed: int(script[len(history) % len(script)])  # noqa: E731
        super().__init__(4000, 16, looked_up if on_device else None, says=says, block_size=16, max_len=MAX_LEN)
        self.script = script
        self.cost = cost
        self.now = 0.0  # seconds
        self.free = 0.0  # when the last launched step is done

    def clock(self) -> float:
        return self.now

    def launch(self, step: StepInput, num_steps: int = 1) -> Ticket:
        self.now += HOST_MS / 1e3
        done = self.free = max(self.free, self.now) + self.cost(step.num_seqs) / 1e3
        ticket = super().launch(step, num_steps)

        def wait() -> StepOutput:
            self.now = max(self.now, done)
            return ticket.wait()

        return Ticket(Deferred(wait))


def looked_up(history: list[int], seed: int) -> tuple[list[int], int]:
    (tokens,), (matched,) = reference.ngram_proposal(np.array([history], np.int32), np.array([len(history)]), 15, 2, 5)
    return tokens.tolist(), int(matched)


class Model:
    """Drafts what the script says with a chance, from position `good_from` on with a good one; takes `ms` a draft token."""

    def __init__(
        self, device: Device, scheduler: Scheduler, chance: float, ms: float, good_from: int = MAX_LEN
    ) -> None:
        self.device, self.scheduler, self.chance, self.ms, self.good_from = device, scheduler, chance, ms, good_from
        self.rng = np.random.default_rng(1)
        self.made = 0

    def propose(self, at: np.ndarray, counts: np.ndarray) -> np.ndarray:
        count = int(counts.max())
        self.device.now += self.ms * count / 1e3
        self.made += count
        positions = self.scheduler.batch.known[at][:, None] + np.arange(count)
        right = self.device.script[positions]
        chance = np.where(positions < self.good_from, self.chance, 0.9)
        return np.where(self.rng.random(right.shape) < chance, right, (right + 1) % 1000).astype(np.int32)


def flat(num_tokens: int) -> float:
    return 10.0 + 0.1 * num_tokens


def steep(num_tokens: int) -> float:
    return 0.5 + 8.0 * num_tokens


def drive(
    script: np.ndarray,
    cost: Callable[[int], float],
    streams: int,
    num_tokens: int,
    *,
    drafting: bool = True,
    fixed: int = 0,
    on_device: bool = False,
    **model,
) -> tuple[float, Device, Scheduler, Drafter | None]:
    """Seconds that `streams` requests of `num_tokens` take."""
    device = Device(script, cost, on_device)
    scheduler = Scheduler(
        BlockPool(4000, 16, enable_caching=False),
        max_num_seqs=16,
        max_num_batched_tokens=512,
        max_model_len=MAX_LEN,
        max_decode_tokens=64,
    )
    metrics = EngineMetrics("m", MAX_LEN)
    drafter = None
    if drafting:
        costs = (
            None
            if fixed
            else StepCosts((*range(1, 17), *range(20, 65, 4)), {n: cost(n) for n in (1, 2, 4, 8, 16, 32, 64)})
        )
        most = fixed or 15
        if on_device:
            drafter = DeviceDrafter(scheduler, most, costs)
        elif model:
            made = Model(device, scheduler, **model)
            drafter = ModelDrafter(scheduler, NoProposer(), most, costs, made, model.get("ms", 1.0), device.clock)
        else:
            drafter = HostDrafter(scheduler, NgramProposer(2, 5), most, costs, device.clock)
    mailbox = LocalMailbox()
    engine = Engine(
        device, scheduler, mailbox, Limits(1000, MAX_LEN, frozenset(), 100, Pooler(1)), None, device.clock,
        EngineStats(metrics, scheduler, StepCounts()), drafter=drafter,
    )  # fmt: skip
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for index in range(streams):
        mailbox.put(Submit(request_id=str(index), token_ids=script[:20].tolist(), params=params))
    got: dict[str, list[int]] = {str(index): [] for index in range(streams)}
    while mailbox.inbox or not engine.idle:
        engine.turn()
        for message in mailbox.take():
            assert isinstance(message, Tokens)
            for delta in message.each():
                got[delta.request_id] += delta.token_ids
    scheduler.check_integrity()
    for tokens in got.values():
        assert tokens == script[20 : 20 + num_tokens].tolist()
    return device.now, device, scheduler, drafter


WHERE = pytest.mark.parametrize("on_device", [False, True])


@WHERE
@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("cost", [flat, steep])
def test_random_text_loses_nothing(cost, streams: int, on_device: bool) -> None:
    plain = drive(RANDOM, cost, streams, 600, drafting=False)[0]
    assert plain / drive(RANDOM, cost, streams, 600, on_device=on_device)[0] > 0.98


@WHERE
@pytest.mark.parametrize(("streams", "gain"), [(1, 4.0), (4, 3.0), (16, 1.5)])
def test_text_that_repeats_gains_where_tokens_are_cheap(streams: int, gain: float, on_device: bool) -> None:
    plain = drive(REPEATED, flat, streams, 600, drafting=False)[0]
    assert plain / drive(REPEATED, flat, streams, 600, on_device=on_device)[0] > gain


def test_a_device_that_looks_up_never_waits_for_the_host() -> None:
    """With draft tokens in every step, a turn takes what the step takes."""
    fast = lambda num_tokens: 0.7 + 0.01 * num_tokens  # noqa: E731
    seconds, device, scheduler, _ = drive(REPEATED, fast, 1, 900, on_device=True)
    assert scheduler.counters.saved_steps > 700
    assert seconds < sum(map(fast, device.queries)) / 1e3 + 20 * HOST_MS / 1e3
    assert drive(REPEATED, fast, 1, 900)[0] > 1.2 * seconds, "where the host looks up, each such step waits for it"


@WHERE
def test_nothing_is_drafted_where_tokens_cost_as_much_as_steps(on_device: bool) -> None:
    seconds, device, scheduler, _ = drive(REPEATED, steep, 4, 300, on_device=on_device)
    assert drive(REPEATED, steep, 4, 300, drafting=False)[0] / seconds > 0.98
    assert scheduler.counters.draft_tokens < 20


@WHERE
def test_drafting_starts_with_the_repetition_and_ends_with_it(on_device: bool) -> None:
    _, device, scheduler, _ = drive(BOTH, flat, 1, 1200, on_device=on_device)
    steps = np.array(device.queries)
    assert steps[:300].max() <= 2 and steps[-300:].max() <= 2
    assert scheduler.counters.accepted > 250 and len(steps) < 960
    assert scheduler.counters.draft_tokens - scheduler.counters.accepted < 60


def test_no_step_is_planned_ahead_of_draft_tokens_and_all_others_are() -> None:
    """Without draft tokens the device never waits for the host."""
    seconds, device, _, _ = drive(RANDOM, flat, 1, 400)
    assert seconds < sum(map(flat, device.queries)) / 1e3 + 20 * HOST_MS / 1e3


@WHERE
def test_a_fixed_number_is_drafted_whether_it_pays_or_not(on_device: bool) -> None:
    _, _, scheduler, _ = drive(REPEATED, steep, 1, 300, fixed=3, on_device=on_device)
    assert scheduler.counters.accepted > 150
    assert scheduler.counters.draft_tokens <= 3 * scheduler.counters.drafts


@pytest.mark.parametrize(("chance", "gain"), [(0.9, 1.8), (0.02, 0.97)])
def test_a_model_drafts_if_it_is_good(chance: float, gain: float) -> None:
    plain = drive(RANDOM, flat, 1, 900, drafting=False)[0]
    assert plain / drive(RANDOM, flat, 1, 900, chance=chance, ms=1.0)[0] > gain


def test_a_model_that_was_bad_is_tried_now_and_then_until_it_is_good() -> None:
    _, _, scheduler, drafter = drive(RANDOM, flat, 1, 900, chance=0.02, ms=1.0)
    assert 3 < drafter.model.made < 60
    _, device, scheduler, _ = drive(RANDOM, flat, 1, 1900, chance=0.02, ms=1.0, good_from=500)
    assert scheduler.counters.accepted > 500 and len(device.queries) < 1400
