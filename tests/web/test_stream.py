"""What the web makes of deltas is what the offline API makes of them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from flask.testing import FlaskClient

from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.protocol import Abort, Submit, TokenDelta, TokenLogprob, Tokens
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams

TEXT = "hello world \u65e5\u672c \U0001f999 the end\ufffd"
STOPS = ["world", "\u672c ", "\U0001f999", " the e", "\ufffd", "lo"]


class Scripted:
    """A fake engine: answers every request with the same deltas, one that brings a token alone as engines do."""

    def __init__(self, llm: LLM, deltas: list[TokenDelta]) -> None:
        self.mailbox, self.deltas, self.left, self.ended = llm._mailbox, deltas, [], {}
        self.idle = True

    def turn(self) -> None:
        for _, message in self.mailbox.poll(block=False):
            if isinstance(message, Submit):
                self.left = [TokenDelta(message.request_id, *fields_of(delta)) for delta in self.deltas]
            elif isinstance(message, Abort):
                self.left, self.ended[message.request_id] = [], message.finish_reason
        if self.left:
            delta = self.left.pop(0)
            plain = len(delta.token_ids) == 1 and not delta.finish_reason and delta.logprobs is None
            self.mailbox.send(b"", Tokens([], [delta.request_id], delta.token_ids) if plain else Tokens([delta]))


def fields_of(delta: TokenDelta) -> list[object]:
    return [delta.token_ids, delta.finish_reason, delta.stop_reason, delta.cached_tokens, delta.logprobs]


@pytest.fixture
def llm(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    facts = SimpleNamespace(sampling_defaults={})
    monkeypatch.setattr("pagegraph.runtime.llm.engine_of", lambda *_, **__: (SimpleNamespace(info=lambda: facts), None))
    return LLM(Config(model="tiny"), built=SimpleNamespace(folder=tokenizer_folder, vocab_size=350, max_model_len=128))


@pytest.mark.parametrize("logprobs", [None, 0])
def test_served_text_is_offline_text(http: FlaskClient, fake_engine, llm: LLM, logprobs: int | None) -> None:
    """Random tokens in deltas of several, as draft tokens bring them: text, reasons and the tokens that count."""
    rng = random.Random(0)
    known = llm.tokenizer.encode(TEXT)
    stopped = 0
    for _ in range(60):
        random_ids = rng.choices(range(5, llm.tokenizer.vocab_size), k=rng.randrange(6))
        ids = [*known[: rng.randrange(len(known))], *random_ids, rng.choice([1, *known])]
        prompt = rng.choice([[5], known[:13], [5, *known]])
        stop = rng.sample(STOPS, rng.randrange(3))
        named = rng.choice([[], [ids[-1]]])
        reason = "stop" if named or ids[-1] == 1 else "length"
        deltas = []
        while ids:
            part, ids = ids[: (size := rng.choice([1, 1, 2, 5]))], ids[size:]
            entries = None if logprobs is None else [TokenLogprob(token_id, -1.0, 1) for token_id in part]
            end = ("", -1) if ids else (reason, part[-1] if reason == "stop" else -1)
            deltas.append(TokenDelta("", part, *end, logprobs=entries))
        llm.engine = engine = Scripted(llm, deltas)
        params = SamplingParams(max_tokens=60, stop_token_ids=named, logprobs=logprobs)
        done = llm.generate([prompt], params, stop=stop)[0]
        streamed = "".join(llm.stream(prompt, params, stop=stop))
        fake_engine.script = lambda s: [TokenDelta(s.request_id, *fields_of(delta)) for delta in deltas]
        body = {"prompt": prompt, "max_tokens": 60, "stop": stop, "stop_token_ids": named, "logprobs": logprobs}
        answer = http.post("/v1/completions", json=body).json
        choice = answer["choices"][0]
        assert choice["text"] == done.text == streamed
        assert (choice["finish_reason"], choice["stop_reason"]) == (done.finish_reason, done.stop_reason)
        assert answer["usage"]["completion_tokens"] == len(done.token_ids)
        if logprobs is not None:
            assert [entry.token_id for entry in done.logprobs] == done.token_ids
            assert len(choice["logprobs"]["tokens"]) == len(done.token_ids)
        engine.turn()
        assert set(engine.ended.values()) <= {"stop"}
        stopped += isinstance(done.stop_reason, str)
    assert 10 < stopped < 50
