"""Which engine a request goes to: what is cached where, who has how much to do, and turns where all are equal."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import CacheChanged
from pagegraph.runtime.ipc.routing import REQUEST_TOKENS, Engine, Route, choose
from pagegraph.runtime.scheduler.block_hashes import BlockHashes, new_key
from pagegraph.runtime.scheduler.block_pool import BlockPool

BLOCK = 16
HASHES = BlockHashes(BLOCK, bytes(32))


@dataclass(eq=False)
class Request:
    route: Route
    admitted: bool = False
    begun: bool = False
    num_open: int = 1


def route(prompt: list[int], salt: str = "", sequences: int = 1) -> Route:
    return Route.of([prompt], sequences, salt, HASHES)


@dataclass
class Cluster:
    """Engines that compute what they are given at once, and tell of it."""

    engines: list[Engine]
    pools: list[set[bytes]] = field(default_factory=list)

    def send(self, prompt: list[int], among: list[int], salt: str = "") -> int:
        one = Request(route(prompt, salt))
        number = choose(self.engines, one.route, among)
        engine = self.engines[number]
        engine.place(one)
        one.admitted = one.begun = True
        stored = [digest for chain in one.route.chains for digest in chain]
        one.num_open = 0
        engine.learn(CacheChanged(stored=stored))
        return number


def test_the_chooser_has_the_hashes_that_the_pool_finds_blocks_by() -> None:
    key, tokens = new_key(), list(range(50))
    pool, hashes = BlockPool(8, BLOCK, key=key), BlockHashes(BLOCK, key)
    (chain,) = Route.of([tokens], 1, "salt", hashes).chains
    assert list(chain) == pool.hash_blocks(pool.root_hash("salt"), tokens[:48])
    assert Route.of([tokens[:48]], 1, "salt", hashes).chains == (chain[:2],)  # the last token is always computed
    assert chain[0] not in Route.of([tokens], 1, "", hashes).chains[0]


@given(
    loads=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10_000)), min_size=1, max_size=6),
    data=st.data(),
)
def test_never_one_that_is_not_there_and_none_with_more_to_do_than_its_prefix_is_worth(
    loads: list[tuple[int, int]], data: st.DataObject
) -> None:
    wanted = route(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=200)))
    (chain,) = wanted.chains
    engines = [Engine() for _ in loads]
    held = [data.draw(st.integers(0, len(chain))) for _ in loads]
    for engine, (requests, tokens), blocks in zip(engines, loads, held):
        engine.learn(CacheChanged(True, list(chain[:blocks]), [], requests, tokens))
    among = data.draw(st.lists(st.sampled_from(range(len(loads))), min_size=1, unique=True))
    chosen = choose(engines, wanted, among)
    assert chosen in among
    work = [tokens + REQUEST_TOKENS * requests for requests, tokens in loads]
    for other in among:
        assert work[chosen] - work[other] <= BLOCK * (held[chosen] - held[other])


@given(num_engines=st.integers(1, 5), lengths=st.lists(st.integers(1, 300), max_size=40))
def test_prompts_that_share_nothing_are_balanced(num_engines: int, lengths: list[int]) -> None:
    """None is finished meanwhile: no engine has more than the largest request over another. Finished at once: turns."""
    engines = [Engine() for _ in range(num_engines)]
    work = [0] * num_engines
    largest = 0
    for at, length in enumerate(lengths):
        one = Request(route([at, *range(1000, 1000 + length)]))
        number = choose(engines, one.route, range(num_engines))
        engines[number].place(one)
        work[number] += one.route.num_tokens + REQUEST_TOKENS
        largest = max(largest, one.route.num_tokens + REQUEST_TOKENS)
        assert max(work) - min(work) <= largest
    cluster = Cluster([Engine() for _ in range(num_engines)])
    counts = [0] * num_engines
    for at in range(len(lengths)):
        counts[cluster.send([at, *range(1000, 1040)], list(range(num_engines)))] += 1
    assert max(counts) - min(counts) <= 1


@given(turns=st.integers(2, 8), conversations=st.integers(1, 6), num_engines=st.integers(2, 4))
def test_a_conversation_stays_where_its_turns_are_cached(turns: int, conversations: int, num_engines: int) -> None:
    cluster, among = Cluster([Engine() for _ in range(num_engines)]), list(range(num_engines))
    homes: dict[int, int] = {}
    for turn in range(1, turns + 1):
        for one in range(conversations):
            prompt = [one, *range(100, 100 + 40 * turn)]
            assert homes.setdefault(one, number := cluster.send(prompt, among)) == number
    counts = [list(homes.values()).count(number) for number in among]
    assert max(counts) - min(counts) <= 1


def test_a_salt_shares_nothing() -> None:
    cluster, prompt = Cluster([Engine(), Engine()]), list(range(200))
    assert [cluster.send(prompt, [0, 1], salt) for salt in ("a", "b", "a", "b")] == [0, 1, 0, 1]


def test_a_prefix_that_is_on_its_way_counts_until_its_request_ends() -> None:
    engines, prompt = [Engine(), Engine()], list(range(400))
    first, second = Request(route(prompt)), Request(route(prompt))
    assert choose(engines, first.route, [0, 1]) == 0
    engines[0].place(first)
    first.admitted = True
    engines[0].learn(CacheChanged(num_requests=1, num_prompt_tokens=100))  # most of it is computed, none of it told
    assert choose(engines, second.route, [0, 1]) == 0
    first.num_open = 0
    engines[0].forget_ended()
    assert engines[0].cached_tokens(second.route) == 0 and not engines[0].coming


def test_what_was_placed_is_counted_once() -> None:
    engine = Engine()
    one, other = Request(route([1, 2, 3])), Request(route([4, 5]))
    engine.place(one)
    engine.place(other)
    assert engine.load() == (2, 5)
    one.admitted = True
    engine.learn(CacheChanged(num_requests=7, num_prompt_tokens=30))
    assert engine.load() == (8, 32)
    other.num_open = 0
    assert engine.load() == (7, 30)


def test_what_gave_way_is_forgotten() -> None:
    engine, wanted = Engine(), route(list(range(100)))
    (chain,) = wanted.chains
    engine.learn(CacheChanged(True, list(chain)))
    assert engine.cached_tokens(wanted) == 96
    engine.learn(CacheChanged(removed=[chain[2]]))
    assert engine.cached_tokens(wanted) == 32
    engine.learn(CacheChanged(cleared=True, stored=[chain[0]]))
    assert engine.cached_tokens(wanted) == 16
