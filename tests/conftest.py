"""Fixtures shared by the tests: a tiny tokenizer, and an engine that speaks the protocol but runs no model."""

from __future__ import annotations

import json
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

# Workers share the cores: threads of one that wait by spinning would keep the others from theirs. Before torch is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
# The folder that an engine uses unless told: what one test or worker has compiled, none compiles again.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/pagegraph/inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", os.path.expanduser("~/.cache/pagegraph/triton"))

import pytest
import tokenizers
from hypothesis import HealthCheck, settings
from tokenizers import decoders, models, pre_tokenizers, trainers
from xdist.scheduler import LoadFileScheduling

from pagegraph.runtime.ipc.mailbox import Mailbox
from pagegraph.runtime.ipc.protocol import (
    Abort,
    Admitted,
    CacheChanged,
    EngineInfo,
    Failed,
    Hello,
    ListRecent,
    PromptLogprobs,
    Quotas,
    Recent,
    Submit,
    SubmitGroup,
    Timeline,
    TokenDelta,
    TokenLogprob,
    Tokens,
    WatchCache,
)
from pagegraph.runtime.pooling import Pooler

# One run of the tests is like another; `make fuzz` draws examples of its own.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REAL_MODEL = (
    "test_parity.py",
    "test_generation.py",
    "test_speculation.py",
    "test_structured_generation.py",
    "test_prompt_reads.py",
    "test_tool_generation.py",
)  # one worker builds it for all
LONGEST = (*REAL_MODEL, "test_serve.py", "test_triton_compile.py")  # started first, so that workers end together

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'critic' %}{{ raise_exception('no critics here') }}"
    "{% endif %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["hello world, this is a small text about stops and starts", "the end of the world is near 0123456789"] * 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


class Scheduling(LoadFileScheduling):
    """A file on one worker; those of the real model on the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "real model" if file.endswith(REAL_MODEL) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling | None:
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of about 350 tokens with a chat template, as a model folder holds it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class FakeEngine:
    """Answers each Submit with the deltas of `script(submit)`, over a real socket, on its own thread."""

    def __init__(self, address: str, vocab_size: int) -> None:
        self.address = address
        self.info = EngineInfo(
            model="tiny", device="cpu", dtype="float32", vocab_size=vocab_size, max_model_len=128,
            num_blocks=16, block_size=16, compile_state="compiled", pooler=Pooler(3, dimensions=[2]),
        )  # fmt: skip
        self.script: Callable[[Submit], list[TokenDelta | Failed]] = lambda submit: []
        self.submits: list[Submit] = []
        self.ended: list[tuple[str, Timeline]] = []  # with whose each was
        self.taken: list[bool] = []  # of each group: whether an engine before had admitted it
        self.aborted: dict[str, str] = {}  # finish reason by request id
        self.quotas: Quotas | None = None  # of the key of whoever asks
        self.cache = CacheChanged(cleared=True)  # what it tells who watches its prefix cache, once
        self.watched = 0  # times that it was asked to
        self.silent = False
        self.stalled = threading.Event()  # while it is set nothing is read
        self._stopping = False
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._running.wait(5)

    @property
    def aborts(self) -> list[str]:
        """Ids of aborted requests, in order."""
        return list(self.aborted)

    def stop(self) -> None:
        """Close the socket, as an engine that dies does."""
        self._stopping = True
        self._thread.join(5)

    def _run(self) -> None:
        # Without a limit: a script's answers come in one burst, which an engine's do not. At a limit the mailbox would
        # give up a web process that a busy machine keeps from reading for a moment.
        mailbox = Mailbox(self.address, wait_ms=10, send_high_water=0)
        self._running.set()
        while not self._stopping:
            if self.stalled.is_set():
                time.sleep(0.01)
                continue
            for client, message in mailbox.poll(block=True):
                self._answer(mailbox, client, message)
        mailbox.close()

    def _answer(self, mailbox: Mailbox, client: bytes, message: SubmitGroup | Abort | Hello) -> None:
        if self.silent:
            return
        if isinstance(message, Hello):
            mailbox.send(client, self.info)
        elif isinstance(message, ListRecent):
            mailbox.send(client, Recent(message.asker, [one for whose, one in self.ended if whose == message.asker]))
        elif isinstance(message, WatchCache):
            mailbox.send(client, self.cache)
            self.watched += 1
        elif isinstance(message, Abort):
            assert message.request_id not in self.aborted
            self.aborted[message.request_id] = message.finish_reason
        else:
            self.taken.append(message.taken)
            for index, submit in enumerate(message.each()):
                self.submits.append(submit)
                answers = self.script(submit)
                if index == 0 and not (answers and isinstance(answers[0], Failed)):
                    mailbox.send(client, Admitted(submit.request_id, self.quotas))
                for answer in answers:
                    mailbox.send(client, answer if isinstance(answer, Failed) else Tokens([answer]))
                if answers:
                    self._end(mailbox, client, submit, len(answers))

    def _end(self, mailbox: Mailbox, client: bytes, submit: Submit, generated: int) -> None:
        """It waited a second, its prompt took two, and its answer four; a moment ago."""
        now = time.monotonic()
        one = Timeline(
            label=submit.label, trace=submit.trace, prompt_tokens=len(submit.token_ids), cached_tokens=2, cache_miss="new",
            generated_tokens=generated, finish_reason="stop", arrival=now - 7, launched=now - 6, first_token=now - 4,
            ended=now,
        )  # fmt: skip
        self.ended.append((submit.asker.name, one))
        if submit.trace:
            mailbox.send(client, one)

    @staticmethod
    def embedding(submit: Submit) -> bytes:
        """Of the prompt's length, its first and its last token."""
        ids = submit.token_ids
        return array("f", [len(ids), ids[0] / 3, ids[-1] / 3][: submit.params.pooling.dimensions]).tobytes()

    @staticmethod
    def prompt_deltas(submit: Submit) -> list[TokenDelta]:
        """The prompt's log-probabilities in two parts: token at has -at/8 and rank 2, behind ids 7, 8, ... with -1/16 each."""
        wanted, size = submit.params.prompt_logprobs, len(submit.token_ids)
        if wanted is None:
            return []
        parts = []
        for first, end in ((1, size // 2), (max(size // 2, 1), size)):
            places = range(first, end)
            tops = range(7, 7 + wanted)
            parts.append(
                PromptLogprobs(
                    first,
                    array("f", [-at / 8 for at in places]).tobytes(),
                    array("i", [2] * len(places)).tobytes(),
                    array("i", [*tops] * len(places)).tobytes(),
                    array("f", [-1 / 16 for _ in tops] * len(places)).tobytes(),
                )
            )
        return [TokenDelta(submit.request_id, [], prompt_logprobs=part) for part in parts if len(part)]

    @staticmethod
    def deltas(submit: Submit, token_ids: list[int], finish: str = "stop", stop_id: int = -1) -> list[TokenDelta]:
        """One delta a token, cut at max_tokens, with made-up log-probabilities when they were asked for."""
        count = min(len(token_ids), submit.params.max_tokens)
        reason = finish if count == len(token_ids) else "length"
        top = submit.params.logprobs
        deltas = FakeEngine.prompt_deltas(submit)
        if submit.params.pooling is not None:
            deltas.append(TokenDelta(submit.request_id, [], "stop", embedding=FakeEngine.embedding(submit)))
        elif count == 0:
            deltas.append(TokenDelta(submit.request_id, [], "length"))
        for index, token_id in enumerate(token_ids[:count]):
            ids = [token_id, *(i for i in range(7, 30) if i != token_id)][: top or 0]
            entry = TokenLogprob(token_id, -0.5, 1, ids, [-0.5 - rank for rank in range(len(ids))])
            last = index == count - 1
            deltas.append(
                TokenDelta(
                    request_id=submit.request_id,
                    token_ids=[token_id],
                    finish_reason=reason if last else "",
                    stop_reason=stop_id if last and reason == "stop" else -1,
                    cached_tokens=2,
                    logprobs=None if top is None else [entry],
                )
            )
        return deltas


@pytest.fixture
def fake_engine(tmp_path: Path, tokenizer_folder: Path) -> Iterator[FakeEngine]:
    """A fake engine on a socket of its own that answers every request with " hello world"."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    engine = FakeEngine(f"ipc://{tmp_path / 'engine'}", backend.get_vocab_size())
    reply = [*backend.encode("hello world").ids, backend.token_to_id("<|end|>")]
    engine.script = lambda submit: list(FakeEngine.deltas(submit, reply, stop_id=reply[-1]))
    yield engine
    engine.stop()
