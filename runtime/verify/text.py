"""A verification as a text of at most 100 columns. Knows no compiler."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pagegraph.runtime.verify.verification import AGAINST, ITSELF, LAYERS, PASSES, Verification

WIDTH = 100
HEADINGS = {
    AGAINST: "AGAINST TRANSFORMERS",
    LAYERS: "LAYERS against those of transformers, each given the input that it has there",
    PASSES: "PASSES, each against what was before it",
    ITSELF: "THE ENGINE AGAINST ITSELF",
}
WORDS = {True: "ok", False: "DIFFERS", None: "not run"}


def text_of(one: Verification) -> str:
    """All sections, and what they come to."""
    return "\n".join([*_head(one), *_checks(one), "", *_end(one)])


def _head(one: Verification) -> Iterator[str]:
    weights = ", quantised," if one.quantised else ""
    yield from _wrapped(
        f"{one.model} in {one.dtype}{weights} on {one.device}, against transformers {one.transformers}, torch {one.torch}:"
        f" {one.prompts} prompts of {one.prompt_tokens:,} tokens, {one.num_tokens} tokens generated behind each"
    )
    band = one.band
    yield from _wrapped(
        f"allowed: mean KL {band.kl:.2g}, log-probability error {band.mean:.2g} on average and {band.largest:.2g} at most;"
        f" a tie is up to {band.tie:.2g}"
    )
    if one.own is not None:
        yield from _wrapped(
            f"transformers itself in {one.dtype}, against float32: KL {one.own.kl:.2g}, log-probability error"
            f" {one.own.mean:.2g}, at most {one.own.largest:.2g}"
        )
    for note in one.notes:
        yield from _wrapped(f"note: {note}")


def _checks(one: Verification) -> Iterator[str]:
    for section, heading in HEADINGS.items():
        yield ""
        yield heading
        for check in one.checks:
            if check.section == section:
                yield from _wrapped(f"{WORDS[check.ok]:<8}{check.name}: {check.says}", "  ", 10)


def _end(one: Verification) -> Iterator[str]:
    left = sum(check.ok is None for check in one.checks)
    more = f"; {left} not run" if left else ""
    if not one.differs:
        yield f"all {len(one.checks) - left} checks within the band{more}"
        return
    yield f"{len(one.differs)} of {len(one.checks) - left} checks differ{more}:"
    for check in one.differs:
        yield from _wrapped(f"{HEADINGS[check.section].split(',')[0].split(' against')[0].lower()}: {check.name}", "  ")


def _wrapped(text: str, indent: str = "", deeper: int = 2) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + " " * deeper, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
