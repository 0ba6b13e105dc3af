"""A function called on a thread whose stack is as deep as the recursion of a grammar's compiler may go.

llguidance compiles rules and schemas by recursion, a level for each that refers to another, and a thread's stack that
runs over ends the process. Its matchers do not recurse. Knows no grammars.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

# Address space; only what is touched takes memory. The longest texts that are compiled (`structured_output.MAX_CHARS`),
# all parentheses and references, take 150 MB.
STACK_BYTES = 512 << 20

P = ParamSpec("P")
T = TypeVar("T")

_starts = threading.Lock()  # the size holds for whatever thread starts next


def on_deep_stack(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function returns or raises."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function(*args, **kwargs))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=call, name="deep-stack")
    with _starts:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return result.result()
