"""Windows and chunks read off the functions that transformers makes masks with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel, masking_utils

from pagegraph.compiler.model.meta import auto_class
from pagegraph.compiler.model.probe import UnsupportedModel, _form, _Notes, _probed_attention, probe
from tests.compiler.architectures import tiny_config
from tests.compiler.model.every_type import tiny

NO_PADDING = torch.zeros(1, dtype=torch.int64, device="meta")
CAUSAL = masking_utils.causal_mask_function


def prefix(batch: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key < 4


def every_second(batch: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query - key) % 2 == 0


@pytest.mark.parametrize(
    "function, form",
    [
        (CAUSAL, (0, 0)),
        (masking_utils.sliding_window_causal_mask_function(1), (1, 0)),
        (masking_utils.sliding_window_causal_mask_function(9), (9, 0)),
        (masking_utils.sliding_window_causal_mask_function(131072), (131072, 0)),
        (masking_utils.chunked_causal_mask_function(7, NO_PADDING), (0, 7)),
        (masking_utils.chunked_causal_mask_function(8192, NO_PADDING), (0, 8192)),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(5), None),
        (masking_utils.or_masks(CAUSAL, prefix), None),
        (masking_utils.and_masks(CAUSAL, every_second), None),
        (masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(NO_PADDING[None])), None),
    ],
)
def test_masks_are_read_as_windows_and_chunks(function, form: tuple[int, int] | None) -> None:
    assert _form(function) == form


class CountsByPlace(LlamaForCausalLM):
    """Numbers the tokens of a step by their place in it, whatever positions it is given."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return super().forward(input_ids=input_ids + places, **given)


def test_a_forward_that_numbers_tokens_by_their_place_in_the_step_is_refused() -> None:
    with torch.device("meta"):
        model = CountsByPlace(tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match="llama: the forward numbers its tokens by their place in the step"):
        probe(model)


def test_a_tensor_that_attention_does_not_compute_with_is_refused() -> None:
    heads = torch.zeros(1, 2, 3, 8)
    mask = torch.ones(1, 1, 3, 3)
    mask.mask_function = CAUSAL

    def attend(**more: torch.Tensor) -> _Notes:
        layer = SimpleNamespace(notes=_Notes("toy"), layer_idx=0)
        _probed_attention(layer, heads, heads, heads, mask, **more)
        return layer.notes

    assert attend(position_ids=heads, s_aux=heads).layouts[0].has_sinks
    with pytest.raises(UnsupportedModel, match="toy: layer 0 hands indices to attention"):
        attend(indices=heads)


class EveryLogit(LlamaForCausalLM):
    """Gives logits of every token, by a body that no other may stand in for."""

    def forward(self, input_ids: torch.Tensor, logits_to_keep: Any = 0, **given: Any) -> Any:
        assert isinstance(self.model, LlamaModel)
        return super().forward(input_ids=input_ids, **given)


def test_a_forward_that_gives_more_logits_than_asked_for_and_has_no_body_is_refused() -> None:
    with torch.device("meta"):
        model = EveryLogit(tiny_config("llama"))
    with pytest.raises(
        UnsupportedModel, match="llama: the forward gives logits of 37 of 37 tokens where 2 are asked for"
    ):
        probe(model)


def test_layers_that_text_skips_have_no_layout() -> None:
    """Every fifth of Llama 3.2's attends to images alone."""
    with torch.device("meta"):
        model = auto_class(config := tiny("mllama")).from_config(config)
    skipped = set(config.text_config.cross_attention_layers) & set(range(4))
    assert skipped and {one.layer for one in probe(model).layouts} == set(range(4)) - skipped
