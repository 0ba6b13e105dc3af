"""The sampler reference, and the Triton Gumbel-max kernel against it."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels import ops  # noqa: F401  ops registers torch.ops.pagegraph
from pagegraph.kernels.sampling import cpp, reference


def parameters(rows: int, **changed: float) -> dict[str, torch.Tensor]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changed
    return {
        name: torch.full((rows,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in values.items()
    } | {"seeds": torch.arange(rows) * 7919 - 3, "positions": torch.arange(rows, dtype=torch.int32)}


def draws(logits: torch.Tensor, rows: int = 20_000, **changed: float) -> torch.Tensor:
    """Relative frequency of every token over `rows` independent draws from one row of logits."""
    ids = reference.sample(logits.expand(rows, -1), **parameters(rows, **changed))
    return ids.bincount(minlength=logits.shape[-1]) / rows


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        torch.testing.assert_close(draws(logits, temperature=temperature), expected, atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.55}, [0, 1]),  # 0.5 is not enough: the token that crosses stays
        ({"top_p": 0.45}, [0]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.5}, [0, 1]),  # 0.25 >= 0.5 * 0.5 stays
        ({"top_k": 3, "top_p": 0.7}, [0, 1]),  # 0.5 / 0.9 + 0.25 / 0.9 = 0.83 of what top-k left
        ({"top_k": 1, "min_p": 0.1}, [0]),
    ],
)
def test_filters_keep(changed: dict[str, float], kept: list[int]) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    got = draws(probabilities.log(), **changed)
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(got, expected, atol=0.015, rtol=0)


def test_temperature_zero_is_argmax_beside_sampled_rows() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    p = parameters(64, top_k=5)
    p["temperature"][::2] = 0
    ids = reference.sample(logits, **p)
    assert torch.equal(ids[::2], logits.argmax(-1)[::2])
    assert not torch.equal(ids[1::2], logits.argmax(-1)[1::2])


def test_noise_does_not_depend_on_the_batch() -> None:
    seeds, positions = torch.tensor([5, -9, 2**62]), torch.tensor([0, 3, 100_000], dtype=torch.int32)
    whole = reference.gumbel(seeds, positions, 1000)
    for row in range(3):
        assert torch.equal(whole[row : row + 1], reference.gumbel(seeds[row : row + 1], positions[row : row + 1], 1000))
    assert torch.equal(whole[:, :10], reference.gumbel(seeds, positions, 10))
    assert torch.isfinite(whole).all()


def test_bits_are_fixed_for_ever() -> None:
    """A stored seed must give the same text in later versions."""
    bits = reference.random_bits(torch.tensor([0, 1, -1]), torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32), 2)
    assert bits.tolist() == [[668225722, 1897194175], [2948995635, 1751885285], [2708329702, 1581719521]]


def test_streams_are_unrelated() -> None:
    """Neighbouring seeds and positions give uncorrelated noise of the right mean and variance."""
    seeds, positions = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    noise = reference.gumbel(seeds.flatten(), positions.flatten().int(), 4096)
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - 1.6449) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 0.08  # 4096 samples: 0.08 is five standard deviations


def test_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    counts = torch.tensor([[2, 1, 0, 0]], dtype=torch.int32)
    prompt = torch.tensor([[False, False, True, False]])
    one = torch.ones(1)
    got = reference.apply_penalties(logits, counts, prompt, one * 2, one * 0.25, one * 0.125)
    assert got.tolist() == [[2 / 2 - 0.25 - 0.25, -2 * 2 - 0.125 - 0.25, 1 / 2, 0.5]]
    off = reference.apply_penalties(logits, counts, prompt, one, one * 0, one * 0)
    assert torch.equal(off, logits)


def test_sample_compiles_whole() -> None:
    logits = torch.randn(6, 300)
    for filters in ({"top_k": 5, "top_p": 0.8, "min_p": 0.01}, {}):
        p = parameters(6, **filters)
        compiled = torch.compile(lambda x, p=p: reference.sample(x, **p), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits), reference.sample(logits, **p))


def test_random_bits_equal_in_triton(triton_calls) -> None:
    """The kernel's draw is the reference's draw, tens of thousands of tokens and odd seeds included."""
    generator = torch.Generator().manual_seed(1)
    for vocab in (5, 2048, 5000):
        logits = torch.randn(7, vocab, generator=generator)
        logits[2, :3] = -torch.inf
        p = parameters(7)
        p["seeds"] = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 12345678901])
        p["positions"] = torch.tensor([0, 1, 2, 2**31 - 1, 77, 5, 6], dtype=torch.int32)
        p["temperature"] = torch.tensor([0.0, 1.0, 0.7, 2.0, 1.5, 0.0, 100.0])
        drawn = (logits, p["temperature"], p["seeds"], p["positions"])
        expected = reference.gumbel_argmax(*drawn)
        slots, sampled = (
            torch.tensor([3, 0, 8, 9, 1, 4, 9], dtype=torch.int32),
            torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.int32),
        )
        last, at = (torch.full((10,), -7, dtype=torch.int32) for _ in range(2))
        handed, stands = last.clone(), at.clone()
        handed[[3, 0, 8, 1, 4]] = expected[[0, 1, 2, 4, 5]].int()
        stands[[3, 0, 8, 1, 4]] = p["positions"][[0, 1, 2, 4, 5]]
        ids, after = triton_calls.call("pagegraph.kernels.sampling.gumbel", "sample", *drawn, slots, sampled, last, at)
        assert torch.equal(ids, expected) and torch.equal(after[-2], handed) and torch.equal(after[-1], stands)
        assert torch.equal(torch.ops.pagegraph.sample(*drawn, slots, sampled, last, at), expected)
        assert torch.equal(last, handed) and torch.equal(at, stands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_first(triton_calls, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 5000, dtype=dtype)
    logits[1, [1000, 4000]] = 3
    zero = torch.zeros(2)
    whole = zero.int()
    ids, _ = triton_calls.call(
        "pagegraph.kernels.sampling.gumbel",
        "sample",
        logits,
        zero,
        zero.long(),
        whole,
        whole,
        whole,
        whole,
        whole.clone(),
    )
    assert ids.tolist() == [0, 1000]
    assert torch.ops.pagegraph.sample(
        logits, zero, zero.long(), whole, whole, whole, whole, whole.clone()
    ).tolist() == [
        0,
        1000,
    ]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 5003])
def test_the_cpu_draws_as_the_reference(
    built: bool, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows beside others, all negative, with infinities and with ties; only what is sampled is handed on."""
    monkeypatch.setattr(cpp, "_kernel", None)
    if built:
        cpp.build()
        assert cpp._kernel is not None
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(6, vocab, generator=generator) * 4).round(decimals=1).to(dtype)
        logits[1] = -logits[1].abs() - 1
        logits[2, vocab // 2 :] = -torch.inf
        logits[3] = torch.inf if vocab == 1 else -1e30
        temperature = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.7, 1.0 if seed % 2 else 0.0])
        drawn = logits, temperature, torch.arange(6) * 31, torch.arange(6, dtype=torch.int32) + seed
        slots, sampled = (
            torch.tensor([3, 0, 8, 9, 1, 4], dtype=torch.int32),
            torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.int32),
        )
        last, at = (torch.full((10,), -7, dtype=torch.int32) for _ in range(2))
        expected, handed, stands = reference.gumbel_argmax(*drawn), last.clone(), at.clone()
        kept = sampled > 0
        handed[slots[kept].long()], stands[slots[kept].long()] = expected[kept].int(), drawn[3][kept]
        assert torch.equal(torch.ops.pagegraph.sample(*drawn, slots, sampled, last, at), expected)
        assert torch.equal(last, handed) and torch.equal(at, stands)
