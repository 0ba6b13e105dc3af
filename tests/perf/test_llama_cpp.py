"""llama.cpp as a peer answers as it should, each sequence its own prompt: what is timed is the work that is meant."""

from __future__ import annotations

import pytest
import tokenizers

from tests.paths import MODELS

pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
GGUF = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_prompts_of_several_lengths_in_one_batch() -> None:
    from perf.llama_cpp import LlamaCpp
    from tests.clients.server import tokenizer_folder

    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json"))
    prompts = [backend.encode(text).ids for text in ("The capital of France is", "One, two, three, four,")]
    france, count = LlamaCpp(str(GGUF), 4, 128).generate(prompts, [2, 12])
    assert (len(france), len(count)) == (2, 12)
    assert backend.decode(france).startswith(" Paris") and "five, six, seven" in backend.decode(count)
