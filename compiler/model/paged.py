"""A transformers decoder becomes one function over paged KV memory and pools of recurrent state.

Registers our attention with transformers' `AttentionInterface` and calls the model's own forward, so no
model code lives here; experts of mixtures (`compiler.model.experts`) and layers with state (`compiler.model.recurrent`)
likewise. What varies between architectures is what
`compiler.model.probe` found, a layout a layer. Knows nothing of weights on disk, compilation or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.model.experts import take_experts
from pagegraph.compiler.model.forward_local import forward_local
from pagegraph.compiler.model.head import NoHead, head_logits, hidden_states_of, with_hidden_states
from pagegraph.compiler.model.left_out import leave_out
from pagegraph.compiler.model.probe import AttentionLayout, Probed, UnsupportedModel, ask_for_no_padding, probe
from pagegraph.compiler.model.recurrent import PooledRecurrence, take_recurrence
from pagegraph.compiler.model.stand_in_cache import StandInCache, cache_arguments
from pagegraph.compiler.tensor_parallel.modules import join, narrow
from pagegraph.compiler.tensor_parallel.plan import sharding_of
from pagegraph.compiler.tensor_parallel.shards import ALONE, Ranks, Sharding

ATTENTION_NAME = "pagegraph"

# Of a forward: logits [S, vocab] of the wanted tokens, and hidden states [1, T, H] of all, which the head reads; None
# where they are not to be had.
Forwarded = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(slots=True)
class PagedBatch:
    """Where the tokens of one step live, and what the layers compute; see `kernels.ops` for shapes and dtypes."""

    layouts: list[AttentionLayout]
    places: dict[int, int]  # layer -> index in the lists of layouts and caches
    section: int
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    key_caches: list[torch.Tensor]
    value_caches: list[torch.Tensor]


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
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, *] -> [1, T, Hq, Dv].

    The batch is that of the forward that this thread is in: not every model hands keyword arguments down to here.
    """
    batch: PagedBatch = forward_local.paged
    at = batch.places[module.layer_idx]
    layout = batch.layouts[at]
    out = torch.ops.pagegraph.paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch.key_caches[at],
        batch.value_caches[at],
        batch.positions,
        batch.slot_mapping,
        batch.block_tables,
        batch.query_start,
        batch.seq_lens,
        kwargs.get("s_aux"),
        layout.scale,
        layout.window,
        layout.softcap,
        layout.chunk,
        **({"section": batch.section} if batch.section else {}),
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class PagedModel(nn.Module):
    """The whole forward as one function of tensors: token ids in, logits of the wanted tokens and hidden states out."""

    def __init__(self, model: nn.Module, probed: Probed, section: int = 0, sharding: Sharding | None = None) -> None:
        """section: of attention, see `kernels.ops`; sharding: of a model that ranks share."""
        super().__init__()
        self.section = section
        self.model = model
        self.layouts, self.states = probed.layouts, probed.states
        self.cache = probed.cache
        self._places = {layout.layer: at for at, layout in enumerate(probed.layouts)}
        self._state_places = {layout.layer: at for at, layout in enumerate(probed.states)}
        recurrent = [layout.layer for layout in probed.states if layout.recurrent]
        self._recurrent_places = {layer: at for at, layer in enumerate(recurrent)}
        self.body, self.hidden_size = probed.body, probed.hidden_size
        self.sharding = sharding
        if self.body:
            keep = _keep_hidden if probed.takes_rows else _keep_hidden_and_give_rows
            model.get_submodule(self.body).register_forward_hook(keep)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        logits_index: torch.Tensor,
        key_caches: list[torch.Tensor],
        value_caches: list[torch.Tensor],
        conv_states: list[torch.Tensor],
        recurrent_states: list[torch.Tensor],
        conv_drafts: list[torch.Tensor],
        recurrent_drafts: list[torch.Tensor],
        state_lens: list[torch.Tensor],
    ) -> Forwarded:
        """token_ids, positions, slot_mapping int32 [T]; slots int32 [S]; logits_index int64 [S] of token rows.

        Caches of the layers that attend and states of those that keep any, in the order of the layouts; the last three are
        empty where no step has draft tokens, and state_lens is one tensor (`compiler.step.caches`).
        """
        forward_local.paged = PagedBatch(
            self.layouts,
            self._places,
            self.section,
            positions,
            slot_mapping,
            block_tables,
            query_start,
            seq_lens,
            key_caches,
            value_caches,
        )
        forward_local.products, forward_local.rows = {}, logits_index
        position_ids = positions.long()[None]

        def recurrence_of(layer: int) -> PooledRecurrence:
            at, place = self._recurrent_places.get(layer), self._state_places[layer]
            recurrent = None if at is None else recurrent_states[at]
            step = slots, query_start, seq_lens
            if not state_lens:
                return PooledRecurrence(conv_states[place], recurrent, *step)
            kept = None if at is None else recurrent_drafts[at]
            return PooledRecurrence(conv_states[place], recurrent, *step, conv_drafts[place], kept, state_lens[0])

        given = {}
        if self.cache:
            past = StandInCache(position_ids, recurrence_of if self.states else None)
            given = cache_arguments(self.cache, past, position_ids)
        try:
            out = self.model(
                input_ids=token_ids.long()[None],
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=logits_index,
                **given,
            )
            hidden = forward_local.hidden
            if state_lens:
                torch.ops.pagegraph.count_states(state_lens[0], slots, query_start, seq_lens)
        finally:
            forward_local.paged = forward_local.products = forward_local.hidden = None
            forward_local.recurrence = forward_local.rows = None
        return out.logits[0], hidden

    @property
    def deterministic(self) -> bool:
        """Whether a token's bits do not depend on the rest of its step."""
        return self.section > 0

    @property
    def has_head(self) -> bool:
        """Whether its logits mean anything."""
        return not isinstance(self.model.get_output_embeddings(), NoHead)

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] of hidden states [R, H], as the forward computes them. Only where there is a body."""
        forward_local.products = {}
        try:
            return head_logits(self.model, self.body, hidden_states)
        finally:
            forward_local.products = None


def _keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
    forward_local.hidden = hidden_states_of(output)


def _keep_hidden_and_give_rows(module: nn.Module, args: Any, output: Any) -> Any:
    """For a head that would compute logits of every token."""
    _keep_hidden(module, args, output)
    return with_hidden_states(output, forward_local.hidden[:, forward_local.rows])


def wrap_model(model: nn.Module, section: int = 0, ranks: Ranks = ALONE) -> PagedModel:
    """Probe `model` (built on the meta device with our attention) and wrap it; section: of attention, see `kernels.ops`.

    Of several ranks each gets its share, to be joined with the others' once it has weights (`PagedModel.sharding`). Raises
    UnsupportedModel where a layer mixes tokens outside our ops or in a way they do not compute, Indivisible where so many ranks
    cannot share the model.
    """
    probed, sharding = probe(model), None
    if ranks.size > 1:
        sharding = sharding_of(model, probed, ranks)
        probed = probe_share(model, probed, sharding)
        narrow(model, sharding)
    leave_out(model, probed.towers)
    ask_for_no_padding(model)
    take_experts(model)
    take_recurrence(model)
    return PagedModel(model.eval(), probed, section, sharding)


def probe_share(model: Any, whole: Probed, sharding: Sharding) -> Probed:
    """What one rank's layers compute, of a model that is `whole` on one device.

    Raises UnsupportedModel where the forward does not run on a share of the weights.
    """

    def share(shadow: nn.Module) -> None:
        narrow(shadow, sharding)
        join(shadow, sharding)

    try:
        found = probe(model, share)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"{error}; this of the share of each of {sharding.ranks.size} ranks: its forward takes sizes from elsewhere than"
            " from its weights; set tensor_parallel_size=1"
        ) from error
    if (found.num_logits, found.hidden_size) != (whole.num_logits, whole.hidden_size):
        raise UnsupportedModel(
            f"{model.config.model_type}: a rank's share of it gives {found.num_logits} logits instead of {whole.num_logits}:"
            " its forward reads a weight that is cut past the module that holds it; set tensor_parallel_size=1"
        )
    return found
