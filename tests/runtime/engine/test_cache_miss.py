"""Why a prompt's cache hit was not longer, as its tokens tell."""

from __future__ import annotations

import pytest

from pagegraph.runtime.ipc.protocol import SamplingParams, Submit, Tokens
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.sampling_params import PoolingParams
from pagegraph.runtime.scheduler.block_tables import CACHE_MISSES
from tests.runtime.engine.test_engine import Harness
from tests.runtime.fake_step import BLOCK


class Missing(Harness):
    """Keeps (cached tokens, why no more) of each request."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.misses: dict[str, tuple[int, str]] = {}
        send = self.mailbox.send

        def keep(client, message):
            for delta in message.each() if isinstance(message, Tokens) else ():
                if delta.finish_reason:
                    self.misses[delta.request_id] = (delta.cached_tokens, delta.cache_miss)
                    assert delta.cache_miss in ("", *CACHE_MISSES)
            send(client, message)

        self.mailbox.send = keep

    def ask(self, name: str, prompt: list[int], salt: str = "", **params) -> None:
        asked = SamplingParams(**{"max_tokens": 1, "ignore_eos": True} | params)
        self.mailbox.put(Submit(request_id=name, token_ids=prompt, params=asked, cache_salt=salt))


def prompt_of(blocks: int, seed: int = 1) -> list[int]:
    """So many blocks and a token."""
    return [(seed + at * at) % 6 + 1 for at in range(blocks * BLOCK + 1)]


def test_a_prompt_that_comes_again_lacks_nothing_and_a_new_one_is_new() -> None:
    harness, prompt = Missing(), prompt_of(5)
    for name, asked, salt in (
        ("first", prompt, ""),
        ("again", prompt, ""),
        ("longer", [*prompt, *[2] * BLOCK], ""),
        ("other end", [*prompt[: 3 * BLOCK], *[2] * (2 * BLOCK + 1)], ""),
        ("other salt", prompt, "salt"),
        ("short", [1] * BLOCK, ""),
    ):
        harness.ask(name, asked, salt)
        harness.run()
    assert harness.misses == {
        "first": (0, "new"),
        "again": (5 * BLOCK, ""),
        "longer": (5 * BLOCK, "new"),
        "other end": (3 * BLOCK, "new"),
        "other salt": (0, "new"),
        "short": (0, ""),  # its last token is computed, and it has one block
    }


def test_what_gave_way_to_others_is_said_to_be_evicted_to_its_own_salt_alone() -> None:
    harness, prompt = Missing(num_blocks=14), prompt_of(6)
    harness.ask("first", prompt, "mine")
    harness.run()
    for seed in (2, 3):
        harness.ask(f"other {seed}", prompt_of(6, seed))
        harness.run()
    harness.ask("other salt", prompt, "theirs")
    harness.run()
    harness.ask("again", prompt, "mine")
    harness.run()
    assert harness.misses["other salt"] == (0, "new") and harness.misses["again"][1] == "evicted"
    harness.ask("once more", prompt, "mine")
    harness.run()
    assert harness.misses["once more"] == (6 * BLOCK, "")


def test_a_twin_that_comes_while_the_first_is_computed() -> None:
    harness, prompt = Missing(budget=12), prompt_of(8)
    harness.ask("first", prompt)
    harness.turn()
    harness.ask("twin", [*prompt[: 6 * BLOCK], 1, 1])
    harness.run()
    cached, why = harness.misses["twin"]
    assert why == "in_flight" and 0 < cached < 6 * BLOCK


@pytest.mark.parametrize(
    "params", [{"prompt_logprobs": 1}, {"pooling": PoolingParams(), "max_tokens": 0}], ids=["logprobs", "embedding"]
)
def test_what_has_to_be_computed_is_skipped(params: dict) -> None:
    harness, prompt = Missing(pooler=Pooler(3, pooling="mean")), prompt_of(3)
    harness.ask("first", prompt)
    harness.run()
    harness.ask("reads", prompt, **params)
    harness.run()
    assert harness.misses["reads"] == (0, "skipped")


def test_without_a_prefix_cache_it_is_disabled() -> None:
    harness = Missing(caching=False)
    harness.ask("one", prompt_of(3))
    harness.run()
    assert harness.misses == {"one": (0, "disabled")}
