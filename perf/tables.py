"""The tables of README.md and perf/README.md, made of the files in perf/results.

    python -m perf.tables --write                                 # fills the tables of both documents
    python -m perf.tables perf/results/h200-2026-11-24-*.json     # prints tables of any run of perf.gpu.run

A document marks the place of a table by two lines, `<!-- table: NAME -->` and `<!-- end of table -->`. TABLES says which function
and which files a name stands for. Of a job or step that several files hold, the last file named counts; a peer's ratio is kept
only beside the job it was measured with. Knows the files; measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from perf import compare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "perf" / "README.md")

SHAPES = {
    "0.6b": "Qwen3-0.6B", "8b": "Llama-3-8B", "8b-128k": "Llama-3-8B, 128k", "30b-a3b-24l": "Qwen3-30B-A3B of 24 layers",
    "gpt-oss-20b": "GPT-OSS-20B, MXFP4", "qwen3-next-12l": "Qwen3-Next of 12 layers", "nemotron-h-8b": "Nemotron-H-8B",
}  # fmt: skip
METHODS = (None, "fp8", "int8", "int4")
JOBS = {
    "throughput": "1000 x (128 in, 256 out)", "sharegpt": "1000 of mixed lengths", "latency": "one stream",
    "batch8": "8 x (512 in, 256 out)", "batch32": "32 x (512 in, 256 out)", "prefill": "64 prompts of 4096", "prefix": "256 x (500 shared + 100 in, 16 out)",
    "prefill_1x100k": "a prompt of 100,000", "prefill_8x32k": "8 prompts of 32,000",
    "decode_8x32k": "8 x (32,000 cached, 128 out)", "conversations": "32 conversations of 6 turns",
    "mixed": "400 of 50 to 3000 in, 20 to 500 out",
}  # fmt: skip
REQUESTS = dict(throughput=1000, sharegpt=1000, latency=1, batch8=8, batch32=32, prefill=64, prefix=256, prefill_1x100k=1,
                prefill_8x32k=8, decode_8x32k=8, conversations=192, mixed=400)  # fmt: skip  # of a whole job
# Jobs that the top README shows, and the runs that its columns take them from: the first that has the job.
OVERVIEW = ("throughput", "latency", "batch32", "prefill", "prefill_1x100k", "decode_8x32k", "conversations", "mixed")
COLUMNS = {"Qwen3-0.6B": [("0.6b", False), ("0.6b", True)], "Llama-3-8B": [("8b-128k", True), ("8b", False)]}
LAYERS_8B = 32
Rows = dict[tuple, dict]


class Results:
    """Rows of several files by what they are of. Jobs that ran scaled down are left out unless `scaled`."""

    def __init__(self, paths: Iterable[Path], scaled: bool = False) -> None:
        self.scaled = scaled
        # A model is a shape, and behind it the method by which its weights were quantised: "8b fp8".
        self.jobs: Rows = {}  # (model, case, caching)
        self.peers: Rows = {}  # (peer, model, case, caching)
        self.steps: Rows = {}  # (model, sequences, keys)
        self.served: Rows = {}  # (model,): facts and rows of section serve
        self.starts: Rows = {}  # (model, caches)
        self.loads: Rows = {}  # (model, rate, engine)
        for path in paths:
            for section in json.loads(path.read_text()).get("sections", []):
                self._read(section)

    def _read(self, section: dict) -> None:
        model = section["model"]
        if section["section"] == "serve" and "served_over_offline" in section.get("facts", {}):
            self.served[model,] = {**section["facts"], **{row["way"]: row for row in section["rows"]}}
        for row in section["rows"]:
            if section["section"] == "engine" and (self.scaled or row["requests"] == REQUESTS[row["case"]]):
                job = named(model, row), row["case"], row["caching"]
                self.jobs[job] = row
                self.peers = {key: theirs for key, theirs in self.peers.items() if key[1:] != job}
            elif section["section"] == "step" and "replay_ms" in row:
                self.steps[named(model, row), row["seqs"], row["keys"]] = row
            elif section["section"] == "open_loop" and "engine" in row:
                self.loads[model, row["rate"], row["engine"]] = row
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
    return f"{row['total_tok_s']:,.0f} in + out" if case.startswith("prefill") else f"{row['out_tok_s']:,.0f}"


def job_name(case: str, caching: bool, requests: int) -> str:
    name = JOBS[case] if requests == REQUESTS[case] else JOBS[case].replace(f"{REQUESTS[case]}", f"{requests}", 1)
    return name + (", prefix cached" if caching else "")


def overview(results: Results) -> Iterator[str]:
    """README.md: a column a shape, not quantised, the jobs of OVERVIEW."""

    def cell(case: str, runs: list[tuple[str, bool]]) -> str:
        for model, caching in runs:
            if (model, case, caching) in results.jobs:
                ratio = results.over("vllm", model, case, caching)[1]
                speed = results.job(model, case, caching)[0].removesuffix(" in + out")
                return f"{speed} tok/s" + (f", {ratio} x vLLM" if ratio else "")
        return ""

    rows = ([JOBS[case], *(cell(case, runs) for runs in COLUMNS.values())] for case in OVERVIEW)
    return table("job | " + " | ".join(COLUMNS), (row for row in rows if any(row[1:])))


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
            f"{title(model)}, {job_name(case, caching, row['requests'])}",
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


def loads(results: Results) -> Iterator[str]:
    """Poisson arrivals, 5 % of them of 6000 tokens; milliseconds."""

    def cells(row: dict) -> list[str]:
        names = ("ttft_short_p50", "ttft_short_p90", "ttft_long_p50", "itl_p50", "itl_p99", "itl_p999")
        return [f"{row[name]:.0f}" if row[name] >= 100 else f"{row[name]:.1f}" for name in names]

    return table(
        "shape, requests a second, server | out tok/s | TTFT p50 | p90 | of 6000 tokens p50 | between tokens p50 | p99 | p99.9",
        (
            [f"{SHAPES.get(model, model)}, {rate:g}, {engine}", f"{row['out_tok_s']:,.0f}", *cells(row)]
            for (model, rate, engine), row in results.loads.items()
        ),
    )


# Stages of a start, `Timings.seconds` -> heads of columns.
START_PHASES = {
    "imports": "imports", "wrap": "wrap", "weights": "weights", "passes": "passes", "memory": "memory", "compile": "compile",
    "graphs": "CUDA graph capture",
}  # fmt: skip


def starts(results: Results) -> Iterator[str]:
    phases = START_PHASES
    yield "| shape, caches | first bucket, s | ready, s | " + " | ".join(phases.values()) + " |"
    yield "|---" * (3 + len(phases)) + "|"
    for (model, caches), row in results.starts.items():
        cells = [f"{row[phase]:.1f}" if phase in row else "" for phase in phases]
        yield (
            f"| {SHAPES.get(model, model)}, {caches} | {row['first_bucket_s']:.1f} | {row['ready_s']:.1f} | "
            + " | ".join(cells)
            + " |"
        )


# Tables of single files, each a function of no arguments. The keys are those of the stored files, in the words of their day:
# a rename in the code does not reach them.

CPU_CASES = {
    "test_one_stream": "one stream, 64 tokens, tokens/s over transformers",
    "test_mixed_requests_against_a_static_batch": "16 requests of mixed lengths, over one static padded batch",
    "test_mixed_requests_against_one_by_one": "the same, over one request at a time",
    "test_prefix_hit_against_cold": "time to first token, 600 tokens: cold over 500 of them cached",
    "test_chunked_prefill_keeps_streams_going": "worst gap of a stream beside a prompt of 1500: whole over chunks of 64",
}
CPU_RUNS = ("cpu-2026-11-23.json", "cpu-2026-11-24-engine.json", "cpu-2026-11-24-one-row.json")
QUANTIZED_METHODS = ("int4", "int8", "fp8")


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def rows_of(name: str, section: str) -> list[dict]:
    """The rows of all sections of that name in one file of perf.gpu.run, with the model of their section."""
    return [
        {"model": found["model"], **row}
        for found in read(name)["sections"]
        if found["section"] == section
        for row in found["rows"]
    ]


def table(header: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield f"| {header} |"
    yield "|---" * (header.count("|") + 1) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def cpu_transformers() -> Iterator[str]:
    runs = [{case["name"]: case["ratio"] for case in read(name)["cases"]} for name in CPU_RUNS]
    dates = " | ".join(name.removeprefix("cpu-").removesuffix(".json") for name in CPU_RUNS)
    return table(
        f"case | {dates}",
        ([title, *(f"{run[name]:.2f} x" if name in run else "" for run in runs)] for name, title in CPU_CASES.items()),
    )


def cpu_quantized() -> Iterator[str]:
    """Every ratio of the last runs in the text file, lowest to highest; weights and memory of the run before."""
    text = (RESULTS / "cpu-2026-11-25-quantized.txt").read_text()
    last, memory = text[text.index("\n7a18f59") :], text[text.index("\n768b4a2") : text.index("\n7a18f59")]

    def ratios(name: str, method: str) -> str:
        (line,) = re.findall(rf"^  {name} .*$", last, re.M)
        found = [float(value) for value in re.findall(r"\d+\.\d+", line.split(method)[1].split("int4")[0])]
        return f"{min(found):.2f} x" if len(found) == 1 else f"{min(found):.2f} to {max(found):.2f} x"

    def mebibytes(method: str) -> list[str]:
        pattern = rf"{method}: weights (\d+) of (\d+) MiB, process (\d+) of (\d+), peak [a-z ]*(\d+) of (\d+)"
        found = re.search(pattern, memory)
        assert found is not None
        return [f"{found[at]} of {found[at + 1]}" for at in (1, 3, 5)]

    rows = [[title, *(ratios(title, method) for method in ("int8", "int4"))] for title in ("one stream", "8 streams")]
    rows.append(["a prompt of 256 tokens", *(ratios("prompt", method) for method in ("int8", "int4"))])
    titles = ("weights, MiB", "process once loaded, MiB", "its peak while loading, MiB")
    rows += ([title, *cells] for title, *cells in zip(titles, mebibytes("int8"), mebibytes("int4")))
    return table("against bfloat16 | int8 | int4", rows)


def cpu_quality() -> Iterator[str]:
    text = (RESULTS / "cpu-2026-11-24-quality.txt").read_text()
    found = re.findall(r"^(\S.*?) +top-1 agreement ([\d.]+ %), KL ([\d.]+)", text, re.M)
    return table("weights, CPU | top-1 agreement | KL", found)


def quantized_gemms() -> Iterator[str]:
    """All GEMMs of a decode step of the 8B, each measured alone with cold weights, summed."""
    # up to 8 rows the GEMV kernels, from 128 rows on activations of 8 bits; what lies between was not run again
    files = {
        "int4": ("h200-2026-11-25-few-rows-int4", "h200-2026-11-24-operands-int4", "h200-2026-11-25-coded-int4"),
        "int8": ("h200-2026-11-25-few-rows-int8", "h200-2026-11-24-operands-int8", "h200-2026-11-25-coded-int8"),
        "fp8": ("h200-2026-11-25-few-rows-fp8", "h200-2026-11-24-operands-fp8", "h200-2026-11-24-operands-fp8"),
    }

    def cells(method: str, rows: int) -> list[str]:
        name = files[method][0 if rows <= 8 else 1 if rows <= 64 else 2]
        found = [row for row in rows_of(f"{name}.json", "quantized") if row["rows"] == rows]
        times = [1 if row["matrix"] == "lm_head" else LAYERS_8B for row in found]
        ours = sum(n * row["us"] for n, row in zip(times, found))
        bf16 = sum(n * row["bf16_us"] for n, row in zip(times, found))
        floor = sum(n * row["us"] / row["ratio"] for n, row in zip(times, found))
        return [f"{ours / 1000:.2f}, {bf16 / ours:.2f} x", f"{ours / floor:.2f}"]

    return table(
        "rows of x | " + " | ".join(f"{method}, ms | x floor" for method in QUANTIZED_METHODS),
        ([rows, *(cell for method in QUANTIZED_METHODS for cell in cells(method, rows))] for rows in (2, 8, 32, 64, 128, 256)),
    )  # fmt: skip


def quantized_steps() -> Iterator[str]:
    """Whole decode steps of the 8B at 256 keys a sequence; bfloat16 is the one of int4's run."""
    found = {
        (method, row["method"], row["rows"]): row
        for method in QUANTIZED_METHODS
        for row in rows_of(f"h200-2026-11-25-ahead-{method}-steps.json", "quantized_step")
        if row["keys"] == 256
    }

    def cells(rows: int) -> Iterator[str]:
        yield f"{found['int4', 'bf16', rows]['ms']:.2f}"
        for method in QUANTIZED_METHODS:
            row = found[method, method, rows]
            yield from (f"{row['ms']:.2f}, {row['gain']:.2f} x", f"{row['ratio']:.2f}")

    return table(
        "sequences | bfloat16, ms | " + " | ".join(f"{method}, ms | x floor" for method in QUANTIZED_METHODS),
        ([rows, *cells(rows)] for rows in (1, 8, 32, 64, 128, 256)),
    )


def fp8_jobs() -> Iterator[str]:
    return jobs(Results([RESULTS / "h200-2026-11-25-fp8-vllm.json"]))


def fp8_cache() -> Iterator[str]:
    found = rows_of("h200-2026-11-24-pages-of-8-bits-steps.json", "quantized_step")
    ms = {(row["cache"], row["rows"], row["keys"]): row for row in found}
    return table(
        "sequences x keys | bfloat16 cache, ms | fp8 cache, ms | x floor",
        (
            [f"{rows} x {keys}", f"{ms['auto', rows, keys]['ms']:.2f}", f"{row['ms']:.2f}, {row['gain']:.2f} x", f"{row['ratio']:.2f}"]
            for (cache, rows, keys), row in ms.items()
            if cache == "fp8"
        ),
    )  # fmt: skip


def gpu_quality() -> Iterator[str]:
    names = {"int4": "int4, groups of 64 and 128", "gguf": "Q4_1 as in its file", "pages": "fp8 cache"}
    found = {(row["method"], row["rounds"]): row for row in rows_of("h200-2026-11-25-quality.json", "quality")}

    def cell(row: dict | None) -> str:
        return f"{row['top1']:.1%}, KL {row['kl']:.3f}" if row else ""

    methods = dict.fromkeys(method for method, _ in found)
    return table(
        "weights, GPU | activations of 8 bits from 65 rows on | bfloat16 activations",
        (
            [names.get(method, method), cell(found.get((method, True))), cell(found.get((method, False)) or found.get((method, "")))]
            for method in methods
        ),
    )  # fmt: skip


def spec_decode(rows: Iterable[tuple[str, float, float, float, float, float]]) -> Iterator[str]:
    """Rows: (text, tokens/s without, with, ratio, draft tokens, accepted)."""
    return table(
        "text, streams | tokens/s without | with | ratio | draft tokens | accepted",
        (
            [text, f"{off:,.4g}" if off < 1000 else f"{off:,.0f}", f"{on:,.4g}" if on < 1000 else f"{on:,.0f}", f"{ratio:.2f} x",
             f"{drafts:,.0f}", f"{taken / drafts:.0%}" if drafts else ""]
            for text, off, on, ratio, drafts, taken in rows
        ),
    )  # fmt: skip


def spec_decode_cpu() -> Iterator[str]:
    def name(case: str) -> str:
        kind, streams, _ = case.split("[")[1].split("-")
        return f"{kind}, {streams}"

    return spec_decode(
        (name(row["case"]), row["plain_tok_s"], row["guessing_tok_s"], row["ratio"], row["guesses"], row["accepted"])
        for row in read("cpu-2026-11-25-speculation.json")["cases"]
    )


def spec_decode_gpu() -> Iterator[str]:
    found = [row for row in rows_of("h200-2026-11-24-guessing-texts.json", "texts") if "on_tok_s" in row]
    found.sort(key=lambda row: (row["text"] != "repetitive", row["streams"]))
    return spec_decode(
        (f"{row['text']}, {row['streams']}", row["off_tok_s"], row["on_tok_s"], row["ratio"], row["guesses"], row["accepted"])
        for row in found
    )  # fmt: skip


def spec_decode_steps() -> Iterator[str]:
    found = {
        (row["model"], row["guesses"], row["seqs"]): row
        for row in rows_of("h200-2026-11-24-guessing-steps.json", "speculation")
    }
    sequences = sorted({seqs for _, _, seqs in found})
    kinds = dict.fromkeys((model, drafts) for model, drafts, _ in found)
    return table(
        "shape, draft tokens a sequence | " + " | ".join(f"{seqs} sequences" for seqs in sequences),
        (
            [f"{SHAPES[model]}, {drafts}", *(f"{found[model, drafts, seqs]['ms']:.2f}" for seqs in sequences)]
            for model, drafts in sorted(kinds)
        ),
    )


def draft_graph() -> Iterator[str]:
    found = rows_of("h200-2026-11-24-guessing-chains.json", "chains")
    return table(
        "draft tokens, one sequence | a launch each, ms | replays in one launch | one graph",
        ([row["guesses"], *(f"{row[way]:.2f}" for way in ("launches_ms", "replays_ms", "graph_ms"))] for row in found),
    )


def parity() -> Iterator[str]:
    found = [row for row in rows_of("h200-2026-11-24-guessing-texts.json", "texts") if "float32" in row]
    return table(
        "draft tokens | prompts whose tokens are those without, float32 | drafted | accepted",
        ([row["float32"], f"{row['same']} of {row['prompts']}", row["guesses"], row["accepted"]] for row in found),
    )


def memory() -> Iterator[str]:
    return table(
        "requests | blocks of the pool | preemptions | share of the device's memory | allowed",
        (
            [f"{row['requests']}, {row['kind']}", row["pages"], row["preemptions"], f"{row['used']:.1%}", f"{row['allowed']:.0%}"]
            for row in rows_of("h200-2026-11-24-qwen3-0.6b-memory.json", "memory")
        ),
    )  # fmt: skip


def prompt_graphs() -> Iterator[str]:
    found = [
        Results([RESULTS / f"h200-2026-11-28-qwen3-0.6b-prompts-{where}-graphs.json"]).jobs
        for where in ("outside", "in")
    ]
    return table(
        "Qwen3-0.6B | prompt steps launched by the host, s | replayed as graphs, s",
        (
            [job_name(case, caching, found[0][model, case, caching]['requests']), *(f"{jobs[model, case, caching]['wall_s']:.3f}" for jobs in found)]
            for model, case, caching in found[0]
            if all((model, case, caching) in jobs for jobs in found)
        ),
    )  # fmt: skip


def abuse() -> Iterator[str]:
    fuzz, schema = read("cpu-2026-11-29-fuzz.json"), read("cpu-2026-11-29-schema.json")
    soak = read("cpu-2026-11-30-soak-held.json")
    grown = ", ".join(f"{name} {share:+.2%}" for name, share in soak["growth"].items())
    kinds = Counter(f"{int(status) // 100}xx" for status, count in fuzz["by_status"].items() for _ in range(count))
    kinds = {**{f"{first}xx": kinds[f"{first}xx"] for first in (2, 3, 4, 5)}, "left in the middle": kinds["0xx"]}
    rows = [
        (
            f"schemathesis {schema['schemathesis']} on /openapi.json",
            f"{schema['cases']:,} cases of {schema['operations']} operations",
            "no failure" if schema["holds"] else "failed",
        ),
        (
            "requests, most of them spoiled",
            f"{fuzz['requests']:,}",
            ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()),
        ),
        (
            "mixed requests, many abandoned or refused",
            f"{soak['requests']:,} in {soak['given']['minutes']:.0f} minutes",
            f"{len(soak['wrong'])} wrong; memory: {grown}; {'nothing' if not any(soak['left'].values()) else 'something'} left",
        ),
    ]
    return table("tried with | how much | found", rows)


def stored(*names: str, scaled: bool = False) -> Results:
    return Results((RESULTS / f"h200-{name}.json" for name in names), scaled)


def quoted() -> Results:
    """The jobs that the documents quote; the last file that holds a job counts."""
    return stored(
        "2026-11-28-qwen3-0.6b-prompts-in-graphs", "2026-11-24-llama3-8b", "2026-11-24-qwen3-0.6b", "2026-11-24-few-rows-vllm",
        "2026-11-28-qwen3-0.6b-prefix-vllm", "2026-11-29-llama3-8b-128k-vllm",
    )  # fmt: skip


# Of mixtures and hybrids: runs beside vLLM, and steps alone, of which the last file that holds one counts.
BESIDE_VLLM = (
    "2026-12-01-qwen3-30b-a3b-24l-vllm", "2026-12-01-qwen3-30b-a3b-24l-fp8-vllm", "2026-12-01-nemotron-h-8b-vllm",
)  # fmt: skip
STEPS = (*BESIDE_VLLM, "2026-12-01-gpt-oss-20b", "2026-12-01-qwen3-next-12l-steps", "2026-12-01-nemotron-h-8b-steps")
COMPARED_8B, COMPARED_SMALL = "h200-2026-11-30-llama3-8b-compare.json", "h200-2026-11-29-qwen3-0.6b-compare.json"
QUOTED = (23, 47, 7, 1.75)  # over transformers' generate, as guides to paged attention have it


def quoted_ratios() -> Iterator[str]:
    """What guides quote of such engines beside ours."""
    yield "| over transformers | requests/s | output tokens/s | TTFT | memory |"
    yield "|---|---|---|---|---|"
    yield "| as guides to paged attention quote it | " + " | ".join(f"{one} x" for one in QUOTED) + " |"
    for shape, result in (("8B", COMPARED_8B), ("0.6B", COMPARED_SMALL)):
        ours, *others = read(result)["rows"]
        for one in others[:2]:
            ratios = " | ".join(f"{ratio:.2f} x" for ratio in compare.over(ours, one))
            yield f"| {shape}, {one['way']} | {ratios} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "overview": lambda: overview(quoted()),
    "jobs": lambda: jobs(quoted()),
    "steps": lambda: steps(stored("2026-11-29-steps-and-jobs")),
    "other jobs": lambda: jobs(stored(*BESIDE_VLLM, scaled=True)),
    "other steps": lambda: steps(stored(*STEPS)),
    "loads": lambda: loads(stored("2026-11-29-llama3-8b-open-loop-3-times")),
    "served": lambda: served(stored("2026-11-24-qwen3-0.6b-served")),
    "prompt graphs": prompt_graphs, "memory": memory, "start": lambda: starts(stored("2026-11-29-llama3-8b-startup-answers")), "parity": parity,
    "cpu compare": lambda: iter(compare.lines(read("cpu-2026-11-29-compare.json")["rows"])),
    "gpu compare": lambda: iter(compare.lines(read(COMPARED_SMALL)["rows"])),
    "gpu compare quoted": quoted_ratios,
    "gpu compare 8b": lambda: iter(compare.lines(read(COMPARED_8B)["rows"])),
    "cpu transformers": cpu_transformers, "cpu quantized": cpu_quantized, "cpu quality": cpu_quality,
    "quantized gemms": quantized_gemms, "quantized steps": quantized_steps, "fp8 jobs": fp8_jobs, "fp8 cache": fp8_cache,
    "gpu quality": gpu_quality, "spec decode cpu": spec_decode_cpu, "spec decode gpu": spec_decode_gpu,
    "spec decode steps": spec_decode_steps, "draft graph": draft_graph, "abuse": abuse,
}  # fmt: skip
PLACE = re.compile(r"<!-- table: (?P<name>[\w ]+) -->\n(?P<lines>.*?)<!-- end of table -->", re.S)


def filled(text: str) -> str:
    """A document with its tables as the stored results have them now."""

    def block(place: re.Match[str]) -> str:
        lines = "\n".join(TABLES[place["name"]]())
        return f"<!-- table: {place['name']} -->\n{lines}\n<!-- end of table -->"

    return PLACE.sub(block, text)


def show(results: Results) -> None:
    """Print what a run holds of the tables that are made of any run."""
    tables = {"Jobs": (jobs, results.jobs), "One decode step": (steps, results.steps),
              "Served": (served, results.served), "Open loop": (loads, results.loads), "Starts": (starts, results.starts)}  # fmt: skip
    for title, (lines, found) in tables.items():
        if found:
            print(f"\n{title}\n", *lines(results), sep="\n")


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("files", type=Path, nargs="*", metavar="FILE.json", help="print the tables of these results")
    p.add_argument("--write", action="store_true", help="fill the tables of README.md and perf/README.md")
    args = p.parse_args()
    if args.files:
        show(Results(args.files))
    for document in DOCUMENTS if args.write else ():
        document.write_text(filled(document.read_text()))


if __name__ == "__main__":
    main()
