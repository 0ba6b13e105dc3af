"""Lines of keys and their limits."""

from __future__ import annotations

import pytest

from pagegraph.runtime.askers import Asker, askers, parse_keys, read_line


@pytest.mark.parametrize(
    ("line", "key", "limits"),
    [
        ("sk-1", "sk-1", {}),
        ("a key of words", "a key of words", {}),
        ("YWJj==", "YWJj==", {}),
        ("requests_per_minute=1", "requests_per_minute=1", {}),  # the first word is a key, whatever it looks like
        ("sk-1 requests_per_minute=60", "sk-1", {"requests_per_minute": 60}),
        ("a key  tokens_per_minute=10k max_parallel_requests=2", "a key", {"tokens_per_minute": 10_000, "max_parallel_requests": 2}),
    ],
)  # fmt: skip
def test_a_line_is_a_key_and_its_limits(line: str, key: str, limits: dict[str, int]) -> None:
    assert read_line(line) == (key, limits)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s3cret request_per_minute=60", "no limit; a limit is one of requests_per_minute, tokens_per_minute"),
        ("s3cret requests_per_minute=1 requests_per_minute=2", "each once"),
        ("s3cret requests_per_minute=0", "requests_per_minute=0, which is too small: it must be at least 1"),
        ("s3cret requests_per_minute=many", "is not a whole number"),
        ("s3cret bmFtZQ==", "a word after it that is no limit"),
    ],
)
def test_what_is_no_limit_is_refused_without_the_key(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_keys(line)
    assert "s3cret" not in str(refused.value)


def test_a_key_is_given_once_whatever_its_limits() -> None:
    with pytest.raises(ValueError, match="holds a key twice"):
        parse_keys(["a requests_per_minute=1", "a requests_per_minute=2"])


def test_a_line_comes_before_what_holds_for_each() -> None:
    of_each = {"requests_per_minute": 60, "max_parallel_requests": 4}
    found = askers("a\nb requests_per_minute=5 tokens_per_minute=7", of_each)
    a, b = found["a"], found["b"]
    assert a == Asker(a.name, 60, None, 4) and b == Asker(b.name, 5, 7, 4)
    assert a.name and b.name and a.name != b.name and "a" != a.name
    assert askers("only", of_each) == {"only": Asker("", 60, None, 4)}
    assert a.is_limited and not Asker("x").is_limited
