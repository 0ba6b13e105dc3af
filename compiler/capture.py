"""A transformers decoder becomes one function over paged KV memory.

Registers our attention with transformers' `AttentionInterface` and calls the model's own forward, so no
model code lives here. What varies between architectures (heads, head sizes, scale, window, chunk, soft
cap, sinks) is read off one forward on the meta device, layer by layer, and refused where it is not
something the paged op computes. Knows nothing of weights on disk, compilation or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

import kernels.ops  # noqa: F401  registers torch.ops.pagegraph

ATTENTION_NAME = "pagegraph"
SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class UnsupportedModel(ValueError):
    """The model would not run, or not run right, through paged attention; the message says why."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """What one layer's attention computes, as probed. Sizes in elements; 0 switches a feature off."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int
    chunk: int
    softcap: float
    has_sinks: bool


@dataclass(slots=True)
class PagedBatch:
    """Where the tokens of one step live; see `kernels.ops` for shapes and dtypes."""

    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    key_caches: list[torch.Tensor]
    value_caches: list[torch.Tensor]


class PagedContext:
    """What the attention of one model reads during a forward: layouts, and the batch of the moment.

    Every module of the model carries a reference to its own model's context, so two captured models
    (a target and a draft) never see each other's batch.
    """

    def __init__(self) -> None:
        self.layouts: list[AttentionLayout] = []
        self.probed: dict[int, AttentionLayout] | None = None
        self.batch: PagedBatch | None = None


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, *] -> [1, T, Hq, Dv]."""
    context: PagedContext = module.paged_context
    if context.probed is not None:
        context.probed[module.layer_idx] = _layout_of(module, query, key, value, scaling, kwargs)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    layout = context.layouts[module.layer_idx]
    batch = context.batch
    out = torch.ops.pagegraph.paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch.key_caches[module.layer_idx],
        batch.value_caches[module.layer_idx],
        batch.positions,
        batch.slots,
        batch.block_tables,
        batch.query_start,
        batch.seq_lens,
        kwargs.get("s_aux"),
        layout.scale,
        layout.window,
        layout.softcap,
        layout.chunk,
    )
    return out[None], None


def _layout_of(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> AttentionLayout:
    config = module.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[module.layer_idx] if layer_types else None
    window = kwargs.get("sliding_window") or 0
    if kind in ("full_attention", "chunked_attention"):
        window = 0
    elif kind == "sliding_attention" and not window:
        window = config.sliding_window
    return AttentionLayout(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=key.shape[3],
        value_size=value.shape[3],
        scale=float(scaling) if scaling is not None else query.shape[3] ** -0.5,
        window=int(window),
        chunk=int(config.attention_chunk_size) if kind == "chunked_attention" else 0,
        softcap=float(kwargs.get("softcap") or 0.0),
        has_sinks=kwargs.get("s_aux") is not None,
    )


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class CapturedModel(nn.Module):
    """The whole forward as one function of tensors: token ids in, logits of the wanted tokens out."""

    def __init__(self, model: nn.Module, context: PagedContext) -> None:
        super().__init__()
        self.model = model
        self.context = context

    @property
    def layouts(self) -> list[AttentionLayout]:
        return self.context.layouts

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        logits_index: torch.Tensor,
        key_caches: list[torch.Tensor],
        value_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """token_ids, positions, slots int32 [T]; logits_index int64 [S] of token rows -> logits [S, vocab]."""
        self.context.batch = PagedBatch(
            positions, slots, block_tables, query_start, seq_lens, key_caches, value_caches
        )
        out = self.model(
            input_ids=token_ids.long()[None],
            position_ids=positions.long()[None],
            use_cache=False,
            logits_to_keep=logits_index,
        )
        return out.logits[0]


def capture(model: nn.Module) -> CapturedModel:
    """Probe `model` (built on the meta device with our attention) and wrap it.

    Raises UnsupportedModel where a layer mixes tokens outside our op or in a way it does not compute.
    """
    context = PagedContext()
    context.layouts = _probe(model)
    _attach(model, context)
    return CapturedModel(model.eval(), context)


def _attach(model: nn.Module, context: PagedContext) -> None:
    for module in model.modules():
        module.paged_context = context
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            # It reads token ids back from the device to look for padding; here padding has no meaning.
            module.warn_if_padding_and_no_attention_mask = _no_warning


def _no_warning(*_: Any) -> None:
    """Stands for a transformers check that does not apply to packed sequences."""


def _probe(original: nn.Module) -> list[AttentionLayout]:
    config = original.config.get_text_config()
    _refuse_unserved_layer_types(config)
    # A shadow of the model: in bfloat16, the type that grouped expert matmuls accept on the meta device.
    with torch.device("meta"):
        model = type(original)._from_config(original.config, dtype=torch.bfloat16)
    context = PagedContext()
    context.probed = {}
    _attach(model, context)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    position_ids = torch.arange(2, device="meta")[None]
    try:
        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.long, device="meta"),
            )
    except Exception as error:
        raise UnsupportedModel(
            f"{config.model_type}: the forward does not run on packed sequences without a cache "
            f"({type(error).__name__}: {error})"
        ) from error
    seen = context.probed
    layers = config.num_hidden_layers
    if sorted(seen) != list(range(layers)):
        raise UnsupportedModel(
            f"{config.model_type}: {len(seen)} of {layers} layers attend through the attention interface; "
            "the others would run without their state and give wrong answers. Serve a model whose every "
            "layer is full, sliding-window or chunked attention."
        )
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise UnsupportedModel(f"{config.model_type}: attention is not causal; only decoders are served")
    return [seen[layer] for layer in range(layers)]


def _refuse_unserved_layer_types(config: PretrainedConfig) -> None:
    types = set(getattr(config, "layer_types", None) or ())
    if unserved := sorted(types - SERVED_LAYER_TYPES):
        raise UnsupportedModel(
            f"{config.model_type}: layer types {', '.join(unserved)} keep a recurrent or other state that "
            f"paged attention does not hold; served are {', '.join(sorted(SERVED_LAYER_TYPES))}"
        )
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        raise UnsupportedModel(f"{config.model_type}: ALiBi position biases are not computed by paged attention")
