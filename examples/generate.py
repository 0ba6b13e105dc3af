"""Complete several prompts at once, each with its own sampling parameters.

python examples/generate.py [CONFIG]
"""

import sys

from pagegraph import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]

if __name__ == "__main__":
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "configs/smollm2-cpu.yaml")
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    sampled = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=1)
    for prompt, done in zip(PROMPTS, llm.generate(PROMPTS, [greedy, sampled, greedy])):
        print(f"{prompt!r} -> {done.text!r} ({len(done.token_ids)} tokens, {done.finish_reason})")
    llm.close()
