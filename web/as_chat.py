"""What the surfaces share that are read as a chat: fields that they take as they are, and the names in errors.

Knows patterns of names, given; no surface.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from pagegraph.runtime.sampling_params import BadParameter
from pagegraph.web.errors import ApiError, as_api_error

Names = Sequence[tuple[str, str]]  # pattern of a chat's field name, and what it is called instead

# Fields beyond the surface's own, under the names that /v1/chat/completions has for them.
EXTENSIONS = (
    "seed", "top_k", "min_p", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "allowed_token_ids",
    "skip_special_tokens", "chat_template_kwargs", "truncate_prompt_tokens", "truncation_side", "priority", "cache_salt",
)  # fmt: skip


@contextlib.contextmanager
def renaming(names: Names) -> Iterator[None]:
    """Errors raised inside are raised as `renamed`."""
    try:
        yield
    except (ApiError, BadParameter) as error:
        raise renamed(error, names) from None


def renamed(error: Exception, names: Names) -> ApiError:
    """`error` with the first pattern that matches the field at fault replaced, there and in its message."""
    told = as_api_error(error)
    if told.param is None:
        return told
    message = told.message
    if told.code == "context_length_exceeded":  # its arithmetic names other fields, too
        for pattern, instead in names:
            message = re.sub(rf"(?<![\w.]){pattern}(?!\w)", instead, message)
    for pattern, instead in names:
        if match := re.match(pattern, told.param):
            now = match.expand(instead)
            message = re.sub(rf"(?<![\w.]){re.escape(match[0])}(?!\w)", now, message)
            return ApiError(told.status, message, param=now + told.param[match.end() :], code=told.code)
    return told
