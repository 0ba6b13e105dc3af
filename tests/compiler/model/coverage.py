"""Which of transformers' types are right, refused or not tried, as docs/models.md and a row of README.md say it.

    python -m tests.compiler.model.coverage --write            # tries every type, minutes; writes both documents
    python -m tests.compiler.model.coverage --write llama      # tries one, and writes its row
    python -m tests.compiler.model.coverage llama qwen2_5_vl   # tries these and prints what came out

Each type is a tiny random model (`every_type`) that transformers saves to a folder; it is right if logits of the folder
served are transformers' own eager ones, in float32, whole, in chunks and mixed. Knows no architecture but the names of
`FAMILIES`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers

from pagegraph.compiler.model.checkpoint import WeightsMismatch
from pagegraph.compiler.model.config_json import load_model_config, reason_of
from pagegraph.compiler.model.left_out import towers_if_installed
from pagegraph.compiler.model.meta import auto_class, build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.model.weights import load_weights
from tests.compiler.model.every_type import causal_types, image_text_types, speech_types, tiny
from tests.compiler.model.test_paged import CHUNKED, MIXED, WHOLE, prompts_for, random_model, stock_logits
from tests.compiler.paged_run import run_paged
from tests.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
MOST_PARAMETERS = 30_000_000
STATUSES = ("right", "refused", "not tried")
# Names that README.md gives, and the types that have to be right for one.
FAMILIES = {
    "Llama": ["llama"], "Llama 3.2 Vision": ["mllama"], "Llama 4": ["llama4", "llama4_text"],
    "Mistral": ["mistral", "ministral", "ministral3"],
    "Mistral 3 and 4": ["mistral3", "mistral4"], "Mixtral": ["mixtral"],
    "Qwen2 and 3 and their mixtures": ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"],
    "Qwen3-Next": ["qwen3_next"], "Qwen3.5": ["qwen3_5", "qwen3_5_moe"],
    "Qwen2-VL to Qwen3-VL": ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"],
    "Gemma 1 to 4": ["gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4_text", "gemma4"],
    "DeepSeek-V2 and V3": ["deepseek_v2", "deepseek_v3"], "Kimi-K2.5": ["kimi_k25"], "Kimi-Linear": ["kimi_linear"],
    "GPT-OSS": ["gpt_oss"], "GLM-4 and 4.5": ["glm", "glm4", "glm4_moe", "glm4_moe_lite"],
    "GLM-4.xV": ["glm4v", "glm4v_moe", "glm46v"], "MiniMax-M2": ["minimax_m2"], "MiMo-V2": ["mimo_v2_flash"],
    "Phi": ["phi", "phi3", "phimoe"], "Phi-4-multimodal": ["phi4_multimodal"],
    "Granite": ["granite", "granitemoe", "granitemoeshared"], "Granite 4": ["granitemoehybrid"],
    "Nemotron": ["nemotron"], "Nemotron-H": ["nemotron_h"], "Falcon-H1": ["falcon_h1"], "Jamba": ["jamba"], "Bamba": ["bamba"],
    "Mamba": ["mamba", "mamba2", "falcon_mamba"], "LFM2": ["lfm2", "lfm2_moe", "lfm2_vl"], "Cohere": ["cohere", "cohere2"],
    "OLMo": ["olmo", "olmo2", "olmo3", "olmoe"], "OLMo hybrid": ["olmo_hybrid"], "SmolLM3": ["smollm3"],
    "Starcoder2": ["starcoder2"], "StableLM": ["stablelm"], "EXAONE": ["exaone4", "exaone_moe"],
    "ERNIE 4.5": ["ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe"], "HunYuan": ["hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3"],
    "Seed-OSS": ["seed_oss"], "Apertus": ["apertus"], "GPT-2": ["gpt2"], "GPT-NeoX": ["gpt_neox"], "OPT": ["opt"],
    "InternVL": ["internvl"], "LLaVA": ["llava", "llava_next", "llava_onevision"], "Idefics": ["idefics2", "idefics3"],
    "SmolVLM": ["smolvlm"], "PaliGemma": ["paligemma"], "Aya Vision": ["aya_vision"], "Ovis2": ["ovis2"],
    "Voxtral": ["voxtral"], "Qwen2-Audio": ["qwen2_audio"], "Granite Speech": ["granite_speech"],
}  # fmt: skip


class Outcome(NamedTuple):
    """Of a type: one of STATUSES, or "wrong"; why it is not right."""

    status: str
    why: str = ""


def kinds() -> list[str]:
    """Every type that may be tried."""
    return sorted({*causal_types(), *image_text_types(), *speech_types()})


@torch.inference_mode()
def outcome_of(kind: str, folder: Path) -> Outcome:
    """Saves the type's model to `folder`, loads it from there, and compares. Raises what nothing expects."""
    try:
        config = tiny(kind)
        with torch.device("meta"), towers_if_installed(config):
            size = sum(one.numel() for one in auto_class(config).from_config(config).parameters())
    except Exception as error:
        return Outcome("not tried", f"transformers builds no tiny model: {_short(reason_of(error))}")
    if size > MOST_PARAMETERS:
        return Outcome("not tried", "its tiny configuration is not tiny")
    try:
        build(tiny(kind))
    except UnsupportedModel as refused:
        said = str(refused)
        assert said.startswith(f"{kind}: "), said
        return Outcome("refused", said.removeprefix(f"{kind}: "))
    prompts = prompts_for(config.get_text_config().vocab_size)
    try:
        with towers_if_installed(config):
            stock = random_model(config, auto_class(config))
        expected = stock_logits(stock, prompts)
    except Exception as error:
        return Outcome("not tried", f"transformers' own forward fails: {_short(reason_of(error))}")
    stock.save_pretrained(folder)
    try:
        paged = served(folder)
    except WeightsMismatch as error:
        return Outcome("refused", _short(str(error).removeprefix(f"{folder}: ")))
    difference = furthest(paged, prompts, expected)
    bound = 1e-4 * max(1.0, max(one.abs().max().item() for one in expected) / 5)
    return Outcome("right") if difference < bound else Outcome("wrong", f"logits are off by {difference:.1e}")


def build(config: transformers.PretrainedConfig) -> PagedModel:
    """Wrapped, without weights."""
    return wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256))


def served(folder: Path) -> PagedModel:
    """The model of a folder, with its weights."""
    paged = build(load_model_config(folder))
    load_weights(paged.model, folder, device=torch.device("cpu"), dtype=torch.float32, progress=False)
    return paged


def furthest(paged: PagedModel, prompts: list[list[int]], expected: list[torch.Tensor]) -> float:
    """The largest difference of a logit over all schedules, and of those that the head gives of every token."""
    largest = 0.0
    kept = []

    def forward(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits, hidden = paged(*inputs)
        kept.append(hidden)
        return logits, hidden

    for schedule in (WHOLE, CHUNKED, MIXED):
        for sequence, by_position in enumerate(run_paged(forward, paged, prompts, schedule)):
            for position, logits in by_position.items():
                largest = max(largest, _difference(logits, expected[sequence][position]))
    if paged.body:
        every = paged.head(kept[0][0, : sum(map(len, prompts))])
        largest = max(largest, _difference(every.float(), torch.cat(expected)))
    return largest


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().nan_to_num(nan=torch.inf).max().item()


def _short(reason: str) -> str:
    return textwrap.shorten(reason.replace("|", "/"), 120, placeholder=" ...")


def page(outcomes: dict[str, Outcome]) -> str:
    """The document."""
    lines = [
        "# Models",
        "",
        f"{versions()}:",
        "a tiny random model, saved by transformers and served from its folder, is *right* where its logits are those of",
        "transformers' own eager forward, whole, in chunks and mixed with others. Images and sound are not served. What is",
        "*refused* says why at the start. `python -m tests.compiler.model.coverage --write` makes this page, and",
        "`make test-slow` compares every row.",
        "",
        "| types | " + " | ".join(STATUSES) + " | all |",
        "|---|---|---|---|---|",
    ]
    sets = {"causal LM": causal_types(), "image-text": image_text_types(), "speech": speech_types()}
    for name, members in sets.items():
        counted = Counter(outcomes[kind].status for kind in members)
        lines.append(f"| {name} | " + " | ".join(str(counted[one]) for one in STATUSES) + f" | {len(members)} |")
    lines += ["", "`type` is what a config.json calls `model_type`; C: causal LM, I: image-text, S: speech.", ""]
    lines += ["| type | | | why |", "|---|---|---|---|"]
    for kind, (status, why) in outcomes.items():
        letters = "".join(letter for letter, members in zip("CIS", sets.values()) if kind in members)
        lines.append(f"| `{kind}` | {letters} | {status} | {why} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What a page is of, as it says it."""
    torch_version = torch.__version__.partition("+")[0]
    return (
        f"Every causal-LM, image-text and speech type of transformers {transformers.__version__}, tried with torch"
        f" {torch_version} on a CPU"
    )


def rows_of(text: str) -> dict[str, Outcome]:
    """What a page says of each type."""
    found = re.findall(r"^\| `([\w.-]+)` \| C?I?S? \| ([\w ]+) \|(.*)\|$", text, re.M)
    return {kind: Outcome(status, why.strip()) for kind, status, why in found}


def readme_row(outcomes: dict[str, Outcome]) -> str:
    """The row of README.md that names models."""
    right = {kind for kind, one in outcomes.items() if one.status == "right"}
    names = [name for name, members in FAMILIES.items() if right.issuperset(members)]
    sets = (causal_types(), image_text_types(), speech_types())
    counts = [f"{len(right & set(members))} of {len(members)}" for members in sets]
    return (
        f"| models | {', '.join(names)} and others: {counts[0]} causal-LM types of transformers, and for text alone"
        f" {counts[1]} image-text and {counts[2]} speech types: [docs/models.md](docs/models.md) has every one |"
    )


def with_row(text: str, row: str) -> str:
    """A README whose row of models is `row`."""
    return re.sub(r"^\| models \|.*$", lambda _: row, text, flags=re.M)


def main(arguments: Iterable[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to try; all, if none is named")
    parser.add_argument("--write", action="store_true", help="write docs/models.md and the row of README.md")
    args = parser.parse_args([*arguments])
    known = rows_of(PAGE.read_text()) if args.types and PAGE.exists() and versions() in PAGE.read_text() else {}
    if args.write and args.types and not known:
        parser.error("docs/models.md is of other versions: write it whole")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    outcomes = {}
    for kind in args.types or kinds():
        with TemporaryDirectory() as folder:
            outcomes[kind] = outcome_of(kind, Path(folder))
        print(kind, *outcomes[kind], sep="\t", flush=True)
    if wrong := [kind for kind, one in outcomes.items() if one.status == "wrong"]:
        sys.exit(f"wrong: {', '.join(wrong)}")
    if args.write:
        outcomes = dict(sorted({**known, **outcomes}.items()))
        PAGE.write_text(page(outcomes))
        README.write_text(with_row(README.read_text(), readme_row(outcomes)))


if __name__ == "__main__":
    main(sys.argv[1:])
