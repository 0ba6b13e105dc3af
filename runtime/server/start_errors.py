"""What a start fails by, as one sentence for the user: files, settings and devices that do not go together.

Knows which errors those are; an error of another kind is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pagegraph.runtime.config import Config
    from pagegraph.runtime.text.tokenizer import Tokenizer

REASON_FILE = "engine-refused.txt"  # beside an engine's settings: why it did not start
FORESEEN = (
    ValueError,
    OSError,
    ImportError,
)  # what loading raises for files, settings, addresses and packages that are lacking


def sentence(error: BaseException) -> str | None:
    """The message of a foreseen error in one line; None for others."""
    if type(error).__name__ == "OutOfMemoryError":
        told = " ".join(str(error).split())
        return f"the device has too little memory for this model; quantise it, or take a smaller one ({told})"
    if not isinstance(error, FORESEEN):
        return None
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def as_one_sentence(log_level: str) -> Iterator[None]:
    """Turn foreseen errors into click's; at log level debug they keep their traceback."""
    try:
        yield
    except Exception as error:
        if log_level == "debug" or isinstance(error, click.ClickException) or (reason := sentence(error)) is None:
            raise
        raise click.ClickException(reason) from error


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a configuration, before its model is loaded. Converts a GGUF file, fetches a hub's model.

    Raises ValueError or FileNotFoundError where it is not whole.
    """
    from pagegraph.compiler.build import model_folder
    from pagegraph.runtime.engine.compiler_options import model_options
    from pagegraph.runtime.text.tokenizer import Tokenizer

    if config.tokenizer:
        return Tokenizer.load(Path(config.tokenizer))
    return Tokenizer.load(model_folder(model_options(config), config.compile_cache_dir))
