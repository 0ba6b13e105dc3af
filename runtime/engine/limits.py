"""What a submitted sequence is checked against: the last gate before the device.

Knows what the model and the configuration allow. Knows no queue and no steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegraph.runtime.ipc.protocol import Submit
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.sampling_params import BadParameter, check_length


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can take."""

    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int]
    max_queue: int
    pooler: Pooler
    generates: bool = True  # the model has an output head
    max_queue_tokens: int | None = None  # of prompts that wait

    def check(self, message: Submit) -> None:
        """Raises ValueError for what would harm the step, or what the model does not give."""
        params = message.params
        no_output = 0 if params.max_tokens == 0 else None
        check_length(len(message.token_ids), self.max_model_len, max_tokens=no_output, min_tokens=params.min_tokens)
        params.check_vocabulary(self.vocab_size)
        if params.pooling is not None:
            self.pooler.check(params.pooling.dimensions)
        elif not self.generates:
            raise BadParameter(
                "model", "has no output head, only embeddings: post to /v1/embeddings, or call LLM.embed"
            )
        if params.prompt_logprobs is not None and not self.pooler.size:
            raise BadParameter("prompt_logprobs", f"cannot be had of this model: {self.pooler.refused}")
