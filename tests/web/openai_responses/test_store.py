"""The store of responses: its bounds, what goes first, several processes, and that nobody else may read it."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from pagegraph.web.openai_responses import store as store_module
from pagegraph.web.openai_responses.store import MAX_AGE_S, ResponseStore, Stored


def response(number: int, text: str = "") -> Stored:
    item = {"id": f"msg_{number}", "type": "message", "content": text}
    return Stored({"id": f"resp_{number}", "status": "completed", "output": [item]}, [{"id": f"in_{number}"}])


def noise(size: int) -> str:
    return os.urandom(size // 2).hex()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.sqlite"


def test_what_is_put_comes_back(path: Path) -> None:
    store = ResponseStore(path, 1 << 20)
    first = response(1, "ü")
    assert store.put(first)
    assert store.get("resp_1") == first and store.item("msg_1") == first.response["output"][0]
    assert store.get("resp_2") is None and store.item("in_1") is None
    second = Stored({"id": "resp_2", "status": "completed", "output": []}, [{"id": "in_2"}], first.conversation)
    store.put(second)
    assert [item["id"] for item in store.get("resp_2").conversation] == ["in_1", "msg_1", "in_2"]
    assert store.delete("resp_1") and not store.delete("resp_1")
    assert store.get("resp_1") is None and store.item("msg_1") is None and store.get("resp_2") == second


def test_the_oldest_go_when_it_is_full(path: Path) -> None:
    now = [0.0]
    store = ResponseStore(path, 100_000, clock=lambda: now[0])
    for number in range(40):
        now[0] += 1
        assert store.put(response(number, noise(10_000)))
    kept = [number for number in range(40) if store.get(f"resp_{number}")]
    assert kept == list(range(40 - len(kept), 40)) and 3 <= len(kept) <= 9
    assert [number for number in range(40) if store.item(f"msg_{number}")] == kept
    assert not store.put(response(99, noise(200_000))) and store.get("resp_99") is None
    assert store.get(f"resp_{kept[-1]}")  # what can never fit pushes nobody out
    (size,) = store._database.execute("SELECT SUM(size) FROM responses").fetchone()
    assert size <= 100_000


def test_what_is_too_old_goes(path: Path) -> None:
    now = [1000.0]
    store = ResponseStore(path, 1 << 20, clock=lambda: now[0])
    store.put(response(0))
    store.delete("resp_0")
    store.put(response(1))
    assert store.is_closed("resp_0")
    now[0] += MAX_AGE_S + 1
    assert store.get("resp_1") is None and store.item("msg_1") is None
    store.put(response(2))
    for table in ("responses", "items"):
        assert store._database.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (1,)
    assert not store.is_closed("resp_0")


def test_a_closed_response_is_not_replaced(path: Path) -> None:
    store = ResponseStore(path, 1 << 20)
    assert store.put(response(1)) and store.put(response(1, "more"))
    cancelled = response(1, "cancelled")
    assert not store.is_closed("resp_1")
    assert store.close_with(cancelled) and store.is_closed("resp_1")
    assert not store.put(response(1, "late")) and store.get("resp_1") == cancelled
    store.put(response(2))
    store.delete("resp_2")
    assert not store.put(response(2)) and store.get("resp_2") is None


def test_what_is_remembered_of_deleted_ones_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAX_CLOSED", 5)
    store = ResponseStore(path, 1 << 20)
    for number in range(20):
        assert not store.delete(f"nobody's {number}" * 1000) and not store.is_closed(f"nobody's {number}" * 1000)
        store.put(response(number))
        assert store.delete(f"resp_{number}") and store.is_closed(f"resp_{number}")
    (count,) = store._database.execute("SELECT COUNT(*) FROM closed").fetchone()
    assert count == 5


def test_the_file_does_not_grow_with_what_went_through(path: Path) -> None:
    store = ResponseStore(path, 200_000)
    for number in range(600):
        assert store.put(response(number, noise(40_000)))
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 8_000_000  # of 12 MB, and sqlite's own log


def test_only_its_owner_may_read_it(path: Path) -> None:
    store = ResponseStore(path, 1 << 20)
    store.put(response(1, noise(100_000)))
    files = list(path.parent.iterdir())
    assert len(files) > 1
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_of_size_nothing_it_keeps_nothing() -> None:
    store = ResponseStore(None, 0)
    assert not store.keeps and not store.put(response(1)) and store.get("resp_1") is None


def _write(path: Path, first: int, done: Any) -> None:
    store = ResponseStore(path, 1 << 20)
    done.put([store.put(response(number)) for number in range(first, first + 20)])


def test_processes_find_each_others(path: Path) -> None:
    store = ResponseStore(path, 1 << 20)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    processes = [context.Process(target=_write, args=(path, first, done)) for first in (0, 100)]
    for process in processes:
        process.start()
    assert [done.get(timeout=60), done.get(timeout=60)] == [[True] * 20] * 2
    for process in processes:
        process.join(10)
    assert all(store.get(f"resp_{number}") for first in (0, 100) for number in range(first, first + 20))
    stored = store.get("resp_0")
    assert stored.owner in {process.pid for process in processes} and not stored.owner_lives
    assert response(1).owner_lives


def test_threads_share_one(path: Path) -> None:
    store = ResponseStore(path, 50_000)
    failures = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 30):
                store.put(response(number, noise(2000)))
                store.get(f"resp_{number}")
                store.is_closed(f"resp_{number}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_a_full_disk_is_no_fault_of_the_answer(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResponseStore(path, 1 << 20)
    store._database.execute("PRAGMA max_page_count = 12")
    assert not store.put(response(1, noise(200_000)))
    assert "not stored" in caplog.text and store.put(response(2)) and store.get("resp_2")
