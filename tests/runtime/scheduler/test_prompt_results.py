"""What comes of prompts: every log-probability once and in order, however chunks, caches, drafts and preemptions fall."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import PromptLogprobs, Submit, TokenDelta, Tokens
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.sampling_params import PoolingParams, SamplingParams
from pagegraph.runtime.scheduler import prompt_results
from tests.runtime.engine.test_engine import Harness
from tests.runtime.fake_step import MAX_LEN, VOCAB, alone


class Reader(Harness):
    """Keeps what came of each prompt."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.parts: dict[str, list[PromptLogprobs]] = {}
        self.embeddings: dict[str, np.ndarray] = {}
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
        if delta.embedding:
            assert delta.finish_reason == "stop" and not delta.token_ids
            self.embeddings[delta.request_id] = np.frombuffer(delta.embedding, np.float32)

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


def embedding_of(prompt: list[int], pooling: str, dimensions: int | None, normalize: bool) -> np.ndarray:
    """Of hidden states (1, token, position)."""
    hidden = np.array([(1.0, token, at) for at, token in enumerate(prompt)])
    vector = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(axis=0)}[pooling][:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


kinds = st.tuples(prompts, st.sampled_from(["text", "read", "embedded", "read and embedded"]))


@settings(max_examples=60)
@given(
    st.lists(kinds, min_size=1, max_size=6), st.integers(12, 60), st.integers(8, 40), st.booleans(),
    st.sampled_from(["last", "mean", "cls"]), st.booleans(), st.sampled_from([None, 2]),
)  # fmt: skip
def test_embeddings_beside_generation(wanted, num_blocks, budget, caching, pooling, normalize, dimensions) -> None:
    """In chunks, after preemptions, and the second time with a full cache."""
    pooler = Pooler(3, pooling, normalize, any_dimensions=True)
    harness = Reader(num_blocks=num_blocks, budget=budget, caching=caching, max_queue=20, max_num_seqs=4, pooler=pooler)
    for turn in range(2):
        submits = []
        for index, (prompt, kind) in enumerate(wanted):
            params = SamplingParams(
                max_tokens=6, ignore_eos=True, seed=3, prompt_logprobs=1 if "read" in kind else None,
                pooling=PoolingParams(dimensions) if "embedded" in kind else None,
            )  # fmt: skip
            submits.append(Submit(request_id=f"{turn}-{index}", token_ids=prompt, params=params))
            harness.mailbox.put(submits[-1])
        harness.run()
        for submit, (prompt, kind) in zip(submits, wanted, strict=True):
            key = submit.request_id
            assert harness.told(submit) == (expected(prompt, 1) if "read" in kind else [])
            assert harness.ended[key] == ("stop" if "embedded" in kind else "length")
            if "embedded" in kind:
                assert harness.tokens[key] == []
                np.testing.assert_allclose(
                    harness.embeddings[key], embedding_of(prompt, pooling, dimensions, normalize), rtol=1e-5
                )
            else:
                assert harness.tokens[key] == alone(prompt, submit.params, 3)[0]
    assert len(harness.embeddings) == 2 * sum("embedded" in kind for _, kind in wanted)
    assert harness.scheduler.counters.prompt_tokens == 2 * sum(len(prompt) for prompt, _ in wanted)
    page = harness.metrics.render().decode()
    assert f'vllm:request_prompt_tokens_count{{engine="0",model_name="m"}} {2 * len(wanted)}.0' in page


@pytest.mark.parametrize(("pooling", "hits"), [("last", 20), ("mean", 0), ("cls", 0)])
def test_only_the_last_hidden_state_may_stand_behind_a_cached_prefix(pooling: str, hits: int) -> None:
    harness = Reader(pooler=Pooler(3, pooling))
    for request_id in ("fills", "reads"):
        params = SamplingParams(pooling=PoolingParams())
        harness.mailbox.put(Submit(request_id=request_id, token_ids=list(range(11)) * 2, params=params))
        harness.run()
    assert harness.scheduler.counters.prefix_hits == hits
    np.testing.assert_array_equal(harness.embeddings["fills"], harness.embeddings["reads"])


@pytest.mark.parametrize(
    ("pooler", "params", "words"),
    [
        (Pooler(3, refused="it has a Dense"), SamplingParams(pooling=PoolingParams()), "has no embeddings here: it has a Dense"),
        (Pooler(3), SamplingParams(pooling=PoolingParams(2)), "dimensions is 2; give 3"),
        (Pooler(3), SamplingParams(pooling=PoolingParams(10**9)), "dimensions is 1000000000; this model's embeddings have 3"),
        (Pooler(0, refused="no hidden states"), SamplingParams(prompt_logprobs=0), "prompt_logprobs cannot be had"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_give_is_refused(pooler: Pooler, params: SamplingParams, words: str) -> None:
    """And only that: a request beside it runs."""
    harness = Reader(pooler=pooler)
    harness.mailbox.put(Submit(request_id="bad", token_ids=[1, 2], params=params))
    harness.mailbox.put(asking("good", [1, 2], None, 3))
    harness.run()
    assert harness.ended == {"bad": "400", "good": "length"} and words in harness.failures[0].message
