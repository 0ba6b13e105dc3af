"""Print a completion as its text comes, up to a stop string.

python examples/stream.py [CONFIG]
"""

import sys

from pagegraph import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "configs/smollm2-cpu.yaml")
    params = SamplingParams(max_tokens=48, temperature=0.0)
    for piece in llm.stream("A short list of colours:", params, stop="\n\n"):
        print(piece, end="", flush=True)
    print()
    llm.close()
