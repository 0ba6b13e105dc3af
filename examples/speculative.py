"""Speculative decoding with the n-gram proposer: the tokens of a run without it, in fewer steps where a text repeats.

python examples/speculative.py [CONFIG]
"""

import sys

from pagegraph import LLM, SamplingParams

PROMPT = "one two three four five six seven eight. one two three four five six seven eight. one two three"

if __name__ == "__main__":
    config = sys.argv[1] if len(sys.argv) > 1 else "configs/smollm2-cpu.yaml"
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    tokens = {}
    for method in (None, "ngram"):
        llm = LLM(config, speculative_method=method, num_speculative_tokens=None if method is None else 4)
        (done,) = llm.generate(PROMPT, params)
        tokens[method] = done.token_ids
        counted = [
            line for line in llm.metrics.render().decode().splitlines() if line.startswith("vllm:spec_decode_num")
        ]
        print(f"{method or 'none'}: {done.text!r}", *counted, sep="\n  ")
        llm.close()
    print("same tokens:", tokens[None] == tokens["ngram"])
