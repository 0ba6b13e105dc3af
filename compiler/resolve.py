"""Settings that depend on the machine or the model: device, dtypes, quantization, max_model_len, end tokens.

Takes plain values and a model's configuration; knows no runtime, no weights and no steps.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from pagegraph.compiler.model.files import json_object
from pagegraph.compiler.model.rope import lengths
from pagegraph.compiler.quantization.config import Scheme
from pagegraph.compiler.quantization.config import resolve as resolve_scheme
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.kernels.quant.tiles import FP8_CAPABILITY

log = logging.getLogger("pagegraph.build")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU; asking for CUDA without one is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for but torch sees no GPU; set device to cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, model_config: Any, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own type, bfloat16 on the CPU where it says float16 or float32."""
    if name != "auto":
        return getattr(torch, name)
    said = [getattr(config, "dtype", None) for config in (model_config.get_text_config(), model_config)]
    dtype = next(filter(None, said), torch.bfloat16)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return torch.bfloat16 if device.type == "cpu" else dtype


def resolve_quantization(
    asked: str | None,
    model_config: Any,
    device: torch.device,
    sidecar: dict[str, Any] | None = None,
    capability: tuple[int, int] | None = None,
) -> Scheme | str | None:
    """The checkpoint's scheme, or the method asked for; removes `quantization_config` from `model_config` and its text
    model's.

    sidecar: a quantization_config that counts if `model_config` has none. capability: of a GPU that is not there.
    Raises QuantizationError if the two contradict each other or the device has no such type.
    """
    parts = (model_config, model_config.get_text_config())
    said = [vars(config).pop("quantization_config", None) for config in parts]
    found = resolve_scheme(asked, next(filter(None, said), sidecar))
    method = found.method if isinstance(found, Scheme) else found
    if method == "fp8" or getattr(found, "fp8", False):
        instead = "set quantization to int8 or int4 on an unquantised checkpoint"
        _require_fp8("quantization=fp8", device, instead, capability)
    return found


def resolve_cache_dtype(
    name: str, dtype: torch.dtype, device: torch.device, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """The dtype of the KV cache: `auto` is that of activations, `fp8` is e4m3 with a scale of 1."""
    if name == "auto":
        return dtype
    _require_fp8("kv_cache_dtype=fp8", device, "set kv_cache_dtype to auto", capability)
    return torch.float8_e4m3fn


def _require_fp8(setting: str, device: torch.device, instead: str, capability: tuple[int, int] | None) -> None:
    if device.type != "cuda":
        return
    if (capability or torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        which = torch.cuda.get_device_name(device) if capability is None else "this one"
        raise QuantizationError(
            f"{setting} needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or later, "
            f"{which} has less; {instead}"
        )


def resolve_max_model_len(asked: int | None, model_config: Any) -> int:
    """The asked length, or the model's default.

    Raises ValueError if it is above the model's own limit, or if the rope type is unknown.
    """
    known = lengths(model_config)
    if asked is not None and asked > known.longest:
        raise ValueError(
            f"max_model_len {asked} is above the model's own limit of {known.longest} ({known.reason});"
            f" set it to {known.longest} or less"
        )
    length = asked or known.default
    if known.default < known.longest and not known.by_length:
        log.info(
            "max_model_len %d: the model's file names %d; its rope scaling reaches up to %d",
            length,
            known.default,
            known.longest,
        )
    elif known.default < known.longest:
        log.info(
            "max_model_len %d: rotary frequencies of this model go by the length, and all prompts get those of %s;"
            " set max_model_len above %d, up to %d, for the others",
            length, "long ones" if length > known.default else "short ones", known.default, known.longest,
        )  # fmt: skip
    return length


def eos_ids(folder: Path, model_config: Any, tokenizer: Path | None = None) -> frozenset[int]:
    """End-of-sequence ids that generation_config.json, config.json or the tokenizer's files name and the model has.

    All of them count: a file that names none does not overrule another. If no file names any, the default of the
    configuration's class holds, which may belong to another vocabulary. `tokenizer` is the tokenizer's folder if it is
    not `folder`.
    """
    config = json_object(folder / "config.json")
    said = [json_object(folder / "generation_config.json").get("eos_token_id"), config.get("eos_token_id")]
    said += [part.get("eos_token_id") for part in config.values() if isinstance(part, dict)]
    said.append(_ending_tokens(tokenizer or folder))
    text_config = model_config.get_text_config()
    found = _ids(said) or _ids([getattr(text_config, "eos_token_id", None)])
    size = getattr(text_config, "vocab_size", None)
    if size is not None and (beyond := sorted(one for one in found if one >= size)):
        log.warning(
            "%s names %s as ends of a sequence, but the model has %d tokens: they are left out", folder, beyond, size
        )
        found = frozenset(one for one in found if one < size)
    if not found:
        log.warning(
            "%s names no end-of-sequence token: text ends at max_tokens, a stop string or a stop token alone", folder
        )
    return found


def _ids(said: list[Any]) -> frozenset[int]:
    """Token ids out of ids, lists of ids and None."""
    flat = [one for value in said for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in flat if isinstance(one, int) and not isinstance(one, bool) and one >= 0)


def _ending_tokens(folder: Path) -> list[Any]:
    """Ids, or None where unknown, of the tokens that a tokenizer's files name as the end of a sequence or of a turn."""
    named = json_object(folder / "special_tokens_map.json") | json_object(folder / "tokenizer_config.json")
    tokens = [
        token.get("content") if isinstance(token, dict) else token
        for token in (named.get("eos_token"), named.get("eot_token"))
    ]
    if not any(tokens):
        return []
    words = json_object(folder / "tokenizer.json")
    ids = {token.get("content"): token.get("id") for token in words.get("added_tokens") or []}
    vocabulary = (words.get("model") or {}).get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    return [ids.get(token, vocabulary.get(token)) for token in tokens if token]
