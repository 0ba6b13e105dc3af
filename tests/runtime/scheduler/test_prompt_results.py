"""What comes of prompts: every log-probability once and in order, however chunks, caches, drafts and preemptions fall."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import PromptLogprobs, Submit, TokenDelta, Tokens
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler import prompt_results
from tests.runtime.engine.test_engine import Harness
from tests.runtime.fake_step import MAX_LEN, VOCAB, alone


class Reader(Harness):
    """Keeps what came of each prompt."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.parts: dict[str, list[PromptLogprobs]] = {}
        send = self.mailbox.send

        def seen(client: bytes, message: object) -> None:
            if isinstance(message, Tokens):
                for delta in message.each():
                    self.note(delta)
            send(client, message)

        self.mailbox.send = seen

    def note(self, delta: TokenDelta) -> None:
        if delta.prompt_logprobs is not None:
            assert not self.tokens.get(delta.request_id), "told after the first token"
            self.parts.setdefault(delta.request_id, []).append(delta.prompt_logprobs)

    def told(self, submit: Submit) -> list[tuple[int, float, int, list[int]]]:
        parts = self.parts.get(submit.request_id, [])
        entries = [entry for part in parts for entry in part.entries(submit.token_ids)]
        firsts = [part.first for part in parts]
        assert firsts == [1 + sum(map(len, parts[:at])) for at in range(len(parts))]
        return [(one.token_id, one.logprob, one.rank, one.top_ids) for one in entries]


def expected(prompt: list[int], num: int) -> list[tuple[int, float, int, list[int]]]:
    return [
        (token, -(token + 100.0 * before + 1e4 * at), 1 + token, list(range(num)))
        for at, (before, token) in enumerate(zip(prompt, prompt[1:]))
    ]


def asking(request_id: str, prompt: list[int], num: int | None, max_tokens: int) -> Submit:
    if max_tokens == 0 and num is None:
        max_tokens = 1
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=num, ignore_eos=True, seed=3)
    return Submit(request_id=request_id, token_ids=prompt, params=params)


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LEN - 8)
requests = st.tuples(prompts, st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 6))


@settings(max_examples=60)
@given(
    st.lists(requests, min_size=1, max_size=6), st.integers(12, 60), st.integers(8, 40), st.booleans(),
    st.sampled_from(["", "host", "device"]),
)  # fmt: skip
def test_each_is_told_once_and_in_order(wanted, num_blocks, budget, caching, draft_tokens) -> None:
    """Twice the same requests, the second time with a full cache; the tokens are those of a run that does not ask."""
    harness = Reader(
        num_blocks=num_blocks, budget=budget, caching=caching, draft_tokens=draft_tokens, max_queue=20, max_num_seqs=4
    )
    for turn in range(2):
        submits = [asking(f"{turn}-{index}", *one) for index, one in enumerate(wanted)]
        for submit in submits:
            harness.mailbox.put(submit)
        harness.run()
        for submit in submits:
            num, key = submit.params.prompt_logprobs, submit.request_id
            assert harness.told(submit) == ([] if num is None else expected(submit.token_ids, num))
            assert harness.ended[key] == "length"
            if submit.params.max_tokens == 0:
                assert harness.tokens[key] == []
            else:
                assert harness.tokens[key] == alone(submit.token_ids, submit.params, 3)[0]
    counters = harness.scheduler.counters
    assert counters.generated_tokens == sum(map(len, harness.tokens.values()))
    assert counters.prompt_tokens == 2 * sum(len(one[0]) for one in wanted)


def test_preemption_in_a_prompt_repeats_nothing() -> None:
    """A long prompt, two tokens of it a step, gives its blocks to a sequence that grows beside it."""
    harness = Reader(num_blocks=11, budget=3, max_num_seqs=2, caching=False)
    submits = [asking("grows", [1, 2], None, 30), asking("prompt", list(range(10)) * 3, 1, 3)]
    for submit in submits:
        harness.mailbox.put(submit)
    halfway = set()
    while harness.mailbox.inbox or not harness.engine.idle:
        harness.turn()
        halfway |= {(s.num_preemptions, s.prompt.num_told) for s in harness.scheduler.live if s.prompt is not None}
    assert any(preempted and 0 < told < 29 for preempted, told in halfway)
    assert harness.told(submits[1]) == expected(submits[1].token_ids, 1)
    assert harness.ended == {"grows": "length", "prompt": "length"}


def test_a_prompt_whose_log_probabilities_are_wanted_is_not_read_from_the_cache_but_fills_it() -> None:
    prompt = list(range(11)) * 2
    harness = Reader()
    for request_id, num in (("fills", 0), ("again", 0), ("reads", None)):
        harness.mailbox.put(asking(request_id, prompt, num, 1))
        harness.run()
        assert harness.scheduler.counters.prefix_hits == (20 if request_id == "reads" else 0)


def test_a_prompt_of_the_whole_context_is_read_without_output() -> None:
    prompt = [1, 2, 3, 4] * (MAX_LEN // 4)
    harness = Reader()
    submit = asking("whole", prompt, 2, 0)
    harness.mailbox.put(submit)
    harness.mailbox.put(asking("too long", [*prompt, 1], 2, 0))
    harness.mailbox.put(asking("no room", prompt, 2, 1))
    harness.run()
    assert harness.told(submit) == expected(prompt, 2)
    assert harness.ended == {"whole": "length", "too long": "400", "no room": "400"}


def test_a_long_chunk_is_told_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_results, "MAX_ROWS", 7)
    harness, submit = Reader(), asking("long", list(range(11)) * 3, 1, 2)
    harness.mailbox.put(submit)
    harness.run()
    assert harness.told(submit) == expected(submit.token_ids, 1)
    assert max(map(len, harness.parts["long"])) == 7


def test_a_step_that_fails_repeats_nothing() -> None:
    """Two prompts run again, by themselves, for nobody knows whose fault it was."""
    harness = Reader(budget=12)
    submits = [asking(str(index), list(range(11)) * 2, 1, 5) for index in range(2)]
    for submit in submits:
        harness.mailbox.put(submit)
    steps = iter([False, False, True])
    harness.device.breaks = lambda step: next(steps, False)
    harness.run()
    for submit in submits:
        assert harness.told(submit) == expected(submit.token_ids, 1)
    assert harness.ended == {"0": "length", "1": "length"} and next(steps, None) is None


def test_the_chosen_token_comes_first_among_equals() -> None:
    values = np.zeros(3, np.float32).tobytes()
    part = PromptLogprobs(1, np.zeros(1, np.float32).tobytes(), np.array([1], np.int32).tobytes(),
                          np.array([5, 6, 7], np.int32).tobytes(), values)  # fmt: skip
    (entry,) = part.entries([0, 9])
    assert entry.top_ids == [9, 5, 6] and entry.logprob == entry.top_logprobs[0] and not math.isnan(entry.logprob)
