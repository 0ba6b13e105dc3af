"""The tables of README.md and perf/README.md as Markdown, from the result files of one machine.

    python -m perf.tables perf/results/h200-2026-11-24-*.json

Of a job or step that several files hold, the last file named counts; a peer's ratio is kept only beside the job it was measured
with. Knows the files; measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

SHAPES = {"0.6b": "Qwen3-0.6B", "8b": "Llama-3-8B"}
METHODS = (None, "fp8", "int8", "int4")
JOBS = {
    "throughput": "1000 x (128 in, 256 out)", "sharegpt": "1000 of mixed lengths", "latency": "one stream",
    "batch32": "32 x (512 in, 256 out)", "prefill": "64 prompts of 4096", "prefix": "256 x (500 shared + 100 in, 16 out)",
}  # fmt: skip
REQUESTS = dict(throughput=1000, sharegpt=1000, latency=1, batch32=32, prefill=64, prefix=256)  # of a whole job
Rows = dict[tuple, dict]


class Results:
    """Rows of several files by what they are of. Jobs that ran scaled down are left out."""

    def __init__(self, paths: Iterable[Path]) -> None:
        # A model is a shape, and behind it the method by which its weights were quantised: "8b fp8".
        self.jobs: Rows = {}  # (model, case, caching)
        self.peers: Rows = {}  # (peer, model, case, caching)
        self.steps: Rows = {}  # (model, sequences, keys)
        self.served: Rows = {}  # (model,): facts and rows of section serve
        self.starts: Rows = {}  # (model, caches)
        for path in paths:
            for section in json.loads(path.read_text()).get("sections", []):
                self._read(section)

    def _read(self, section: dict) -> None:
        model = section["model"]
        if section["section"] == "serve" and "served_over_offline" in section.get("facts", {}):
            self.served[model,] = {**section["facts"], **{row["way"]: row for row in section["rows"]}}
        for row in section["rows"]:
            if section["section"] == "engine" and row["requests"] == REQUESTS[row["case"]]:
                job = named(model, row), row["case"], row["caching"]
                self.jobs[job] = row
                self.peers = {key: theirs for key, theirs in self.peers.items() if key[1:] != job}
            elif section["section"] == "step" and "replay_ms" in row:
                self.steps[named(model, row), row["seqs"], row["keys"]] = row
            elif section["section"] == "startup":
                self.starts[model, row["caches"]] = row
            elif section["section"] == "peer" and "out_tok_s" in row:
                self.peers[row.get("peer", "vllm"), named(row["model"], row), row["case"], row["caching"]] = row

    def job(self, model: str, case: str, caching: bool) -> tuple[str, dict]:
        """(rate of a job, its row); a rate of prompt and output tokens where the output is next to none."""
        row = self.jobs[model, case, caching]
        return rate(row, case), row

    def over(self, peer: str, model: str, case: str, caching: bool) -> tuple[str, str]:
        """(the peer's rate, ours over it), empty where it was not run."""
        theirs = self.peers.get((peer, model, case, caching))
        if theirs is None or theirs["ours_over_theirs"] is None:
            return "", ""
        return rate(theirs, case), f"{theirs['ours_over_theirs']:.2f}"

    def kinds(self) -> Iterator[tuple[str, str, bool]]:
        """Jobs that were run, in the order of the tables."""
        for model in (named(shape, {"quantization": method}) for shape in SHAPES for method in METHODS):
            for case in JOBS:
                yield from ((model, case, caching) for caching in (False, True) if (model, case, caching) in self.jobs)


def named(model: str | None, row: dict) -> str | None:
    """The model a row is of: its shape, and the method where its weights were quantised."""
    return f"{model} {row['quantization']}" if row.get("quantization") else model


def title(model: str) -> str:
    shape, _, method = model.partition(" ")
    return SHAPES.get(shape, shape) + (f" {method}" if method else "")


def rate(row: dict, case: str) -> str:
    """Tokens a second."""
    return f"{row['total_tok_s']:,.0f} in + out" if case == "prefill" else f"{row['out_tok_s']:,.0f}"


def job_name(case: str, caching: bool) -> str:
    return JOBS[case] + (", prefix cached" if caching else "")


def overview(results: Results) -> Iterator[str]:
    """README.md: a column a shape, not quantised."""
    yield "| job | " + " | ".join(SHAPES.values()) + " |"
    yield "|---" * (1 + len(SHAPES)) + "|"
    for case, caching in dict.fromkeys((case, caching) for model, case, caching in results.kinds() if model in SHAPES):
        cells = []
        for model in SHAPES:
            cells.append("")
            if (model, case, caching) in results.jobs:
                ratio = results.over("vllm", model, case, caching)[1]
                cells[-1] = (
                    results.job(model, case, caching)[0].removesuffix(" in + out")
                    + " tok/s"
                    + (f", {ratio} x vLLM" if ratio else "")
                )
        yield f"| {job_name(case, caching)} | " + " | ".join(cells) + " |"


def jobs(results: Results) -> Iterator[str]:
    """perf/README.md: a row a job."""
    others = any(key[0] == "transformers" for key in results.peers)
    yield "| shape, job | out tok/s | x floor | vLLM out tok/s | ours / vLLM |" + (
        " transformers out tok/s | ours / transformers |" if others else ""
    )
    yield "|---" * (7 if others else 5) + "|"
    for model, case, caching in results.kinds():
        mine, row = results.job(model, case, caching)
        cells = [
            f"{title(model)}, {job_name(case, caching)}",
            mine,
            f"{row['ratio']:.2f}",
            *results.over("vllm", model, case, caching),
        ]
        cells += results.over("transformers", model, case, caching) if others else ()
        yield "| " + " | ".join(cells) + " |"


def steps(results: Results) -> Iterator[str]:
    yield "| shape | sequences x context | ms | x floor |"
    yield "|---|---|---|---|"
    for (model, seqs, keys), row in sorted(results.steps.items()):
        if model.partition(" ")[0] in SHAPES:
            yield f"| {title(model)} | {seqs} x {keys} | {row['replay_ms']:#.4g} | {row['ratio']:.2f} |"


def served(results: Results) -> Iterator[str]:
    yield "| shape | served out tok/s | offline out tok/s | served / offline | TTFT p50, p99 ms | between tokens p50, p99 ms | steps in graphs |"
    yield "|---|---|---|---|---|---|---|"
    for (model,), found in results.served.items():
        row = found["served"]
        yield (
            f"| {SHAPES.get(model, model)} | {row['out_tok_s']:,.0f} | {found['offline']['out_tok_s']:,.0f} | {found['served_over_offline']:.2f}"
            f" | {row['ttft_p50_ms']:.0f}, {row['ttft_p99_ms']:.0f} | {row['itl_p50_ms']:.1f}, {row['itl_p99_ms']:.1f} | {row['in_graphs']:.1%} |"
        )


def starts(results: Results) -> Iterator[str]:
    phases = ("source", "capture", "weights", "passes", "memory", "compile", "graphs")
    yield "| shape, caches | first bucket, s | ready, s | " + " | ".join(phases) + " |"
    yield "|---" * (3 + len(phases)) + "|"
    for (model, caches), row in results.starts.items():
        cells = [f"{row[phase]:.1f}" if phase in row else "" for phase in phases]
        yield (
            f"| {SHAPES.get(model, model)}, {caches} | {row['first_bucket_s']:.1f} | {row['ready_s']:.1f} | "
            + " | ".join(cells)
            + " |"
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    results = Results(p.parse_args().files)
    tables = {"README.md, How fast": (overview, results.jobs), "Jobs": (jobs, results.jobs), "One decode step": (steps, results.steps),
              "Served": (served, results.served), "Starts": (starts, results.starts)}  # fmt: skip
    for title, (table, found) in tables.items():
        if found:
            print(f"\n{title}\n", *table(results), sep="\n")


if __name__ == "__main__":
    main()
