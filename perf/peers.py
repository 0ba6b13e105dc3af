"""transformers as a peer, its ways to generate: one prompt after the other, static padded batches, continuous batching.

Each way does greedy work of exact output lengths and says when each request had its first token, counted from the start
of all of them. Knows models of transformers; knows nothing of this engine.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Answered:
    """Seconds of all requests, and until the first token of each."""

    seconds: float
    first_token_s: list[float]


Way = Callable[[torch.nn.Module, Prompts, Sequence[int]], Answered]


def load(folder: Path, device: str, dtype: str, dummy: bool) -> torch.nn.Module:
    """A model with SDPA attention, of random weights where `dummy`."""
    given = dict(dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if dummy:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **given)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **given)
    model = model.to(device).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def generate(model: torch.nn.Module, prompts: Prompts, num_tokens: int) -> float:
    """One static batch, padded left to its longest prompt, to `num_tokens` outputs each; when its first tokens were there."""
    longest, device = max(map(len, prompts)), model.device
    clock = _Clock(device)
    with torch.inference_mode():
        model.generate(
            torch.tensor([[0] * (longest - len(one)) + one for one in prompts], device=device),
            attention_mask=torch.tensor(
                [[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device
            ),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
        )
    assert clock.first is not None
    return clock.first


def static_batches(size: int) -> Way:
    """`size` prompts at a time, each batch to its longest answer."""

    def way(model: torch.nn.Module, prompts: Prompts, lengths: Sequence[int]) -> Answered:
        begin, firsts = time.perf_counter(), []
        for at in range(0, len(prompts), size):
            part = prompts[at : at + size]
            firsts += [generate(model, part, max(lengths[at : at + size])) - begin] * len(part)
        _wait(model.device)
        return Answered(time.perf_counter() - begin, firsts)

    return way


def continuous(model: torch.nn.Module, prompts: Prompts, lengths: Sequence[int]) -> Answered:
    """Its continuous batching over a paged cache with blocks for all; on a CPU it asks psutil for memory.

    Raises RuntimeError if a request has not its length.
    """
    if model.device.type == "cpu" and importlib.util.find_spec("psutil") is None:
        raise RuntimeError("continuous batching of transformers needs psutil on a CPU: pip install psutil")
    model.set_attn_implementation("paged|sdpa")
    config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=max(lengths))
    capacity = sum(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    block = 16
    paging = ContinuousBatchingConfig(
        block_size=block,
        num_blocks=capacity // block + 2 * len(prompts),
        max_batch_tokens=2048,
    )
    try:
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=paging
            ) as manager,
        ):
            begin = time.perf_counter()
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(prompt, str(number), max_new_tokens=length, record_timestamps=True)
            done: dict[str, object] = {}
            for output in manager:
                if output.is_finished():
                    done[output.request_id] = output
                if len(done) == len(prompts):
                    break
            seconds = time.perf_counter() - begin
    finally:
        model.set_attn_implementation("sdpa")
    outputs = [done.get(str(number)) for number in range(len(prompts))]
    for output, length in zip(outputs, lengths):
        if output is None or output.error or len(output.generated_tokens) != length:
            raise RuntimeError(f"a request of continuous batching failed: {getattr(output, 'error', 'no answer')}")
    return Answered(seconds, [output.timestamps[0] - begin for output in outputs])


class _Clock(LogitsProcessor):
    """Changes no logits; knows when the first came."""

    def __init__(self, device: torch.device) -> None:
        self.first: float | None = None
        self._device = device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            _wait(self._device)
            self.first = time.perf_counter()
        return scores


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
