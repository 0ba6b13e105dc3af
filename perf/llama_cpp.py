"""llama.cpp as a peer on the CPU, of the same GGUF file (`pip install llama-cpp-python`, which compiles it for this processor).

As it goes fastest: as many threads as processors, flash attention, prompts in batches of 512 tokens, then every sequence
that is not done in each batch, greedy. Knows llama.h as that package binds it; knows nothing of this engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

CHUNK = 512  # tokens of a batch
Row = tuple[int, int, int, bool]  # token, position, sequence, whether a token is sampled behind it


class LlamaCpp:
    """The model of `path` with room for `num_seqs` sequences of `max_len` tokens. Raises RuntimeError if it does not load."""

    def __init__(self, path: str, num_seqs: int, max_len: int) -> None:
        from llama_cpp import llama_cpp as api  # here and not above: it is not installed everywhere

        self._api: Any = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        given = api.llama_context_default_params()
        given.n_ctx, given.n_seq_max = num_seqs * max_len, num_seqs
        given.n_batch = given.n_ubatch = CHUNK
        given.n_threads = given.n_threads_batch = os.cpu_count() or 1
        given.flash_attn_type = 1  # enabled
        self._context = api.llama_init_from_model(model, given) if model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._batch = api.llama_batch_init(CHUNK, 0, 1)
        self._sampler = api.llama_sampler_init_greedy()

    def system_info(self) -> str:
        """What instructions it was compiled for."""
        return self._api.llama_print_system_info().decode()

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Outputs of exact lengths, all prompts at once. Raises RuntimeError if a batch is refused."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        outputs: list[list[int]] = [[] for _ in prompts]
        rows: list[Row] = [
            (token, at, number, at == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for at in range(0, len(rows), CHUNK):
            self._decode(rows[at : at + CHUNK], outputs)
        while left := [number for number, length in enumerate(lengths) if len(outputs[number]) < length]:
            self._decode([(outputs[n][-1], len(prompts[n]) + len(outputs[n]) - 1, n, True) for n in left], outputs)
        return outputs

    def _decode(self, rows: list[Row], outputs: list[list[int]]) -> None:
        """One batch; what is sampled goes to the end of its sequence's outputs."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (token, position, number, sampled) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = (
                token,
                position,
                1,
                number,
                sampled,
            )
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp refuses a batch of {len(rows)} tokens: {code}")
        for at, (_, _, number, sampled) in enumerate(rows):
            if sampled:
                outputs[number].append(self._api.llama_sampler_sample(self._sampler, self._context, at))
