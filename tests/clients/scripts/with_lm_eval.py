"""lm-eval's local-completions and local-chat-completions on two tasks of our own: choices weighed and text written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from cases import API_URL, MODEL, TOKENIZER, case, main, note
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parents[1] / "lm_eval_tasks"
COMMON = f"model={MODEL},max_retries=1,num_concurrent=2"
COMPLETIONS = f"{COMMON},base_url={API_URL}/completions,tokenizer={TOKENIZER},tokenizer_backend=huggingface"
CHAT = f"{COMMON},base_url={API_URL}/chat/completions"


def evaluate(task: str, kind: str, arguments: str, **more: Any) -> dict[str, Any]:
    """The scores of one task; its file of questions is named as it lies in the folder."""
    os.chdir(TASKS)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **more
    )
    assert found
    print(found["results"])
    return found["results"][task]


def check_choices(arguments: str) -> None:
    assert evaluate("capitals_choice", "local-completions", arguments)["acc,none"] >= 0.75


@case("plain")
def likelihood_of_choices() -> None:
    check_choices(COMPLETIONS)


@case("plain")
def likelihood_of_choices_in_batches() -> None:
    check_choices(f"{COMPLETIONS},batch_size=8")


@case("plain", "likelihood with the server's tokenizer")
def likelihood_remote_tokenizer() -> None:
    check_choices(f"{COMMON},base_url={API_URL}/completions,tokenizer_backend=remote")


@case("plain")
def written_text() -> None:
    assert evaluate("capitals_written", "local-completions", COMPLETIONS)["exact_match,stripped"] >= 0.75


@case("plain", "written text, chat")
def written_in_a_chat() -> None:
    evaluate("capitals_written", "local-chat-completions", CHAT, apply_chat_template=True)


if __name__ == "__main__":
    note("a likelihood task (echo with log-probabilities, also with the server's own tokenizer) and a generation task")
    main("lm-eval")
