"""What the engine tells of sequences that have ended. A turn lasts a second."""

from __future__ import annotations

import math

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.ipc.protocol import Abort, ListRecent, Member, Recent, SamplingParams, SubmitGroup, Timeline
from tests.runtime.engine.test_engine import Harness


class Followed(Harness):
    """Keeps timelines, and what was said to be recent."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.timelines: list[Timeline] = []
        self.recent: list[Recent] = []
        send = self.mailbox.send

        def keep(client, message):
            kept = {Timeline: self.timelines, Recent: self.recent}.get(type(message))
            send(client, message) if kept is None else kept.append(message)

        self.mailbox.send = keep

    def ask(self, name: str, asker: str = "", max_tokens: int = 4, trace: str = "a trace") -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.mailbox.put(
            SubmitGroup(
                prompts=[[1, 2, 3]],
                members=[Member(name, 0, params)],
                label=f"label of {name}",
                trace=trace,
                asker=Asker(asker),
            )
        )


def test_each_end_of_a_traced_sequence_is_told_with_its_times() -> None:
    harness = Followed(max_num_seqs=1)
    harness.ask("served")
    harness.ask("left", max_tokens=30)
    harness.ask("left in the queue")
    harness.ask("untraced", trace="")
    harness.turn()
    harness.mailbox.put(Abort("left in the queue"))
    while "served" not in harness.ended:
        harness.turn()
    for _ in range(5):
        harness.turn()
    harness.mailbox.put(Abort("left"))
    harness.run()
    waiting, served, left = harness.timelines
    assert (served.label, served.trace, served.finish_reason) == ("label of served", "a trace", "length")
    assert (served.prompt_tokens, served.generated_tokens) == (3, 4)
    assert served.arrival <= served.launched < served.first_token < served.ended
    assert served.ended - served.first_token == 3  # a token a turn
    assert left.finish_reason == "abort" and left.launched >= served.first_token and left.generated_tokens >= 3
    assert waiting.label == "label of left in the queue" and math.isnan(waiting.launched)


def test_an_asker_is_told_of_its_own_alone() -> None:
    harness = Followed()
    for number in range(300):
        harness.ask(f"{number}", asker="ab"[number % 2], trace="", max_tokens=1)
        harness.run()
    for asker in "abc":
        harness.mailbox.put(ListRecent(asker))
    harness.turn()
    a, b, c = harness.recent
    assert [one.label for one in a.timelines] == [f"label of {number}" for number in range(100, 300, 2)]
    assert len(b.timelines) == 100 and (b.asker, c) == ("b", Recent("c", [])) and not harness.timelines


def test_it_is_told_why_no_more_of_a_prompt_was_cached() -> None:
    harness = Followed(budget=8)
    for name in ("first", "second"):
        harness.mailbox.put(
            SubmitGroup(
                prompts=[[1, 2, 3, 4, 5, 6, 8, 9, 10]],
                members=[Member(name, 0, SamplingParams(max_tokens=1))],
                trace="a",
            )
        )
        harness.run()
    first, second = harness.timelines
    assert (first.cached_tokens, first.cache_miss) == (0, "new")
    assert second.cached_tokens > 0 and second.cache_miss == ""
