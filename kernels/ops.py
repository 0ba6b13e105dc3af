"""The ops: a table of schemas, implementations by device and fakes. Imports no Triton.

A new op is a row of OPS, its reference and a file for its kernel.

`pagegraph::paged_attention` writes the step's keys and values into blocks, then attends:

- query [T, Hq, D]; key [T, Hkv, D]; value [T, Hkv, Dv] -> [T, Hq, Dv] in query's dtype
- key_cache [num_blocks, block_size, Hkv, D], value_cache [.., Dv]: whole tensors, mutated; in query's dtype or float8_e4m3fn
- positions, slot_mapping int32 [T]; a token's K/V goes to KV slot block * block_size + offset; padding goes to block 0
- block_tables int32 [S, max_blocks], unused entries 0; query_start int32 [S + 1]; seq_lens int32 [S] with this
  step's tokens. Sequence s owns query rows query_start[s]:query_start[s + 1], its last positions; a padding
  sequence has no rows. Rows from query_start[S] on are padding and come out as 0.
- a query at position p sees keys j <= p, with window > 0 only j > p - window, with chunk > 0 only
  j // chunk == p // chunk; softcap > 0 caps logits as cap * tanh(x / cap); sinks [Hq] join the softmax's
  denominator as one extra logit a head
- section > 0: a row is the same, bit by bit, whatever else the step has. Keys are added up in tiles of fixed places, and on
  CUDA in sections of `section` keys, a multiple of 64, which may be shared out

`pagegraph::rope_attention` is paged_attention on query and key [T, H, D] as projected: RMS-normalised over D with
weights query_norm, key_norm [D] and eps where given, then rotated by cos, sin [T, D] in the half-split layout.

`pagegraph::linear` is x [..., K] @ weight [N, K].T + bias [N] -> [..., N], by the kernel that suits the rows of x; `gated`:
silu(first half) * second half of it, [..., N / 2].

`pagegraph::fixed_linear` is the same, each row the same, bit by bit, however many rows there are, and the product rounded ahead of
its gate; `pagegraph::fixed_int4_linear`
is that of `int4_packed_linear` below.

`pagegraph::quant_linear` is x [..., K] @ weight.T + bias [N] -> [..., N] with weight [N, K] = qweight * scale + zero: qweight
int8 or float8_e4m3fn [N, K], or uint8 [N, K / 2] of two 4-bit values each (`kernels.quant.reference.pack_nibbles`); scale and zero
[N, groups] of `group` neighbouring columns each, the last group maybe of fewer. It runs in plain PyTorch while a model
is loaded and probed; steps run the ops below.

`pagegraph::repacked_linear` is the same with the weight as the tensor cores take it, x [..., K] -> [..., out_size]: integers as
`kernels.quant.reference.repack` lays them, scale and zero as `repack_scales` does; or float8_e4m3fn as `exchanged_columns`, scale float32
[N, groups] of a multiple of 64 columns each, no zero. quantize_x: a device may quantise x to 8 bits where that is
faster, from many rows on (`kernels.quant.tiles`). gated: [..., out_size / 2], silu(first half) * second half.
`pagegraph::norm_repacked_linear` is x + residual -> its norm -> repacked_linear -> (sum, result); with a second weight the first is
gated and the second's result [..., second_size] comes out.

`pagegraph::int4_packed_linear` is the same on a CPU without bias, x [T, K] -> [T, N]: packed uint8 [N, K / 2] holds 4-bit values as
PyTorch packs them for AVX-512 (`kernels.quant.cpu.unpack_int4`), pairs [K / group, N, 2] scale and zero beside each other in x's dtype.
`pagegraph::int4_packed_layer` is two or four of them on one row, `linear_norm_linear` once or twice (`kernels.quant.cpu_int4.layer`).

`pagegraph::rms_norm` is x [..., H] / sqrt(mean(x ** 2) + eps) * weight [H], rounded ahead of the product with the weight too unless
that is in float32 beside x in 16 bits; `pagegraph::add_rms_norm` adds a residual
like x before it -> (sum, norm of the sum). `pagegraph::silu_mul` is silu(gate) * up of [..., 2 * I] = (gate, up).
`pagegraph::gated_rms_norm` is the norm of each [.., N] of x [T, G, N], with a weight [N], or [G * N] of each, and silu(gate), gate [T, G,
N]: a factor of x where gate_first, else of the norm -> like gate, rounded to x's dtype behind the norm and behind the weight.

`pagegraph::linear_norm_linear` is what stands between two attentions, or between attention and a gate: sum = residual +
linear(x, first), out = linear(rms_norm(sum, norm), second), where gated silu_mul of that -> (sum, out, norm), the norm empty unless
keep_norm. `pagegraph::norm_linear` is its second half. They are ops because which of their parts share a kernel depends on the
rows of x. Rows from query_start[S] on are padding: they may come out as anything.

`pagegraph::experts` is a mixture's experts: of x [T, H], chosen int [T, k] and weights [T, k] of the choices -> [T, H], the sum
over k of weight * (down of what stands between of (up of x)), with up [E, 2 * I, H] of gate and up and down [E, H, I], biases
[E, 2 * I] and [E, H]; the arguments from activation on are `kernels.moe.form.Form`. A choice that is no expert's number adds
nothing. Rows from query_start[S] on are padding, choose nothing and come out as 0, whatever they hold. residual [T, H] is added to
the result. `pagegraph::quant_experts`
is the same of quantised weights [E, N, K] (`kernels.quant.weight`), which are not transposed. `pagegraph::repacked_experts` is that of
weights as GPUs multiply them (`kernels.moe.quant_stack`), inner being I: of every 16 rows of up, and of its bias, 8 are of gate and then
8 of up, whatever the form says of them. quantize_x: of e4m3 with one scale a row a device may round x, and what is between the products,
to e4m3 with one scale a row where that is faster, from more than a few tokens on (`kernels.moe.tiles`).

`pagegraph::topk_softmax` is a router's choice: logits [T, E] -> weights [T, k] in `dtype`, chosen int64 [T, k], the experts of the k largest
logits, largest first, the smaller number first of equal ones; weights are the softmax over all E, or where renormalize over the k alone.

Layers with recurrent state keep a row of `states` [slots, ...] for each batch slot, mutated: that of a sequence s of the step
is row slots[s] of int32 [S]. A sequence begins from zero where seq_lens[s] is as many as its rows, and else from its state; the state
behind its last row is written back. Padding sequences, which have no rows, read and write none; rows from query_start[S] on are
padding and may come out as anything.

With draft_rows [batch slots, 2K + 1, ..] draft tokens leave no trace in a state: sequences of one row that follow one of one row in the
same slot, at most K, are its draft tokens; their results come of what is before them as anyone's, but the state that is written back is
that before the first of them. What the recurrence has taken of them is put aside in draft_rows, that of position p at p % (2K + 1), in
the order of the arguments (a convolution's x; key, value, decay, beta; x, dt, B), flat. state_lens int32 [slots] is how many tokens a
state is behind; where a sequence has more of them before its rows, the others are draft tokens of its last step that were accepted, and
the state takes these up first, from draft_rows. Slots that draft_rows has no row for, that of padding, have no draft tokens.
`pagegraph::count_states` brings state_lens to what the states of a step are behind, once all layers are computed.

Each is one recurrence over a sequence's rows t:

`pagegraph::causal_conv` is a convolution for each channel: x [T, C], weight [C, K], bias [C], states [slots, K - 1, C] in x's dtype,
the last rows that there were -> [T, C], y_t = sum over j of weight[:, j] * x_(t - K + 1 + j), after that silu if it is set.

`pagegraph::gated_delta` is a delta rule whose state S float32 [slots, H, D, Dv] decays: S = exp(decay_t) * S; S += key_t outer
(beta_t * (value_t - key_t S)); y_t = query_t S / sqrt(D). query, key [T, G, D], of H / G heads each; value [T, H, Dv]; decay [T, H], or [T, H, D]
for each row of S; beta [T, H] -> [T, H, Dv] in value's dtype. normalize: of query and key their unit vectors. draft_rows have keys of H heads.
With A_log, dt_bias [H], decay and beta [T, H] are as they were projected: -exp(A_log) * softplus(decay + dt_bias) and sigmoid(beta) are meant.

`pagegraph::selective_scan` is a state space model with state S float32 [slots, H, P, N]: S = exp(dt_t * A) * S + dt_t * x_t outer B_t;
y_t = S C_t + D x_t. x [T, H, P]; A [H], or [H, N], where A_log -exp of it; B, C [T, G, N], of H / G heads each; D [H] -> float32 [T, H,
P]. dt_t is that of dt [T, H] in float32, plus dt_bias [H], its softplus where dt_softplus, dt_min at least and dt_max at most. draft_rows
have what comes of that.

`pagegraph::all_reduce` is the sum of x over the ranks of a group, `pagegraph::all_gather` every rank's x [.., n] side by side, [.., size
* n]; all ranks call them alike (`kernels.collective.groups`).

`pagegraph::materialize` is a copy that the compiler does not look through; `pagegraph::in_memory` one that it writes itself, and does
not compute anew for each use.

`slots` below are batch slots, one a running sequence, the dummy slot included; the slot_mapping above holds KV slots.

`pagegraph::sample` is the next token of each sequence by Gumbel-max (`kernels.sampling.reference.gumbel_argmax`): logits [S, V],
temperature float32 [S], seeds int64 [S], positions int32 [S] -> ids int64 [S]. Where sampled int32 [S] is not 0 it also
goes to last_tokens int32 [slots] at the sequence's batch slot, slots int32 [S], and its position to last_at int32 [slots].

`pagegraph::apply_bitmask` makes logits [S, V] -inf, in place, where a bit is 0: row rows[i] (int32 [R]) by bitmask[i], int32
[R, ceil(V / 32)], token t at bit t % 32 of word t // 32.

`pagegraph::sample_allowed` samples those rows of ids int64 [S] anew, rows and bitmask as above, whose token their bitmask
forbids: `pagegraph::sample` of logits without the forbidden tokens. ids are what `pagegraph::sample` gave with them. Rows
below 0 are padding.

`pagegraph::update_tables` writes num_new_blocks [1] of new_blocks [P, 3] = (batch slot, index, block) into tables [slots, max_blocks]; int32.

`pagegraph::unpack` looks a padded step up: token_ids [T], slots [S], query_start [S + 1], starts [S], tables -> ids,
positions, slot_mapping [T], block_tables [S, width], seq_lens [S], all int32, and the index of each sequence's last token int64
[S]. Token -1 is the batch slot's of last_tokens, token -2 - j its draft token j (from 0) of draft_tokens [slots, K]; a sequence that begins with such a
token begins at last_at, or 1 + j behind it, whatever starts says. So step metadata that is read again describes the next token
of every sequence. Tokens from query_start[S] on and sequences without tokens are padding: all zeros.

A batch slot may have several queries in a step, side by side: its last token, then draft tokens of what follows, one token each. A
draft token is accepted if the query before it sampled that same token and all draft tokens before it are accepted. With ids int64 [S] as sampled and token_ids
[T], seq_lens [S] as unpacked:

`pagegraph::accept` writes the token sampled after the last accepted draft token, and its position, into last_tokens and
last_at of the batch slots with draft tokens, of which none has more than `max_draft_tokens`.

`pagegraph::propose_ngram` writes the same, and besides:
- history [slots, W]: the step's tokens, and the tokens sampled up to and after the last accepted draft token
- draft_tokens [slots, K], of batch slots that sampled (`sampled`, or with draft tokens): what may follow, by
  `kernels.spec_decode.reference.ngram_proposal`

It returns int32 [2, S]. Row 0, at a batch slot's first query: 2 * length of the match + hit; hit is 1 if the first draft
token that stood in draft_tokens is the one that the query sampled. Row 1: the last token of each query.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagegraph.kernels.attention import cpu as attention_cpu
from pagegraph.kernels.collective import groups
from pagegraph.kernels.inputs import cpp as inputs_cpp
from pagegraph.kernels.inputs import cpu as inputs_cpu
from pagegraph.kernels.linear import fixed_rows
from pagegraph.kernels.linear import reference as linear_reference
from pagegraph.kernels.moe import cpu as moe_cpu
from pagegraph.kernels.moe import reference as moe_reference
from pagegraph.kernels.quant import cpu as quant_cpu
from pagegraph.kernels.quant import cpu_int4
from pagegraph.kernels.quant import reference as quant_reference
from pagegraph.kernels.quant.weight import two_weights
from pagegraph.kernels.sampling import cpp as sampling_cpp
from pagegraph.kernels.sampling import cpu as sampling_cpu
from pagegraph.kernels.spec_decode import cpp as spec_decode_cpp
from pagegraph.kernels.spec_decode import reference as spec_decode_reference
from pagegraph.kernels.state import cpu as state_cpu
from pagegraph.kernels.state import reference as state_reference

SAME = "same"  # the function of the CPU serves every device


class Op(NamedTuple):
    """An op of the table: what it is called with, who computes it, and what comes out while a graph is traced."""

    schema: str
    cpu: Callable
    cuda: str | None  # "module:function" below pagegraph.kernels, or SAME; None: no such device computes it
    fake: Callable | None  # shapes and dtypes of the results; None: the op stands in no traced graph


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, section: int = 0) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _new_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gated_delta(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return value.new_empty(value.shape)


def _selective_scan(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _nothing(*_: Any) -> None:
    return None


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], size * x.shape[-1])


def _add_rms_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _gated_rms_norm(x: Tensor, gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(x.shape)


def _silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (1 + gated))


def _linear_norm_linear(
    x: Tensor, first: Tensor, first_bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float, second: Tensor,
    second_bias: Tensor | None, gated: bool, keep_norm: bool, query_start: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = _norm_linear(x, norm, eps, second, second_bias, gated, query_start)
    return torch.empty_like(residual), out, residual.new_empty(residual.shape if keep_norm else 0)


def _norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool, query_start: Tensor
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])


def _experts(x: Tensor, *_: Any, residual: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


def _quant_linear(x: Tensor, qweight: Tensor, *_: Tensor | int | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _repacked_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, out_size: int,
    quantize_x: bool, gated: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out_size // 2 if gated else out_size)


def _norm_repacked_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, quantize_x: bool, *weights: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    first, second = two_weights(weights)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], (second or first).out_size)


def _topk_softmax(logits: Tensor, k: int, renormalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], k, dtype=dtype), logits.new_empty(logits.shape[0], k, dtype=torch.int64)


def _int4_packed_linear(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _int4_packed_layer(
    x: Tensor, residual: Tensor, tensors: list[Tensor], numbers: list[int], eps: list[float]
) -> Tensor:
    return x.new_empty(1, cpu_int4.layer_size(numbers))


OPS = (
    Op(
        "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor positions, Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? sinks, "
        "float scale, int window, float softcap, int chunk, int section=0) -> Tensor",
        attention_cpu.paged_attention, "attention.cuda:paged_attention", _attention,
    ),
    Op(
        "rope_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, "
        "Tensor? key_norm, float eps, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor positions, "
        "Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? sinks, float scale, "
        "int window, float softcap, int chunk, int section=0) -> Tensor",
        attention_cpu.rope_attention, "attention.cuda:rope_attention", _attention,
    ),
    Op(
        "linear(Tensor x, Tensor weight, Tensor? bias, bool gated=False) -> Tensor",
        linear_reference.linear, "linear.cuda:linear", _linear,
    ),
    Op(
        "fixed_linear(Tensor x, Tensor weight, Tensor? bias, bool gated=False) -> Tensor",
        fixed_rows.linear, "linear.fixed_gemm:fixed_linear", _linear,
    ),
    Op(
        "linear_norm_linear(Tensor x, Tensor first, Tensor? first_bias, Tensor residual, Tensor norm, float eps, "
        "Tensor second, Tensor? second_bias, bool gated, bool keep_norm, Tensor query_start) -> (Tensor, Tensor, Tensor)",
        linear_reference.linear_norm_linear, "linear.cuda:linear_norm_linear", _linear_norm_linear,
    ),
    Op(
        "norm_linear(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, bool gated, Tensor query_start) -> Tensor",
        linear_reference.norm_linear, "linear.cuda:norm_linear", _norm_linear,
    ),
    Op(
        "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
        linear_reference.rms_norm, "linear.rms_norm:rms_norm", _like,
    ),
    Op(
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        linear_reference.add_rms_norm, "linear.rms_norm:add_rms_norm", _add_rms_norm,
    ),
    Op(
        "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool gate_first) -> Tensor",
        linear_reference.gated_rms_norm, "linear.gated_rms_norm:gated_rms_norm", _gated_rms_norm,
    ),
    Op(
        "silu_mul(Tensor gate_up) -> Tensor",
        linear_reference.silu_mul, "linear.silu_mul:silu_mul", _silu_mul,
    ),
    Op(
        "quant_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, Tensor? bias, int group) -> Tensor",
        quant_reference.quant_linear, SAME, _quant_linear,
    ),
    Op(
        "repacked_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, Tensor? bias, int group, "
        "int out_size, bool quantize_x, bool gated=False) -> Tensor",
        quant_reference.repacked_linear, "quant.cuda:repacked_linear", _repacked_linear,
    ),
    Op(
        "norm_repacked_linear(Tensor x, Tensor residual, Tensor norm, float eps, bool quantize_x, "
        "Tensor qweight, Tensor scale, Tensor? zero, Tensor? bias, int group, int out_size, "
        "Tensor? second_qweight, Tensor? second_scale, Tensor? second_zero, Tensor? second_bias, int second_group, "
        "int second_size) -> (Tensor, Tensor)",
        quant_reference.norm_repacked_linear, "quant.cuda:norm_repacked_linear", _norm_repacked_linear,
    ),
    Op(
        "int4_packed_linear(Tensor x, Tensor packed, Tensor pairs, int group) -> Tensor",
        quant_cpu.int4_packed_linear, None, _int4_packed_linear,
    ),
    Op(
        "fixed_int4_linear(Tensor x, Tensor packed, Tensor pairs, int group) -> Tensor",
        quant_cpu.fixed_int4_linear, None, _int4_packed_linear,
    ),
    Op(
        "int4_packed_layer(Tensor x, Tensor residual, Tensor[] tensors, int[] numbers, float[] eps) -> Tensor",
        cpu_int4.layer, None, _int4_packed_layer,
    ),
    Op(
        "experts(Tensor x, Tensor chosen, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
        "Tensor? query_start, str activation, float alpha, float limit, float shift, bool gated, bool interleaved, "
        "bool transposed, *, Tensor? residual=None) -> Tensor",
        moe_cpu.experts, "moe.cuda:experts", _experts,
    ),
    Op(
        "quant_experts(Tensor x, Tensor chosen, Tensor weights, Tensor up, Tensor up_scale, Tensor? up_zero, int up_group, "
        "Tensor? up_bias, Tensor down, Tensor down_scale, Tensor? down_zero, int down_group, Tensor? down_bias, "
        "Tensor? query_start, str activation, float alpha, float limit, float shift, bool gated, bool interleaved, "
        "bool transposed) -> Tensor",
        moe_cpu.quant_experts, None, _like,
    ),
    Op(
        "repacked_experts(Tensor x, Tensor chosen, Tensor weights, Tensor up, Tensor up_scale, Tensor? up_zero, int up_group, "
        "Tensor? up_bias, Tensor down, Tensor down_scale, Tensor? down_zero, int down_group, Tensor? down_bias, int inner, "
        "Tensor? query_start, str activation, float alpha, float limit, float shift, bool gated, bool interleaved, "
        "bool transposed, *, bool quantize_x=False) -> Tensor",
        moe_reference.repacked_experts, "moe.cuda:repacked_experts", _like,
    ),
    Op(
        "topk_softmax(Tensor logits, int k, bool renormalize, ScalarType dtype) -> (Tensor, Tensor)",
        moe_reference.topk_softmax, "moe.topk_softmax:topk_softmax", _topk_softmax,
    ),
    Op(
        "update_tables(Tensor(a!) tables, Tensor new_blocks, Tensor num_new_blocks) -> ()",
        inputs_cpu.update_tables, "inputs.prepare:update_tables", None,
    ),
    Op(
        "unpack(Tensor token_ids, Tensor slots, Tensor query_start, Tensor starts, Tensor last_tokens, "
        "Tensor last_at, Tensor draft_tokens, Tensor tables, int block_size, int width) -> (Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)",
        inputs_cpp.unpack, "inputs.prepare:unpack", None,
    ),
    Op(
        "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) states, Tensor slots, Tensor query_start, "
        "Tensor seq_lens, bool silu, "
        "Tensor(b!)? draft_rows=None, Tensor? state_lens=None) -> Tensor",
        state_cpu.causal_conv, "state.conv:causal_conv", _new_like,
    ),
    Op(
        "gated_delta(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor(a!) states, Tensor slots, "
        "Tensor query_start, Tensor seq_lens, bool normalize, "
        "Tensor(b!)? draft_rows=None, Tensor? state_lens=None, Tensor? A_log=None, Tensor? dt_bias=None) -> Tensor",
        state_cpu.gated_delta, "state.cuda:gated_delta", _gated_delta,
    ),
    Op(
        "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
        "float? dt_min, float? dt_max, bool A_log, Tensor(a!) states, Tensor slots, Tensor query_start, Tensor seq_lens, "
        "Tensor(b!)? draft_rows=None, Tensor? state_lens=None) -> Tensor",
        state_cpu.selective_scan, "state.cuda:selective_scan", _selective_scan,
    ),
    Op(
        "count_states(Tensor(a!) state_lens, Tensor slots, Tensor query_start, Tensor seq_lens) -> ()",
        state_reference.count_states, "state.drafts:count_states", _nothing,
    ),
    Op(
        "sample(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor slots, Tensor sampled, "
        "Tensor(a!) last_tokens, Tensor(b!) last_at) -> Tensor",
        sampling_cpp.sample, "sampling.gumbel:sample", None,
    ),
    Op(
        "apply_bitmask(Tensor(a!) logits, Tensor rows, Tensor bitmask) -> ()",
        sampling_cpu.apply_bitmask, "sampling.bitmask:apply_bitmask", None,
    ),
    Op(
        "sample_allowed(Tensor(a!) ids, Tensor rows, Tensor bitmask, Tensor logits, Tensor temperature, Tensor seeds, "
        "Tensor positions, Tensor slots, Tensor sampled, Tensor(b!) last_tokens, Tensor(c!) last_at) -> ()",
        sampling_cpu.sample_allowed, "sampling.allowed:sample_allowed", None,
    ),
    Op(
        "accept(Tensor ids, Tensor token_ids, Tensor slots, Tensor query_start, Tensor seq_lens, "
        "Tensor(a!) last_tokens, Tensor(b!) last_at, int max_draft_tokens) -> ()",
        spec_decode_reference.accept, "spec_decode.ngram:accept", None,
    ),
    Op(
        "propose_ngram(Tensor ids, Tensor token_ids, Tensor slots, Tensor query_start, Tensor seq_lens, Tensor sampled, "
        "Tensor(a!) last_tokens, Tensor(b!) last_at, Tensor(c!) history, Tensor(d!) draft_tokens, int min_ngram, "
        "int max_ngram) -> Tensor",
        spec_decode_cpp.propose_ngram, "spec_decode.ngram:propose_ngram", None,
    ),
    Op(
        "all_reduce(Tensor x, str group) -> Tensor",
        groups.all_reduce, "collective.groups:all_reduce", _like,
    ),
    Op(
        "all_gather(Tensor x, int size, str group) -> Tensor",
        groups.all_gather, "collective.groups:all_gather", _all_gather,
    ),
    Op(
        "materialize(Tensor x) -> Tensor",
        torch.clone, SAME, _like,
    ),
    Op(
        "in_memory(Tensor x) -> Tensor",
        torch.clone, SAME, _like,
    ),
)  # fmt: skip


def _on_cuda(place: str) -> Callable:
    """The function at "module:function", whose module is imported at its first call: Triton is for where there is a device."""
    module, _, function = place.partition(":")

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(import_module(f"pagegraph.kernels.{module}"), function)(*arguments, **named)

    return call


def register(op: Op, library: torch.library.Library) -> None:
    """Define `op` in `library`, with its functions by device and its fake."""
    name = op.schema.partition("(")[0]
    library.define(op.schema)
    library.impl(name, op.cpu, "CompositeExplicitAutograd" if op.cuda == SAME else "CPU")
    if op.cuda not in (SAME, None):
        library.impl(name, _on_cuda(op.cuda), "CUDA")
    if op.fake is not None:
        torch.library.register_fake(f"{library.ns}::{name}", op.fake, lib=library)


_library = torch.library.Library("pagegraph", "DEF")
for _op in OPS:
    register(_op, _library)
