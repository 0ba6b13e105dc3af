"""A stored forward: another process calls the same graph without Dynamo; one that does not fit is compiled anew."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pagegraph.compiler.inductor import stored_forward
from pagegraph.compiler.inductor.compile import built_cpp, compile_forward
from pagegraph.compiler.inductor.guard_free import Forward, NotStorable
from pagegraph.compiler.inductor.stored_forward import ForwardStore
from pagegraph.compiler.model.paged import Forwarded
from pagegraph.compiler.start_cache import StartCache
from tests.paths import ROOT


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 3), requires_grad=False)
        self.register_buffer("shift", torch.randn(3))
        self.tied = self.weight

    def forward(self, ids: torch.Tensor, table: torch.Tensor, caches: list[torch.Tensor]) -> Forwarded:
        rows = self.weight[ids] * table.shape[1] + table.sum() + caches[0] + self.shift
        caches[1].add_(1.0)
        return rows * 2 if ids.shape[0] > 6 else rows - self.tied[0], rows


def inputs_of(size: int, width: int, caches: list[torch.Tensor]) -> tuple:
    ids, table = torch.arange(size), torch.arange(2.0 * width).view(2, width)
    torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(table, 1)
    return ids, table, caches


def caches_of() -> list[torch.Tensor]:
    return [torch.full((3,), 5.0), torch.zeros(3)]


def store_of(folder: Path, any_blocks: bool = False) -> ForwardStore:
    return ForwardStore(StartCache(folder, "key"), "forward", any_blocks)


def run_here(folder: Path) -> dict:
    """Take the forward from the folder or compile it, run three sizes, say what came of it."""
    toy, caches, store = Toy(), caches_of(), store_of(folder)
    forward = compile_forward(toy)
    if store.restore(forward, [caches]):
        forward._traced = None
    outs = []
    with torch.inference_mode():
        for size, width in ((3, 4), (5, 7), (2, 9)):
            outs.append([one.tolist() for one in forward(*inputs_of(size, width, caches))])
    if forward._traced is not None:
        store.store(forward)
    return dict(restored=forward._traced is None, outs=outs, cache=caches[1].tolist())


def in_a_process(folder: Path) -> dict:
    code = (
        "import json; from pathlib import Path; from tests.compiler.inductor.test_stored_forward import run_here;"
        f"print(json.dumps(run_here(Path({str(folder)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_another_process_gives_the_same_without_dynamo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = in_a_process(tmp_path), in_a_process(tmp_path)
    assert not first["restored"] and second["restored"]
    assert first["outs"] == second["outs"] and first["cache"] == second["cache"] == [3.0] * 3
    toy, caches = Toy(), caches_of()
    with torch.inference_mode():
        for (size, width), outs in zip(((3, 4), (5, 7), (2, 9)), first["outs"]):
            for expected, got in zip(toy(*inputs_of(size, width, caches)), outs):
                assert torch.allclose(expected, torch.tensor(got), rtol=1e-5, atol=1e-5)
    path = tmp_path / "starts" / "key" / "forward"
    path.write_bytes(path.read_bytes()[:-7])
    torch._dynamo.reset()
    third = run_here(tmp_path)
    assert not third["restored"] and "is broken" in caplog.text and third["outs"] == first["outs"]
    assert run_here(tmp_path) == second


class Plain(Forward):
    """Graphs that run as they are traced."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        super().__init__(model, lambda module, traced: module.forward)


def called(model: nn.Module) -> Plain:
    forward = Plain(model)
    with torch.inference_mode():
        forward(*inputs_of(3, 4, caches_of()))
    return forward


@pytest.mark.parametrize("stored", [b"no pickle", pickle.dumps(7), None])
def test_a_whole_file_of_other_content_is_no_forward(
    stored: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    StartCache(tmp_path, "key").write("forward", stored or pickle.dumps((built_cpp(), [7])))
    forward = Plain(Toy())
    assert not store_of(tmp_path).restore(forward, [caches_of()])
    assert "compiling anew" in caplog.text and not forward._graphs


def test_graphs_that_call_other_cpp_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StartCache(tmp_path, "key").write("forward", pickle.dumps(("other", [])))
    assert not store_of(tmp_path).restore(Plain(Toy()), [caches_of()])
    monkeypatch.setattr(stored_forward, "built_cpp", lambda: "other")
    assert store_of(tmp_path).restore(Plain(Toy()), [caches_of()])


def test_a_graph_that_pytorch_does_not_serialise_is_told_and_not_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store_of(tmp_path).store(called(Toy()))
    assert "cannot be stored" in caplog.text and not store_of(tmp_path).is_filled


def test_a_tensor_without_a_name_is_not_storable() -> None:
    toy = Toy()
    del toy.shift
    toy.shift = torch.ones(3)  # neither parameter nor buffer
    with pytest.raises(NotStorable, match="is no parameter or buffer"):
        called(toy).stored(lambda graph: b"", any_blocks=False)


def test_graphs_that_read_their_caches_serve_no_other_number_of_blocks() -> None:
    forward = called(Toy())
    assert forward.stored(lambda graph: b"", any_blocks=False)
    with pytest.raises(NotStorable, match="sizes of the KV caches"):
        forward.stored(lambda graph: b"", any_blocks=True)
