"""Which GPUs the engines of a server see, and that too few are refused."""

from __future__ import annotations

import pytest

from pagegraph.runtime.config import Config
from pagegraph.runtime.server import devices
from pagegraph.runtime.server.devices import VISIBLE, require_one_each, variables_of
from pagegraph.runtime.server.listen import Unserved


@pytest.mark.parametrize(
    "seen, size, expected",
    [
        (None, 1, ["0", "1"]), (None, 2, ["0,1", "2,3"]), ("5, GPU-abc", 1, ["5", "GPU-abc"]), ("7,6,5,4", 2, ["7,6", "5,4"]),
        ("3", 1, ["3", ""]),
    ],
)  # fmt: skip
def test_each_engine_sees_its_own(seen: str | None, size: int, expected: list[str]) -> None:
    environment = {} if seen is None else {VISIBLE: seen}
    assert [variables_of(rank, size, environment)[VISIBLE] for rank in range(2)] == expected


@pytest.mark.parametrize("found, size, works", [(0, 1, True), (1, 1, False), (2, 1, True), (3, 2, False), (4, 2, True)])
def test_gpus_for_some_of_the_engines_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: int, size: int, works: bool
) -> None:
    monkeypatch.setattr(devices, "count", lambda: found)
    config = Config(model="m", data_parallel_size=2, tensor_parallel_size=size)
    if works:
        require_one_each(config)
    else:
        with pytest.raises(Unserved, match=f"for each engine, and there are {found}; set it to 1, or device to cpu"):
            require_one_each(config)
    require_one_each(Config(model="m", data_parallel_size=2, device="cpu"))
