"""The prefill kernel for Hopper against the reference: on such a GPU alone, for Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.attention import cuda, prefill_hopper, reference
from tests.kernels.attention.cases import Case, check, clone

RAGGED = ((1, 17), (5, 5), (1, 1), (77, 137), (200, 1003), (2, 300), (129, 129), (33, 65))
MANY = tuple((1, 40 + n) if n % 3 else (2 + n % 50, 60 + n) for n in range(300))  # more than are counted at a time
PLAIN = Case(lengths=RAGGED, head_size=128, heads=8, kv_heads=2, dtype=torch.bfloat16)
FEATURES = [{}, {"window": 9}, {"window": 200, "sinks": True}, {"chunk": 64}, {"softcap": 5.0}, {"sinks": True}]
CASES = [Case(**{**vars(PLAIN), **features}) for features in FEATURES] + [
    Case(**{**vars(PLAIN), **changed})
    for changed in (
        {"head_size": 64},
        {"head_size": 64, "dtype": torch.float16, "window": 30},
        {"head_size": 256, "heads": 16},
        {"head_size": 256, "heads": 4, "kv_heads": 1, "dtype": torch.float16, "sinks": True},
        {"head_size": 256, "window": 200, "softcap": 5.0, "block_size": 128},
        {"head_size": 256, "chunk": 64, "lengths": MANY, "pad_seqs": 20},
        {"heads": 7, "kv_heads": 1},
        {"heads": 3, "kv_heads": 3, "block_size": 32},
        {"heads": 32, "kv_heads": 1, "softcap": 5.0, "sinks": True},
        {"lengths": MANY, "pad_seqs": 20},
        {"lengths": (), "pad_tokens": 4, "pad_seqs": 2},
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case) -> None:
    if not prefill_hopper.multiprocessors(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")
    expected_arguments = case.arguments()
    arguments = [one.cuda() if isinstance(one, torch.Tensor) else one for one in clone(expected_arguments)]
    assert prefill_hopper.takes(arguments[0], arguments[3], arguments[4])
    expected = reference.paged_attention(*expected_arguments)
    out = cuda.paged_attention(*arguments).cpu()
    there = [one.cpu() if isinstance(one, torch.Tensor) else one for one in arguments]
    check(out, there, expected, expected_arguments)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(
        size: int = 128, dtype: torch.dtype = torch.bfloat16, cache: torch.dtype | None = None, stride: int = 1024
    ):
        query = torch.empty_strided((2, 8, size), (stride, size, 1), dtype=dtype, device="meta")
        caches = [torch.empty(4, 16, 2, size, dtype=cache or dtype, device="meta") for _ in range(2)]
        return prefill_hopper.takes(query, *caches)

    assert not takes()  # no such GPU here
    monkeypatch.setattr(prefill_hopper, "multiprocessors", lambda device: 132)
    assert takes() and takes(64) and takes(256) and takes(dtype=torch.float16)
    assert not takes(192) and not takes(80) and not takes(dtype=torch.float32) and not takes(stride=1032)
    assert not takes(cache=torch.float8_e4m3fn)
