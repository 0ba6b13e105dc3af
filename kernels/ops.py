"""The ops that stand in captured graphs: schemas, fakes, dispatch by device. Imports no Triton.

`pagegraph::paged_attention` writes the step's keys and values into pages, then attends:

- query [T, Hq, D]; key [T, Hkv, D]; value [T, Hkv, Dv] -> [T, Hq, Dv] in query's dtype
- key_cache [num_blocks, block_size, Hkv, D], value_cache [.., Dv]: whole tensors, mutated; in query's dtype or float8_e4m3fn
- positions, slots int32 [T]; a token's K/V goes to slot = page * block_size + offset; padding goes to page 0
- block_tables int32 [S, max_blocks], unused entries 0; query_start int32 [S + 1]; seq_lens int32 [S] with this
  step's tokens. Sequence s owns query rows query_start[s]:query_start[s + 1], its last positions; a padding
  sequence has no rows. Rows from query_start[S] on are padding and come out as 0.
- a query at position p sees keys j <= p, with window > 0 only j > p - window, with chunk > 0 only
  j // chunk == p // chunk; softcap > 0 caps logits as cap * tanh(x / cap); sinks [Hq] join the softmax's
  denominator as one extra logit a head

`pagegraph::rope_attention` is paged_attention on query and key [T, H, D] as projected: RMS-normalised over D with
weights query_norm, key_norm [D] and eps where given, then rotated by cos, sin [T, D] in the half-split layout.

`pagegraph::linear` is x [..., K] @ weight [N, K].T + bias [N] -> [..., N], by the kernel that suits the rows of x.

`pagegraph::quant_linear` is x [..., K] @ weight.T + bias [N] -> [..., N] with weight [N, K] = codes * scale + shift: codes
int8 or float8_e4m3fn [N, K], or uint8 [N, K / 2] of two 4-bit codes each (`kernels.quant.reference.pack_nibbles`); scale and shift
[N, groups] of `group` neighbouring columns each, the last group maybe of fewer. In plain PyTorch: weights are loaded so, and steps run the ops below.

`pagegraph::fragment_linear` is the same with the weight as the matrix unit takes it, x [..., K] -> [..., out_size]: integers as
`kernels.quant.reference.fragments` lays them, scale and shift as `fragment_pairs` does; or float8_e4m3fn as `exchanged_columns`, scale float32
[N, groups] of a multiple of 64 columns each, no shift. rounds: a device may round x to 8 bits where that is
faster, from many rows on (`kernels.quant.tiles`). gated: [..., out_size / 2], silu(first half) * second half.
`pagegraph::norm_fragment_linear` is x + residual -> its norm -> fragment_linear -> (sum, product); with a second weight the first is
gated and the second's product [..., second_size] comes out.

`pagegraph::int4_packed_linear` is the same on a CPU without bias, x [T, K] -> [T, N]: packed uint8 [N, K / 2] holds 4-bit codes as
PyTorch packs them for AVX-512 (`kernels.quant.cpu.unpack_int4`), pairs [K / group, N, 2] scale and shift beside each other in x's dtype.
`pagegraph::int4_packed_chain` is two or four of them on one row, `linear_norm_linear` once or twice (`kernels.quant.cpu_int4.chain`).

`pagegraph::rms_norm` is x [..., H] / sqrt(mean(x ** 2) + eps) * weight [H]; `pagegraph::add_rms_norm` adds a residual
like x before it -> (sum, norm of the sum). `pagegraph::silu_mul` is silu(gate) * up of [..., 2 * I] = (gate, up).

`pagegraph::linear_norm_linear` is what stands between two attentions, or between attention and a gate: sum = residual +
linear(x, first), out = linear(rms_norm(sum, norm), second), where gated silu_mul of that -> (sum, out). One op, because
which of its parts share a kernel depends on the rows of x. Rows from query_start[S] on are padding: they may come out as
anything.

`pagegraph::materialize` is a copy that the compiler does not look through; `pagegraph::in_memory` one that it writes itself, and does
not compute anew for each use.

`pagegraph::draw` is the next token of each sequence by Gumbel-max (`kernels.sampling.reference.gumbel_argmax`): logits [S, V],
temperature float32 [S], seeds int64 [S], positions int32 [S] -> ids int64 [S]. Where sampled int32 [S] is not 0 it also
goes to last_tokens int32 [rows] at the sequence's row of rows int32 [S], and its position to last_at int32 [rows].

`pagegraph::update_tables` writes num_pages [1] of pages [P, 3] = (row, index, page) into tables [rows, max_blocks]; int32.

`pagegraph::unpack` looks a padded step up: token_ids [T], rows [S], query_start [S + 1], starts [S], tables -> ids,
positions, slots [T], block_tables [S, width], seq_lens [S], all int32, and the index of each sequence's last token int64
[S]. Token -1 is the row's of last_tokens, token -2 - j the draft token j of draft_tokens [rows, K]; a sequence that begins with such a
token begins at last_at, or 1 + j behind it, whatever starts says. So a packet that is read again describes the next token
of every sequence. Tokens from query_start[S] on and sequences without tokens are padding: all zeros.

A row may have several entries in a step, side by side: its last token, then draft tokens of what follows, one token each. A
draft token holds if the entry before it drew just that and all draft tokens before it hold. With ids int64 [S] as drawn and token_ids
[T], seq_lens [S] as unpacked:

`pagegraph::accept` puts what was drawn behind the last draft token that holds, and its position, into last_tokens and last_at of
the rows with draft tokens, of which no row has more than `most`.

`pagegraph::look_up` does that too, and writes a step's tokens, and what was drawn of them that holds, into history [rows, W], and for rows that
drew (sampled or with draft tokens) writes what may follow into draft_tokens [rows, K], by `kernels.spec_decode.reference.lookup` -> int32 [2, S]:
at a row's first entry twice the length of the match, plus 1 if the first draft token that stood there was what the entry drew;
and the last token of each entry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.attention import cpu as attention_cpu
from pagegraph.kernels.inputs import cpp as inputs_cpp
from pagegraph.kernels.inputs import cpu as inputs_cpu
from pagegraph.kernels.linear import reference as linear_reference
from pagegraph.kernels.quant import cpu as quant_cpu
from pagegraph.kernels.quant import cpu_int4
from pagegraph.kernels.quant import reference as quant_reference
from pagegraph.kernels.sampling import cpp as sampling_cpp
from pagegraph.kernels.spec_decode import cpp as spec_decode_cpp
from pagegraph.kernels.spec_decode import reference as spec_decode_reference

_library = torch.library.Library("pagegraph", "DEF")
_library.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor positions, Tensor slots, Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? sinks, "
    "float scale, int window, float softcap, int chunk) -> Tensor"
)
_library.define(
    "rope_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, "
    "float eps, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor positions, Tensor slots, Tensor block_tables, "
    "Tensor query_start, Tensor seq_lens, Tensor? sinks, float scale, int window, float softcap, int chunk) -> Tensor"
)
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("quant_linear(Tensor x, Tensor codes, Tensor scale, Tensor? shift, Tensor? bias, int group) -> Tensor")
_library.define(
    "fragment_linear(Tensor x, Tensor codes, Tensor scale, Tensor? shift, Tensor? bias, int group, int out_size, "
    "bool rounds, bool gated=False) -> Tensor"
)
_library.define(
    "norm_fragment_linear(Tensor x, Tensor residual, Tensor norm, float eps, Tensor codes, Tensor scale, Tensor? shift, Tensor? bias, "
    "int group, int out_size, bool rounds, Tensor? second_codes, Tensor? second_scale, Tensor? second_shift, Tensor? second_bias, "
    "int second_group, int second_size) -> (Tensor, Tensor)"
)
_library.define("int4_packed_linear(Tensor x, Tensor packed, Tensor pairs, int group) -> Tensor")
_library.define("int4_packed_chain(Tensor x, Tensor residual, Tensor[] tensors, int[] numbers, float[] eps) -> Tensor")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
_library.define("silu_mul(Tensor gate_up) -> Tensor")
_library.define(
    "linear_norm_linear(Tensor x, Tensor first, Tensor? first_bias, Tensor residual, Tensor norm, float eps, Tensor second, "
    "Tensor? second_bias, bool gated, Tensor query_start) -> (Tensor, Tensor)"
)
_library.define("materialize(Tensor x) -> Tensor")
_library.define("in_memory(Tensor x) -> Tensor")
_library.define(
    "draw(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor rows, Tensor sampled, "
    "Tensor(a!) last_tokens, Tensor(b!) last_at) -> Tensor"
)
_library.define("update_tables(Tensor(a!) tables, Tensor pages, Tensor num_pages) -> ()")
_library.define(
    "unpack(Tensor token_ids, Tensor rows, Tensor query_start, Tensor starts, Tensor last_tokens, Tensor last_at, "
    "Tensor draft_tokens, Tensor tables, int block_size, int width) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "accept(Tensor ids, Tensor token_ids, Tensor rows, Tensor query_start, Tensor seq_lens, Tensor(a!) last_tokens, "
    "Tensor(b!) last_at, int most) -> ()"
)
_library.define(
    "look_up(Tensor ids, Tensor token_ids, Tensor rows, Tensor query_start, Tensor seq_lens, Tensor sampled, "
    "Tensor(a!) last_tokens, Tensor(b!) last_at, Tensor(c!) history, Tensor(d!) draft_tokens, int least, int most) -> Tensor"
)


def _attention_on_cuda(*arguments: Tensor | float | int | None) -> Tensor:
    from pagegraph.kernels.attention import cuda as attention_cuda

    return attention_cuda.paged_attention(*arguments)


def _rope_attention_on_cuda(*arguments: Tensor | float | int | None) -> Tensor:
    from pagegraph.kernels.attention import cuda as attention_cuda

    return attention_cuda.rope_attention(*arguments)


def _draw_on_cuda(logits: Tensor, *arguments: Tensor) -> Tensor:
    from pagegraph.kernels.sampling import gumbel

    return gumbel.draw(logits.contiguous(), *arguments)


def _update_tables_on_cuda(*arguments: Tensor) -> None:
    from pagegraph.kernels.inputs import prepare as unpack

    unpack.update_tables(*arguments)


def _unpack_on_cuda(*arguments: Tensor | int) -> tuple[Tensor, ...]:
    from pagegraph.kernels.inputs import prepare as unpack

    return unpack.unpack(*arguments)


def _accept_on_cuda(*arguments: Tensor | int) -> None:
    from pagegraph.kernels.spec_decode import ngram as draft_tokens

    draft_tokens.accept(*arguments)


def _look_up_on_cuda(*arguments: Tensor | int) -> Tensor:
    from pagegraph.kernels.spec_decode import ngram as draft_tokens

    return draft_tokens.look_up(*arguments)


def _linear_on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from pagegraph.kernels.linear import cuda as linear_cuda

    return linear_cuda.linear(x, weight, bias)


def _linear_norm_linear_on_cuda(*arguments: Tensor | float | bool | None) -> tuple[Tensor, Tensor]:
    from pagegraph.kernels.linear import cuda as linear_cuda

    return linear_cuda.linear_norm_linear(*arguments)


def _fragment_linear_on_cuda(*arguments: Tensor | int | None) -> Tensor:
    from pagegraph.kernels.quant import cuda as quant_cuda

    return quant_cuda.fragment_linear(*arguments)


def _norm_fragment_linear_on_cuda(*arguments: Tensor | float | int | None) -> tuple[Tensor, Tensor]:
    from pagegraph.kernels.quant import cuda as quant_cuda

    return quant_cuda.norm_fragment_linear(*arguments)


def _rms_norm_on_cuda(*arguments: Tensor | float) -> Tensor:
    from pagegraph.kernels.linear import rms_norm

    return rms_norm.rms_norm(*arguments)


def _add_rms_norm_on_cuda(*arguments: Tensor | float) -> tuple[Tensor, Tensor]:
    from pagegraph.kernels.linear import rms_norm

    return rms_norm.add_rms_norm(*arguments)


def _silu_mul_on_cuda(gate_up: Tensor) -> Tensor:
    from pagegraph.kernels.linear import silu_mul

    return silu_mul.silu_mul(gate_up)


_library.impl("rms_norm", linear_reference.rms_norm, "CPU")
_library.impl("rms_norm", _rms_norm_on_cuda, "CUDA")
_library.impl("add_rms_norm", linear_reference.add_rms_norm, "CPU")
_library.impl("add_rms_norm", _add_rms_norm_on_cuda, "CUDA")
_library.impl("silu_mul", linear_reference.silu_mul, "CPU")
_library.impl("silu_mul", _silu_mul_on_cuda, "CUDA")
_library.impl("linear_norm_linear", linear_reference.linear_norm_linear, "CPU")
_library.impl("linear_norm_linear", _linear_norm_linear_on_cuda, "CUDA")
_library.impl("materialize", torch.clone, "CompositeExplicitAutograd")
_library.impl("in_memory", torch.clone, "CompositeExplicitAutograd")
_library.impl("quant_linear", quant_reference.quant_linear, "CompositeExplicitAutograd")
_library.impl("fragment_linear", quant_reference.fragment_linear, "CPU")
_library.impl("fragment_linear", _fragment_linear_on_cuda, "CUDA")
_library.impl("norm_fragment_linear", quant_reference.norm_fragment_linear, "CPU")
_library.impl("norm_fragment_linear", _norm_fragment_linear_on_cuda, "CUDA")
_library.impl("int4_packed_linear", quant_cpu.int4_packed_linear, "CPU")
_library.impl("int4_packed_chain", cpu_int4.chain, "CPU")
_library.impl("linear", functional.linear, "CPU")
_library.impl("linear", _linear_on_cuda, "CUDA")
_library.impl("paged_attention", attention_cpu.paged_attention, "CPU")
_library.impl("rope_attention", attention_cpu.rope_attention, "CPU")
_library.impl("rope_attention", _rope_attention_on_cuda, "CUDA")
_library.impl("paged_attention", _attention_on_cuda, "CUDA")
_library.impl("draw", sampling_cpp.draw, "CPU")
_library.impl("draw", _draw_on_cuda, "CUDA")
_library.impl("update_tables", inputs_cpu.update_tables, "CPU")
_library.impl("update_tables", _update_tables_on_cuda, "CUDA")
_library.impl("unpack", inputs_cpp.unpack, "CPU")
_library.impl("unpack", _unpack_on_cuda, "CUDA")
_library.impl("accept", spec_decode_reference.accept, "CPU")
_library.impl("accept", _accept_on_cuda, "CUDA")
_library.impl("look_up", spec_decode_cpp.look_up, "CPU")
_library.impl("look_up", _look_up_on_cuda, "CUDA")


@torch.library.register_fake("pagegraph::paged_attention", lib=_library)
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | float | int | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


@torch.library.register_fake("pagegraph::rope_attention", lib=_library)
def _rope_attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | float | int | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


@torch.library.register_fake("pagegraph::materialize", lib=_library)
@torch.library.register_fake("pagegraph::in_memory", lib=_library)
def _materialize_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("pagegraph::linear", lib=_library)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("pagegraph::quant_linear", lib=_library)
def _quant_linear_fake(x: Tensor, codes: Tensor, *_: Tensor | int | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("pagegraph::fragment_linear", lib=_library)
def _fragment_linear_fake(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None, group: int, out_size: int,
    rounds: bool, gated: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out_size // 2 if gated else out_size)


@torch.library.register_fake("pagegraph::norm_fragment_linear", lib=_library)
def _norm_fragment_linear_fake(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None,
    group: int, out_size: int, rounds: bool, second_codes: Tensor | None, *second: Tensor | int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], out_size if second_codes is None else second[-1])


@torch.library.register_fake("pagegraph::int4_packed_linear", lib=_library)
def _int4_packed_linear_fake(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@torch.library.register_fake("pagegraph::int4_packed_chain", lib=_library)
def _int4_packed_chain_fake(
    x: Tensor, residual: Tensor, tensors: list[Tensor], numbers: list[int], eps: list[float]
) -> Tensor:
    return x.new_empty(1, cpu_int4.chain_size(numbers))


@torch.library.register_fake("pagegraph::rms_norm", lib=_library)
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("pagegraph::add_rms_norm", lib=_library)
def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("pagegraph::silu_mul", lib=_library)
def _silu_mul_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.register_fake("pagegraph::linear_norm_linear", lib=_library)
def _linear_norm_linear_fake(
    x: Tensor, first: Tensor, first_bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float, second: Tensor,
    second_bias: Tensor | None, gated: bool, query_start: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = second.shape[0] // 2 if gated else second.shape[0]
    return torch.empty_like(residual), x.new_empty(*x.shape[:-1], size)
