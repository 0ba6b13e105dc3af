"""What a step's log-probabilities become for the one who asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagegraph.compiler.step.inputs import StepOutput
from pagegraph.compiler.step.sampling import StepLogprobTensors
from pagegraph.runtime.ipc.protocol import SamplingParams, TokenLogprob
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence


def told(logits: list[float], chosen: int, wanted: int, most: int) -> TokenLogprob:
    """What is told of `chosen`, sampled from `logits`, where another sequence asked for `most`."""
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8)
    scheduler.add(Sequence("a", [1], SamplingParams(logprobs=wanted), frozenset(), 0, 8))
    plan = scheduler.schedule()
    logprobs = StepLogprobTensors(torch.tensor([logits]), torch.tensor([chosen]), most).numpy()
    return scheduler.commit(plan, StepOutput(np.array([chosen], np.int32), logprobs)).deltas[0].logprobs[0]


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize("wanted", [1, 2, 3, 5])
def test_the_sampled_token_is_the_first_of_equals(chosen: int, wanted: int) -> None:
    """Also where it would not be among the likeliest: three are equal and one is asked for."""
    query = told([0.0, 3.0, 3.0, 1.0, 3.0, 2.0], chosen, wanted, 5)
    assert query.rank == 1 and query.top_ids[0] == chosen and query.top_logprobs[0] == query.logprob
    assert len(set(query.top_ids)) == wanted and set(query.top_ids[:3]) <= {1, 2, 4}
    assert query.top_ids[3:] == [5, 3][: max(wanted - 3, 0)]
    assert query.top_logprobs == sorted(query.top_logprobs, reverse=True)


def test_a_sampled_token_stands_where_it_belongs() -> None:
    assert told([0.0, 3.0, 2.0, 1.0, 2.0], 4, 3, 5).top_ids == [1, 4, 2]
    assert (
        told([0.0, 3.0, 2.0, 1.0, 2.0], 3, 3, 5).top_ids[0] == 1
        and 3 not in told([0.0, 3.0, 2.0, 1.0, 2.0], 3, 3, 5).top_ids
    )
    assert told([0.0, 3.0, 2.0, 1.0, 2.0], 3, 0, 5).top_ids == []
