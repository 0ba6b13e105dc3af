"""`runtime explain`: text, JSON and picture, what is refused, and a measured run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result

from pagegraph.runtime.cli import main
from tests.compiler.architectures import tiny_config

SMALL = ("--load-format", "dummy", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--kv-cache-memory", "1MiB")
GPU = ("--load-format", "dummy", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")

pytestmark = pytest.mark.usefixtures("no_other_models")


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


def test_the_text_fits_and_names_every_part(folder: str, tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    result = explain(folder, *GPU, "--gpu", "h200", "--context", "64", "--svg", str(picture))
    assert result.exit_code == 0, result.output
    for words in ("MEMORY", "SEQUENCES", "STEPS", "PASSES", "fuse_rope", "all weights", "CUDA graphs", "NVIDIA H200"):
        assert words in result.stdout, words
    assert max(map(len, result.stdout.splitlines())) <= 100
    told = " ".join(result.stdout.split())
    assert "bound by floor predicted tokens/s" in told and "by times fitted on an NVIDIA H200." in told
    drawn = ElementTree.fromstring(picture.read_text())
    shown = "".join(drawn.itertext())
    assert "NVIDIA H200" in shown and "KV blocks" in shown and "prompts" in shown and "as predicted: dashed" in shown
    dashed = [one for one in drawn.iter() if one.tag.endswith("polyline") and "stroke-dasharray" in one.attrib]
    assert len(dashed) == 2


def test_a_step_is_predicted_to_take_longer_than_its_floor(folder: str) -> None:
    found = json.loads(explain(folder, *GPU, "--gpu", "h200", "--context", "64", "--json").stdout)
    assert found["predicted_for"] == "NVIDIA H200" and found["unfitted"] == []
    assert all(one["predicted_ms"] == 1e3 * one["predicted_s"] > one["floor_ms"] for one in found["steps"])


@pytest.mark.parametrize(
    "more, reasons",
    [
        (("--gpu", "l4"), "an estimate for NVIDIA L4."),
        (("--gpu", "h200", "--quantization", "int8"), "an estimate for quantised weights."),
        (
            ("--gpu", "h100", "--kv-cache-dtype", "fp8"),
            "an estimate for NVIDIA H100 SXM and a KV cache in float8_e4m3fn.",
        ),
    ],
)
def test_what_was_not_fitted_is_an_estimate(more: tuple[str, ...], reasons: str, folder: str) -> None:
    result = explain(folder, *GPU, "--dtype", "bfloat16", "--context", "64", *more)
    assert result.exit_code == 0 and reasons in " ".join(result.stdout.split()), result.output


def test_nothing_is_predicted_without_the_graph_or_for_a_cpu(folder: str) -> None:
    for asked in ((*GPU, "--gpu", "h200", "--quick"), (*SMALL, "--device", "cpu")):
        told = explain(folder, *asked, "--context", "64")
        assert told.exit_code == 0 and "STEPS take at least" in told.stdout and "redicted" not in told.stdout


def test_json_has_the_same_figures(folder: str) -> None:
    result = explain(folder, *GPU, "--gpu", "l4", "--quick", "--json", "--context", "64")
    found = json.loads(result.stdout)
    assert found["memory"]["num_blocks"] * found["memory"]["block_bytes"] == found["memory"]["blocks"]
    assert found["passes"] is None and found["sequences"].keys() == {"256"}
    step = found["steps"][0]
    assert (
        step["tokens"] == 2 and step["floor_ms"] == pytest.approx(1e3 * step["floor_s"]) and step["bound"] == "memory"
    )


def test_a_mixture_is_planned_in_float32_too(tmp_path: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    result = explain(str(tmp_path), *SMALL, "--device", "cpu", "--dtype", "float32", "--quick", "--context", "64")
    assert result.exit_code == 0, result.output


def test_every_size_is_every_capture_size(folder: str) -> None:
    few, every = (
        json.loads(explain(folder, *GPU, "--gpu", "l4", "--quick", "--json", *more).stdout)["steps"]
        for more in ((), ("--all-sizes",))
    )
    assert [(one["tokens"], one["seqs"]) for one in every] == [
        (2, 2),
        (4, 4),
        (8, 8),
        (16, 8),
        (32, 8),
        (48, 8),
        (64, 8),
    ]
    assert all(one in every for one in few)


def test_gpus_that_share_a_model_are_said_not_to_be_measured(folder: str) -> None:
    result = explain(folder, *GPU, "--gpu", "h100", "--tensor-parallel-size", "2", "--quick")
    assert result.exit_code == 0 and "Several GPUs have not been measured yet" in " ".join(result.stdout.split())
    assert "2 x NVIDIA H100" in result.stdout and "exchange over their link" in result.stdout


@pytest.mark.parametrize("measured", ["int8", "none"])
def test_measured_stands_beside_predicted(folder: str, measured: str) -> None:
    result = explain(
        folder, *SMALL, "--device", "cpu", "--compile", "false", "--quantization", measured, "--quick", "--measure",
        "--json", "--context", "64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    memory = found["measured"]["memory"]
    assert memory["weights"] == found["memory"]["weights"]
    assert memory["blocks"] == found["memory"]["blocks"] and memory["num_blocks"] == found["memory"]["num_blocks"]
    assert all(one["measured_ms"] > 0 for one in found["steps"])


def test_the_measured_text_fits_too(folder: str) -> None:
    result = explain(folder, *SMALL, "--device", "cpu", "--compile", "false", "--quick", "--measure", "--context", "64")
    assert result.exit_code == 0, result.output
    assert "measured" in result.stdout and "pagegraph::paged_attention" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_what_does_not_fit_ends_with_1_and_a_way_out(folder: str, tmp_path: Path) -> None:
    small = (*SMALL[:-1], "60KiB")
    result = explain(folder, *small, "--device", "cpu", "--quick", "--svg", str(tmp_path / "p.svg"))
    assert result.exit_code == 1
    told = " ".join(result.stdout.split())
    assert "DOES NOT FIT max_model_len 256 needs 17 blocks" in told and "max_model_len=" in told
    ElementTree.fromstring((tmp_path / "p.svg").read_text())


def test_engines_of_a_server_each_take_what_one_takes(folder: str) -> None:
    asked = (folder, *SMALL, "--device", "cpu", "--quick", "--data-parallel-size", "2")
    found = json.loads(explain(*asked, "--json").stdout)
    assert found["memory"]["all_engines"] == 2 * found["memory"]["allowed"] > 0
    told = " ".join(explain(*asked).stdout.split())
    assert "one of 2 engines (data_parallel_size), all on this machine" in told and "MEMORY of each engine" in told
    assert "on one of 2 shares of" in told  # of the CPU's rates


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--gpu", "h2000"), "there are b200, h200"),
        (
            ("--gpu", "h200", "--tensor-parallel-size", "3"),
            "does not divide the 4 attention heads of qwen3; 1, 2, 4 do",
        ),
        (("--gpu", "h200", "--measure"), "leave --gpu out"),
        (("--device", "cpu", "--tensor-parallel-size", "2", "--measure"), "and tensor_parallel_size=2; set it to 1"),
        (("--device", "cpu", "--data-parallel-size", "2", "--measure"), "and data_parallel_size=2"),
        (("--device", "cuda"), "such as --gpu h200"),
        (("--device", "cpu", "--context", "1000"), "above max_model_len=256"),
        (("--gpu", "a100", "--kv-cache-dtype", "fp8"), "compute capability 8.9"),
        (("--max-num-seqs", "none"), "max_num_seqs"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_question_that_cannot_be_answered(arguments: tuple[str, ...], told: str, folder: str) -> None:
    result = explain(folder, *GPU, *arguments)
    assert result.exit_code == 1 and told in " ".join(result.output.split()), result.output
