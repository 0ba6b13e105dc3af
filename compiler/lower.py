"""Inductor: the captured forward becomes machine code, and its artefacts stay in one cache folder.

Knows which sizes are dynamic and how to read back the lowered graph; knows nothing of steps or buckets.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from compiler.capture import CapturedModel
from compiler.state import DeviceState, Staged

_compiling = threading.Lock()


def use_cache(folder: Path) -> None:
    """Keep Inductor's and Triton's artefacts under `folder`; call before the first compilation."""
    folder.mkdir(parents=True, exist_ok=True)
    # Both libraries read these variables only.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def compile_forward(
    captured: CapturedModel, backend: str | Callable = "inductor"
) -> Callable[..., torch.Tensor]:
    """One full graph (no breaks) of the forward; sizes marked dynamic on the inputs stay symbolic."""
    options = {"epilogue_fusion": True} if backend == "inductor" else None
    return torch.compile(captured, fullgraph=True, backend=backend, options=options)


def mark_dynamic(staged: Staged) -> None:
    """Tokens, sequences and table width vary from step to step: one graph serves them all."""
    single = staged.token_ids.shape[0] == 1
    if not single:
        for tensor in (staged.token_ids, staged.positions, staged.slots):
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in (staged.query_start, staged.seq_lens, staged.logits_index, staged.block_tables):
            torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.mark_dynamic(staged.block_tables, 1)


def call(forward: Callable[..., torch.Tensor], staged: Staged, state: DeviceState) -> torch.Tensor:
    """Run a forward, compiled or not, on a staged step -> logits [S, vocab]."""
    known = staged.token_ids >= 0
    token_ids = torch.where(known, staged.token_ids, state.last_tokens[staged.token_rows])
    return forward(
        token_ids,
        staged.positions,
        staged.slots,
        staged.block_tables,
        staged.query_start,
        staged.seq_lens,
        staged.logits_index.long(),
        state.key_caches,
        state.value_caches,
    )
