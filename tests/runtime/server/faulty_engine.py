"""The engine process of a server, whose steps misbehave for requests of some seeds. Run with the settings' file.

PAGEGRAPH_TEST_STEP_S in the environment: seconds that each step takes at least.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.step import CompiledStep, Ticket
from pagegraph.runtime.server import engine_process

POISONED = 9901  # every step with it raises
WEDGED = 9902  # a step with it never ends, once it has some tokens
TOKENS_BEFORE = 20
STEP_S = float(os.environ.get("PAGEGRAPH_TEST_STEP_S", 0))

launch = CompiledStep.launch


def misbehave(self: CompiledStep, step: StepInput, *rest: Any) -> Ticket:
    seeds = step.sampling.seeds.tolist()
    if POISONED in seeds:
        raise ArithmeticError("a poisoned step")
    if WEDGED in seeds and step.starts[seeds.index(WEDGED)] > TOKENS_BEFORE:
        wedge()
    time.sleep(STEP_S)
    return launch(self, step, *rest)


def wedge() -> None:
    while True:
        time.sleep(1.0)


if __name__ == "__main__":
    CompiledStep.launch = misbehave
    engine_process.main(sys.argv[1])
