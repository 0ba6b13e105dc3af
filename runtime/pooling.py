"""How hidden states of a prompt become one vector, an embedding: by what the model's folder says, or a setting.

A folder of sentence-transformers says it in modules.json: which hidden states are pooled (1_Pooling), and whether the
vector gets length 1 (2_Normalize). Without these files it is the last token's, of length 1. Knows no steps, no requests
and no arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from pagegraph.compiler.model.files import json_object
from pagegraph.runtime.bad_parameter import BadParameter

Pooling = Literal["last", "mean", "cls"]  # of a prompt's tokens the last, all, the first
# What sentence-transformers calls them: by one flag each, or as the one word of `pooling_mode`.
_FLAGS: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
}  # fmt: skip
_WORDS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_SERVED_MODULES = {"Transformer", "Pooling", "Normalize"}


class Pooler(msgspec.Struct, frozen=True):
    """What embeddings of the model are; with `refused`, why there are none."""

    size: int  # of hidden states; 0: the model gives none
    pooling: Pooling = "last"
    normalize: bool = True  # to length 1
    any_dimensions: bool = False  # the first ones of a vector are an embedding too
    dimensions: list[int] = []  # or so many of the first ones
    refused: str = ""

    def check(self, dimensions: int | None) -> None:
        """Raise BadParameter where the model has no embeddings, or none of so many dimensions."""
        if self.refused:
            raise BadParameter("model", f"has no embeddings here: {self.refused}")
        if dimensions is None or dimensions == self.size:
            return
        if not 0 < dimensions < self.size:
            raise BadParameter(
                "dimensions", f"is {dimensions}; this model's embeddings have {self.size}, give at most that"
            )
        if not self.any_dimensions and dimensions not in self.dimensions:
            works = " or ".join(map(str, [*self.dimensions, self.size]))
            why = "the model's config.json names no others (is_matryoshka, matryoshka_dimensions)"
            raise BadParameter("dimensions", f"is {dimensions}; give {works}: {why}")


def pooler_of(folder: Path, hidden_size: int, pooling: str = "auto") -> Pooler:
    """Of the model in `folder`; `pooling` goes before what its files say, unless it is auto.

    hidden_size: 0 where the forward gives no hidden states. Raises ValueError for files that cannot be read.
    """
    if not hidden_size:
        return Pooler(0, refused="its forward gives no hidden states")
    config = json_object(folder / "config.json")
    trained = config.get("matryoshka_dimensions")
    trained = [one for one in trained if isinstance(one, int)] if isinstance(trained, list) else []
    known = {
        "size": hidden_size,
        "dimensions": trained,
        "any_dimensions": config.get("is_matryoshka") is True and not trained,
    }
    modules = _modules(folder / "modules.json")
    normalize = modules is None or "Normalize" in modules
    if unserved := sorted((modules or {}).keys() - _SERVED_MODULES):
        return Pooler(hidden_size, refused=f"its modules.json has a {unserved[0]} module, which is not served")
    if pooling == "auto":
        path = (modules or {}).get("Pooling")
        asked = ["last"] if path is None else _asked(json_object(folder / path / "config.json"))
        pooling = " and ".join(asked) or "nothing"
        if pooling not in _WORDS.values():
            return Pooler(
                hidden_size, refused=f"it pools by {pooling} ({path}/config.json); set pooling to last, mean or cls"
            )
    return Pooler(**known, pooling=cast(Pooling, pooling), normalize=normalize)


def _modules(path: Path) -> dict[str, str] | None:
    """Folder of each module of a modules.json, by its class; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {str(row["type"]).rpartition(".")[2]: str(row.get("path", "")) for row in rows}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no list of modules: {error!r}") from error


def _asked(config: dict[str, Any]) -> list[str]:
    """How a Pooling module is configured: our words where there is one, its own else."""
    word = config.get("pooling_mode")
    if word is not None:
        words = [word] if isinstance(word, str) else list(word)
        return [_WORDS.get(str(one), str(one)) for one in words]
    flags = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    return [_FLAGS.get(name, name) for name in flags]
