"""The fields of a request's body: how they are read, which are refused, which have no effect here.

Knows the fields of OpenAI's API, vLLM, SGLang and llama.cpp that no endpoint here serves. Which fields an endpoint does
serve is in `schema`.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

from pagegraph.runtime.sampling_params import BadParameter, Range, shown


class Fields:
    """A body whose fields are taken one by one; null counts as absent, as OpenAI has it."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.ignored: list[str] = []  # names without effect
        self.taken: set[str] = set()

    def take(self, name: str) -> Any:
        """The value of a field as it is; None where it is absent."""
        self.taken.add(name)
        return self.body.get(name)

    def number(self, name: str, allowed: Range, default: Any) -> Any:
        """The number of a field, or `default`; raises BadParameter outside `allowed`."""
        value = self.take(name)
        return default if value is None else allowed.checked(name, value)

    def boolean(self, name: str, default: bool) -> bool:
        """The boolean of a field, or `default`."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            refuse(name, f"must be true or false; got {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        """The string of a field, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            refuse(name, f"must be a string; got {shown(value)}")
        return value

    def one_of(self, name: str, words: tuple[str, ...], default: str) -> str:
        """The word of a field, one of `words`, or `default`."""
        value = self.take(name)
        if value is None:
            return default
        if value not in words:
            refuse(name, f"must be {' or '.join(map(json.dumps, words))}; got {shown(value)}")
        return value

    def check_rest(self) -> list[str]:
        """Names without effect, `ignored` first. Raises on a known field that is not served and asks something."""
        ignored = self.ignored
        for name, value in self.body.items():
            if name in self.taken or (value is None and name in UNSERVED):
                continue
            row = UNSERVED.get(name, _HARMLESS)
            if row.neutral is None:
                ignored.append(name)
            elif not any(_same(value, item) for item in row.neutral):
                works = f"leave it out or give {json.dumps(row.neutral[0])}" if row.neutral else "leave it out"
                refuse(name, f"is not served here; {row.instead or works}")
        return ignored


def is_id(value: Any) -> bool:
    """Whether a JSON value may be a token id: a whole number and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def mapping(value: Any, name: str) -> dict[str, Any]:
    """The object that field `name` is, empty where it is absent; raises BadParameter on anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(name, f"must be an object; got {shown(value)}")
    return value


def refuse(name: str, message: str) -> NoReturn:
    """Raise BadParameter, which becomes a 400; `message` goes on after the field's name."""
    raise BadParameter(name, message)


def _same(value: Any, neutral: Any) -> bool:
    """Equal in JSON, where 1 is 1.0 and no boolean."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


class _Row(NamedTuple):
    """A known field that is not served: values besides null that ask nothing (None: no value has an effect here)."""

    neutral: tuple[Any, ...] | None
    instead: str = ""  # what to give in its place


def _not(*neutral: Any, instead: str = "") -> _Row:
    return _Row(neutral, f"give {instead}" if instead else "")


_HARMLESS = _Row(None)  # changes no token and no text of the answer: taken, and named in x-ignored-fields
_THINKING = 'chat_template_kwargs as the model\'s template has it, for example {"enable_thinking": false}'

# Known fields that no endpoint, or only the other one, serves. A field that is here is either without effect on the
# answer, or refused by name unless its value asks nothing. Those that only qualify a refused one, such as mirostat_tau,
# are without effect.
UNSERVED: dict[str, _Row] = {
    # OpenAI, on the other endpoint
    "messages": _not(instead="prompt, or post to /v1/chat/completions"),
    "prompt": _not(instead="messages, or post to /v1/completions"),
    "max_completion_tokens": _not(instead="max_tokens"),
    "top_logprobs": _not(0, instead="logprobs, a number"),
    "continue_final_message": _HARMLESS,
    "add_generation_prompt": _HARMLESS,
    "chat_template_kwargs": _HARMLESS,
    # OpenAI
    "tools": _not([]),
    "tool_choice": _not("none", "auto"),
    "parallel_tool_calls": _HARMLESS,
    "functions": _not([]),
    "function_call": _not("none", "auto"),
    "suffix": _not("", instead="the prompt with the model's own fill-in-the-middle tokens: text between is not served"),
    "echo": _not(False),
    "audio": _not(),
    "modalities": _not(["text"]),
    "prediction": _HARMLESS,  # makes an answer faster, never another one
    "moderation": _not(),
    "web_search_options": _not(),
    "reasoning_effort": _not(instead=_THINKING),
    "verbosity": _not("medium"),
    "user": _HARMLESS,
    "safety_identifier": _HARMLESS,
    "prompt_cache_key": _HARMLESS,
    "prompt_cache_options": _HARMLESS,
    "prompt_cache_retention": _HARMLESS,
    "metadata": _HARMLESS,
    "store": _HARMLESS,
    "service_tier": _HARMLESS,
    # vLLM
    "guided_decoding_backend": _HARMLESS,
    "guided_whitespace_pattern": _not(),
    "structural_tag": _not(),
    "bad_words": _not([]),
    "use_beam_search": _not(False),
    "length_penalty": _not(1.0),
    "early_stopping": _not(False),
    "watermarking": _not(False),
    "logits_processors": _not([]),
    "repetition_detection": _not(),
    "thinking_token_budget": _not(-1),
    "include_reasoning": _not(True),
    "logprob_token_ids": _not(),
    "return_token_offsets": _not(False),
    "return_prompt_text": _not(False),
    "return_mm_kwargs": _HARMLESS,
    "routed_experts_prompt_start": _HARMLESS,
    "spaces_between_special_tokens": _HARMLESS,  # joins tokens of slow tokenizers, which are not served
    "chat_template": _not(),
    "documents": _not([]),
    "prompt_embeds": _not(),
    "mm_processor_kwargs": _not({}),
    "media_io_kwargs": _not({}),
    "kv_transfer_params": _not({}),
    "ec_transfer_params": _not({}),
    "vllm_xargs": _not({}),
    "stream_interval": _HARMLESS,
    "session_id": _HARMLESS,
    # SGLang
    "stop_regex": _not([], ""),
    "no_stop_trim": _not(False, instead="include_stop_str_in_output"),
    "max_new_tokens": _not(instead="max_tokens"),
    "min_new_tokens": _not(0, instead="min_tokens"),
    "sampling_seed": _not(instead="seed"),
    "sampling_params": _not({}),
    "lora_path": _not(),
    "session_params": _not({}),
    "custom_logit_processor": _not(),
    "custom_params": _not({}),
    "input_ids": _not(instead="prompt, which may be token ids"),
    "task": _not(),
    "separate_reasoning": _not(True, instead="include_reasoning: false, which leaves it out"),
    "stream_reasoning": _HARMLESS,
    "reasoning": _not({}, instead=_THINKING),
    "thinking": _not({}, instead=_THINKING),
    "enable_thinking": _not(instead=_THINKING),
    "return_hidden_states": _not(False),
    "return_routed_experts": _not(False),
    "routed_experts_start_len": _HARMLESS,
    "return_prompt_token_ids": _not(False),
    "return_cached_tokens_details": _HARMLESS,
    "return_meta_info": _not(False),
    "images_config": _HARMLESS,
    "max_dynamic_patch": _HARMLESS,
    "min_dynamic_patch": _HARMLESS,
    "use_audio_in_video": _HARMLESS,
    "rid": _HARMLESS,
    "extra_key": _HARMLESS,
    "ngram_corpus_id": _HARMLESS,
    "bootstrap_host": _HARMLESS,
    "bootstrap_port": _HARMLESS,
    "bootstrap_room": _HARMLESS,
    "routed_dp_rank": _HARMLESS,
    "disagg_prefill_dp_rank": _HARMLESS,
    "data_parallel_rank": _HARMLESS,
    "custom_labels": _HARMLESS,
    # llama.cpp
    "grammar_lazy": _not(False),
    "grammar_triggers": _not([]),
    "preserved_tokens": _HARMLESS,
    "n_predict": _not(instead="max_tokens"),
    "n_cmpl": _not(1, instead="n"),
    "n_probs": _not(0, instead="logprobs"),
    "post_sampling_probs": _not(False),
    "repeat_penalty": _not(1.0, instead="repetition_penalty"),
    "repeat_last_n": _not(-1),
    "penalize_nl": _not(False),
    "penalty_prompt": _not(),
    "samplers": _not(),
    "min_keep": _not(0, 1),
    "typical_p": _not(1.0),
    "tfs_z": _not(1.0),
    "top_n_sigma": _not(-1.0, 0.0),
    "dynatemp_range": _not(0.0),
    "dynatemp_exponent": _HARMLESS,
    "xtc_probability": _not(0.0),
    "xtc_threshold": _HARMLESS,
    "dry_multiplier": _not(0.0),
    "dry_base": _HARMLESS,
    "dry_allowed_length": _HARMLESS,
    "dry_penalty_last_n": _HARMLESS,
    "dry_sequence_breakers": _HARMLESS,
    "mirostat": _not(0),
    "mirostat_tau": _HARMLESS,
    "mirostat_eta": _HARMLESS,
    "adaptive_target": _not(-1.0),
    "adaptive_decay": _HARMLESS,
    "backend_sampling": _HARMLESS,
    "lora": _not([]),
    "n_keep": _not(0, -1),
    "n_discard": _not(0),
    "n_indent": _not(0),
    "t_max_predict_ms": _not(0, -1),
    "t_max_prompt_ms": _not(0, -1),
    "system_prompt": _not("", instead="a system message"),
    "input_prefix": _not(""),
    "input_suffix": _not(""),
    "input_extra": _not([]),
    "image_data": _not([]),
    "multimodal_data": _not([]),
    "reasoning_format": _not("auto", "deepseek"),
    "reasoning_in_content": _not(False),
    "reasoning_budget_tokens": _not(-1),
    "reasoning_budget_start_tag": _HARMLESS,
    "reasoning_budget_end_tag": _HARMLESS,
    "reasoning_budget_message": _HARMLESS,
    "reasoning_budget_arm_immediately": _HARMLESS,
    "thinking_budget_tokens": _not(-1),
    "thinking_forced_open": _not(False),
    "parse_tool_calls": _not(True, instead='tool_choice: "none"'),
    "chat_format": _not(0),
    "chat_parser": _not(""),
    "response_fields": _not([]),
    "return_tokens": _not(False),
    "return_progress": _HARMLESS,
    "timings_per_token": _HARMLESS,
    "cache_prompt": _HARMLESS,
    "n_cache_reuse": _HARMLESS,
    "id_slot": _HARMLESS,
    "slot_id": _HARMLESS,
}
# What other programs call it, or what belongs into the body and not into a field of it.
UNSERVED |= {
    "extra_body": _not({}, instead="what it holds beside the other fields: clients unpack it"),
    "do_sample": _not(True, instead="temperature: 0 for the likeliest tokens"),
    "num_beams": _not(1),
    "stop_sequences": _not([], instead="stop"),
    "bad_words_ids": _not([]),
    "guided_decoding": _not({}),
    "format": _not(""),
}
UNSERVED |= {
    f"speculative.{name}": _HARMLESS  # how tokens are drafted, never which come
    for name in ("n_max", "n_min", "p_min", "type", "ngram_size_n", "ngram_size_m", "ngram_m_hits")
}
