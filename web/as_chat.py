"""What the surfaces share that are read as a chat: fields that they take as they are, and the names in errors.

Knows patterns of names, given; no surface.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from pagegraph.runtime.ipc.client import RequestFailed
from pagegraph.runtime.sampling_params import BadParameter
from pagegraph.web.errors import ApiError, as_api_error
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.structured import PLAIN

Names = Sequence[tuple[str, str]]  # pattern of a chat's field name, and what it is called instead

# Fields beyond the surface's own, under the names that /v1/chat/completions has for them.
EXTENSIONS = (
    "seed", "top_k", "min_p", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "allowed_token_ids",
    "skip_special_tokens", "chat_template_kwargs", "truncate_prompt_tokens", "truncation_side", "priority", "cache_salt",
    "structured_outputs", "documents", *PLAIN,
)  # fmt: skip


@contextlib.contextmanager
def renaming(names: Names) -> Iterator[None]:
    """Errors raised inside are raised as `renamed`."""
    try:
        yield
    except (ApiError, BadParameter, RequestFailed) as error:
        raise renamed(error, names) from None


def renamed(error: Exception, names: Names) -> ApiError:
    """`error` with the name of the field at fault as the surface has it, there and in its message."""
    told = as_api_error(error)
    if told.param is None:
        return told
    message = told.message
    if told.code == "context_length_exceeded":  # its arithmetic names other fields, too
        for pattern, instead in names:
            message = re.sub(rf"(?<![\w.]){pattern}(?!\w)", instead, message)
    param = own_name(told.param, names)
    if param != told.param:
        message = re.sub(rf"(?<![\w.]){re.escape(told.param)}(?!\w)", param.replace("\\", r"\\"), message)
    return ApiError(told.status, message, param=param, code=told.code)


def own_name(name: str, names: Names) -> str:
    """What a chat's field is called on the surface: the beginning that the first pattern matches is replaced."""
    for pattern, instead in names:
        if match := re.match(pattern, name):
            return match.expand(instead) + name[match.end() :]
    return name


def rename_ignored(checked: GenerationRequest, names: Names) -> None:
    """The request's fields without effect under the names that the surface has for them."""
    checked.ignored[:] = [own_name(name, names) for name in checked.ignored]
