"""schemathesis on the server's own /openapi.json: no 5xx, no status and no shape of an answer that is not described.

    make schema
    python -m perf.schema --max-examples 100 --out perf/results/cpu-DAY-schema.json

Every operation gets its examples, values at and beyond each bound, and random bodies. `allow_header_conformance` is left out:
`/v1/responses/input_tokens` is also an id of `/v1/responses/{id}`, so it says that GET is allowed. Ends with status 1 for
any failure. Knows schemathesis by its command line, in the environment that `make schema` makes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perf.compare import record
from perf.tiny import tiny_server

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / ".clients" / "schemathesis" / "bin" / "st"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method",
)  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--max-examples", type=int, default=50, help="random bodies an operation")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    if not COMMAND.is_file():
        p.error("schemathesis is not installed; `make schema` does so")
    with tempfile.TemporaryDirectory(prefix="pagegraph-schema-") as folder:
        # Answers are short, whatever is asked for: the context is.
        server = tiny_server(Path(folder), max_model_len=64, kv_cache_memory=16 << 20)
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                [
                    str(COMMAND), "run", f"http://{server.address}/openapi.json", "--checks", ",".join(CHECKS),
                    "--phases", "examples,coverage,fuzzing", "--max-examples", str(args.max_examples),
                    "--continue-on-failure", "--seed", str(args.seed), "--no-color", "--warnings", "off",
                ],
                cwd=folder, capture_output=True, text=True,
            )  # fmt: skip
        finally:
            server.stop()
        failed = "unforeseen error" in server.text()
    print(done.stdout + done.stderr)
    operations, cases = (re.search(pattern, done.stdout) for pattern in (r"Tested: (\d+)", r"(\d+) generated"))
    holds = done.returncode == 0 and not failed
    version = re.search(r"Schemathesis v(\S+)", done.stdout)
    result = record(
        args, schemathesis=version and version[1], checks=CHECKS, operations=operations and int(operations[1]),
        cases=cases and int(cases[1]), seconds=time.perf_counter() - begin, holds=holds,
    )  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
