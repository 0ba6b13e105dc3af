"""The output head of a model as a function of hidden states.

A causal language model of transformers is a body, which gives hidden states, and a head. What a head does besides its
product, scales and soft caps, stands in the model's own forward: so that forward is called again, on a body that gives
back hidden states which are there already. Knows no weights, no steps and no compilation.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


class _Given(BaseModelOutputWithPast):
    """A body's output that is its hidden states alone; whatever else a forward hands on is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _GivenEmbeddings(nn.Module):
    """Stands where the embeddings stood; a body that is given its hidden states does not look at them."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self._output = hidden_states

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._output


class _GivenBody(nn.Module):
    """Stands where the body stood, and has the attributes that it had."""

    def __init__(self, hidden_states: torch.Tensor, body: nn.Module) -> None:
        super().__init__()
        self.__dict__["_body"] = body
        self.embed_tokens = _GivenEmbeddings(hidden_states)
        self._output = _Given(last_hidden_state=cast(torch.FloatTensor, hidden_states))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_body"], name)

    def forward(self, *_: Any, **__: Any) -> _Given:
        return self._output


class NoHead(nn.Module):
    """Stands where a checkpoint has no output head: logits that say nothing, of a model for embeddings alone."""

    def __init__(self, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)  # some forwards ask for its dtype

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.vocab_size)


def drop_missing_head(model: Any, names: set[str]) -> str | None:
    """Put `NoHead` into a model whose checkpoint, of tensors `names`, is a body's alone -> the path of the head.

    None where the checkpoint has a head, where the head is tied to the embeddings, or where config.json says that there
    is a head: then it is missing.
    """
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    saved = getattr(model.config, "architectures", None) or [""]
    if path is None or f"{path}.weight" in names | tied or not saved[0].endswith("Model"):
        return None
    model.set_submodule(path, NoHead(model.config.get_text_config().vocab_size, head.weight.dtype))
    return path


def note_bodies(model: nn.Module) -> dict[str, Any]:
    """What each model within `model` returned last, by path, in the order of their returning; filled by forwards."""
    outputs: dict[str, Any] = {}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs.pop(path, None)
        outputs[path] = output

    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel):
            module.register_forward_hook(partial(note, path))
    return outputs


def body_of(model: nn.Module, outputs: dict[str, Any], shape: tuple[int, int]) -> tuple[str, int]:
    """The path of the outermost body, the last of `outputs` to return that the head needs alone, and the size of its
    hidden states.

    ("", 0) where the head needs more than these.

    shape: (tokens, vocabulary) of the logits that the head makes of them.
    """
    for path, output in reversed(outputs.items()):
        hidden = hidden_states_of(output)
        if hidden is None or hidden.shape[:2] != (1, shape[0]):
            continue
        try:
            with torch.no_grad():
                logits = head_logits(model, path, hidden[0])
        except Exception:  # a head of the model's own, which may want anything
            continue
        if logits.shape == shape:
            return path, hidden.shape[-1]
    return "", 0


def hidden_states_of(output: Any) -> torch.Tensor | None:
    """Hidden states [1, T, H] of what a body returned; None where it returned something else."""
    hidden = output[0] if isinstance(output, tuple | dict) and len(output) else None
    return hidden if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 else None


def with_hidden_states(output: Any, hidden_states: torch.Tensor) -> Any:
    """What a body returned, with other hidden states [1, R, H] in their place."""
    if isinstance(output, tuple):
        return hidden_states, *output[1:]
    output[next(iter(output))] = hidden_states
    return output


def head_logits(model: nn.Module, body: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits [R, vocab] of hidden states [R, H], by the forward of `model`, whose body stands at path `body`."""
    head = _with(model, body.split("."), _GivenBody(hidden_states[None], model.get_submodule(body)))
    ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)  # some look at their shape
    return head(input_ids=ids, use_cache=False, logits_to_keep=0).logits[0]


def _with(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """`module` with another one at `path`: copies of what lies on the way, everything else shared."""
    name, *rest = path
    shallow = copy.copy(module)
    inner = _with(module.get_submodule(name), rest, replacement) if rest else replacement
    shallow.__dict__["_modules"] = {**module._modules, name: inner}
    return shallow
