"""What each sampling parameter does to the tokens of a real model, through the whole engine."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(900)  # the first test compiles the model

PROMPT = "The three primary colours are"


def greedy(**changed: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **changed})


def ids_of(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> list[int]:
    return llm.generate([prompt], params)[0].token_ids


def ids_of_each(llm: LLM, each: list[SamplingParams]) -> list[list[int]]:
    """What follows PROMPT, once with each parameters, in the same steps."""
    return [done.token_ids for done in llm.generate([PROMPT] * len(each), each)]


def logits_after(model: torch.nn.Module, prompt: list[int], outputs: list[int]) -> torch.Tensor:
    """[len(outputs), vocabulary]: those that each output was chosen by."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + outputs])).logits[0, len(prompt) - 1 : -1]
    return logits.clone()  # one that may be written to


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(llm) -> None:
    drawn = greedy(temperature=0.9, top_p=0.95, seed=7)
    alone = ids_of(llm, drawn)
    others = [greedy(temperature=1.3, seed=n) for n in range(5)] + [greedy(), greedy(top_k=3, temperature=2.0, seed=1)]
    crowd = llm.generate([PROMPT, *(f"Number {n}:" for n in range(7))], [drawn, *others])
    assert crowd[0].token_ids == alone
    assert ids_of(llm, greedy(temperature=0.9, top_p=0.95, seed=8)) != alone


def test_requests_without_a_seed_differ(llm) -> None:
    done = llm.generate([PROMPT] * 4, greedy(temperature=1.5))
    assert len({tuple(one.token_ids) for one in done}) > 1


def test_top_k_one_and_tiny_top_p_are_greedy(llm) -> None:
    narrow = [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)]
    expected, *got = ids_of_each(llm, [greedy(), *(greedy(temperature=1.0, seed=3, **one) for one in narrow)])
    assert got == [expected] * len(narrow)


def test_allowed_ids_and_bias(llm) -> None:
    allowed = [100, 2000, 30000]
    asked = [dict(allowed_token_ids=allowed, temperature=1.0, seed=0), dict(logit_bias={777: 100.0}), dict()]
    held, biased, (first, *_) = ids_of_each(llm, [greedy(**one) for one in asked])
    assert set(held) <= set(allowed) and biased == [777] * 12
    assert ids_of(llm, greedy(logit_bias={first: -100.0}, max_tokens=1))[0] != first


def test_min_tokens_holds_the_end_back(llm) -> None:
    free = ids_of(llm, greedy())
    stop = free[2]
    stopped, held = ids_of_each(llm, [greedy(stop_token_ids=[stop]), greedy(stop_token_ids=[stop], min_tokens=6)])
    assert stopped == free[: free.index(stop) + 1]
    assert stop not in held[:6] and len(held) >= 6


def test_penalties_follow_their_definitions(llm, model) -> None:
    """Step by step against the formulas on transformers' logits."""
    params = greedy(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6)
    prompt = llm.tokenizer.encode(PROMPT)
    outputs, plain = ids_of_each(llm, [params, greedy()])
    for at, (token, logits) in enumerate(zip(outputs, logits_after(model, prompt, outputs), strict=True)):
        before = outputs[:at]
        for seen in set(prompt + before):
            logits[seen] = logits[seen] / 1.3 if logits[seen] > 0 else logits[seen] * 1.3
        for seen in set(before):
            logits[seen] -= 0.4 + 0.6 * before.count(seen)
        assert logits.max() - logits[token] < 1e-3
    assert outputs != plain


def test_penalties_survive_preemption(config_of, built) -> None:
    params = greedy(max_tokens=36, repetition_penalty=1.3, frequency_penalty=0.5)
    prompts = [f"Story number {n}: once upon a time" for n in range(3)]
    expected = [done.token_ids for done in LLM(config_of(), built=built).generate(prompts, params)]
    tight = LLM(config_of(), built=dataclasses.replace(built, num_blocks=9, max_model_len=128))
    got = [done.token_ids for done in tight.generate(prompts, params)]
    assert tight.engine.scheduler.counters.preemptions > 0
    assert got == expected


def test_logprobs_are_those_of_the_raw_logits(llm, model) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    done = llm.generate([PROMPT], greedy(max_tokens=4, logprobs=3, logit_bias={777: 100.0}))[0]
    raw = logits_after(model, prompt, done.token_ids).log_softmax(-1)
    for token, entry, expected in zip(done.token_ids, done.logprobs, raw, strict=True):
        assert entry.token_id == token == 777
        assert math.isclose(entry.logprob, expected[token].item(), abs_tol=1e-3)
        assert entry.rank == (expected > expected[token]).sum().item() + 1
        assert entry.top_ids == expected.topk(3).indices.tolist()


def test_stop_strings_cut_the_text(llm) -> None:
    whole = llm.generate([PROMPT], greedy(max_tokens=24))[0].text
    word = whole.split()[3]
    cut = llm.generate([PROMPT], greedy(max_tokens=24), stop=[word])[0]
    assert cut.text == whole[: whole.index(word)] and cut.finish_reason == "stop" and cut.stop_reason == word


def test_more_prompts_than_a_server_would_queue(config_of, built) -> None:
    done = LLM(config_of(max_queue=4), built=built).generate([[n + 100] for n in range(48)], greedy(max_tokens=1))
    assert len(done) == 48 and all(len(one.token_ids) == 1 for one in done)


def test_a_chat_is_the_templated_prompt(llm) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    chat = llm.chat(messages, greedy())
    assert chat.token_ids == ids_of(llm, greedy(), llm.tokenizer.apply_chat(messages))


def test_a_tiny_temperature_is_greedy(llm) -> None:
    tiny = [dict(temperature=1e-38), dict(temperature=1.0, top_p=0.0)]
    expected, *got = ids_of_each(llm, [greedy(), *(greedy(seed=5, **one) for one in tiny)])
    assert got == [expected] * 2


def test_draft_tokens_want_a_model_that_was_built_for_them(config_of, built) -> None:
    with pytest.raises(ValueError, match="built without draft tokens by ngram"):
        LLM(config_of(speculative_method="ngram"), built=built)
