"""A model's config.json as transformers' configuration; what is wrong in the file becomes one sentence that names it.

Knows the file and what transformers raises for it; does not know what the model computes or its longest sequence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from pagegraph.compiler.model.files import json_object

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
ROPE = ("rope_parameters", "rope_scaling")
ROPE_TYPE = ("rope_type", "type")
OLD_NAMES = {"su": "longrope"}
# Of rope parameters: numbers above 0 where they are given at all.
ROPE_NUMBERS = (
    "factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "attention_factor",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
)  # fmt: skip


def load_model_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model in `folder`. A rope type of null is the default, `su` the old name of longrope.

    Raises ValueError that names the file and, as far as transformers tells it, the key at fault; ImportError and
    OSError for packages and files that the folder's own code lacks.
    """
    path = folder / "config.json"
    said = json_object(path)
    _check_sizes(path, said)
    meant = _with_rope_types(path, said)
    try:
        own_code = trust_remote_code and "AutoConfig" in (said.get("auto_map") or {})
        if meant == said or own_code:  # the folder's own code has names of its own
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with TemporaryDirectory() as rewritten:
            (Path(rewritten) / path.name).write_text(json.dumps(meant), encoding="utf-8")
            config = AutoConfig.from_pretrained(rewritten, trust_remote_code=trust_remote_code)
        config.name_or_path = str(folder)
        return config
    except (ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What transformers raised, in one line without the names of its own classes."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        return reason_of(error.__cause__)
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message = " ".join(message.split())
    says_enough = " " in message and isinstance(error, (ValueError, KeyError, TypeError))
    return message if says_enough else f"{type(error).__name__}: {message}"


def _check_sizes(path: Path, said: dict[str, Any]) -> None:
    parts = {"": said, "text_config.": said.get("text_config")}
    for at, part in parts.items():
        for key in SIZES if isinstance(part, dict) else ():
            if isinstance(value := part.get(key), int) and value < 1:
                raise ValueError(f"{path}: {at}{key} must be 1 or more, not {value}")


def _with_rope_types(path: Path, said: dict[str, Any], at: str = "", inside: bool = False) -> dict[str, Any]:
    """`said` with rope types as transformers names them.

    `inside`: `said` is the rope parameters, of all layers or of one layer type.

    Raises ValueError for a number that is none.
    """
    meant = {}
    for key, value in said.items():
        if isinstance(value, dict):
            value = _with_rope_types(path, value, f"{at}{key}.", inside or key in ROPE)
        elif inside and key in ROPE_TYPE:
            if value is None:
                continue
            if not isinstance(value, str):
                raise ValueError(f"{path}: {at}{key} must be the name of a rope type, not {value!r}")
            value = OLD_NAMES.get(value, value)
        elif inside and key in ROPE_NUMBERS and value is not None and not _positive(value):
            raise ValueError(f"{path}: {at}{key} must be a number above 0, not {value!r}")
        meant[key] = value
    return meant


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
