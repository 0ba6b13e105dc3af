"""vLLM on the work that `perf.gpu.engine_steps.engine` gives our engine: one JSON line a case.

Runs where vLLM is installed, in an environment of its own, where pagegraph is not: the folder of the work is found by this
file's place. Random weights, greedy, EOS ignored, exact output lengths. Recurrent states are float32, as ours are. Knows vLLM by
its public `LLM`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from perf import workloads

MAX_NUM_SEQS = 256


def spread(model: object) -> None:
    """Larger embeddings, norms of one and larger routers, in place, in each of vLLM's workers.

    vLLM draws every dummy weight within 0.001 and from one seed, so that a sequence repeats two tokens and every layer of a
    mixture chooses the same experts for them: its rate then tells nothing about tokens that differ, as a text's do.
    """
    import torch

    torch.manual_seed(0)  # the same on every worker
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name or name.endswith("embeddings.weight"):
                weight.normal_()
            elif weight.ndim == 1 and "norm" in name:
                weight.fill_(1)
            elif name.endswith((".gate.weight", ".router.weight")) and weight.dtype.itemsize > 1:
                weight.normal_(std=weight.shape[1] ** -0.5)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--peer", type=Path, required=True, help="folder with the work")
    p.add_argument("--model", required=True, help="folder with a config.json")
    p.add_argument("--case", nargs="+", required=True, help="each a name, or NAME:SHARE of its requests")
    p.add_argument("--scale", type=float, default=1.0, help="share of the requests of a case")
    p.add_argument("--max-model-len", type=int, default=8192)
    p.add_argument("--quantization")
    p.add_argument("--tensor-parallel-size", type=int, default=1)
    p.add_argument("--expert-parallel", action="store_true")
    p.add_argument("--prefix-caching", action="store_true")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    vocab_size = json.loads(Path(args.model, "config.json").read_text())["vocab_size"]
    begin = time.perf_counter()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `spread` travels to its workers

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=args.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0, quantization=args.quantization,
        max_model_len=args.max_model_len, max_num_seqs=MAX_NUM_SEQS, enable_prefix_caching=args.prefix_caching,
        tensor_parallel_size=args.tensor_parallel_size, enable_expert_parallel=args.expert_parallel,
        mamba_ssm_cache_dtype="float32",
        additional_config={"gdn_prefill_backend": "triton"},  # its own choice is FlashInfer's, which its kit has not
    )  # fmt: skip
    llm.apply_model(spread)

    def emit(**row: object) -> None:
        with open(args.out, "a") as out:
            out.write(json.dumps({**row, "prefix_caching": args.prefix_caching}) + "\n")

    def run(rounds: list[workloads.Round]) -> tuple[float, float]:
        """Seconds, and how different the tokens of the last round are."""
        start, outputs = time.perf_counter(), []
        for prompts, lengths in rounds:
            params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths]
            answers = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
            outputs = [answer.outputs[0].token_ids for answer in answers]
            assert list(map(len, outputs)) == lengths
        return time.perf_counter() - start, workloads.distinct(outputs)

    emit(case="startup", init_s=time.perf_counter() - begin)
    make = workloads.of_peer(args.peer)
    for case, _, share in (one.partition(":") for one in args.case):
        work = make(case, vocab_size, float(share or 1) * args.scale)
        run(work.warm)
        seconds, distinct = sorted(run(work.rounds) for _ in range(work.repeat))[work.repeat // 2]
        emit(
            case=case, requests=work.requests, wall_s=seconds, out_tok_s=work.output_tokens / seconds,
            total_tok_s=(work.prompt_tokens + work.output_tokens) / seconds, distinct=distinct,
        )  # fmt: skip


if __name__ == "__main__":
    main()
