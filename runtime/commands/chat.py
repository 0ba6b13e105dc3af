"""`runtime chat`: talk to a running server, or to a model that is served for as long as the chat lasts.

What is typed goes line by line to `runtime.terminal_chat`; a line that begins with a slash is a command to the chat
itself. Without a terminal every line of the input is a message, and only answers are written to the output.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.cli import CONTEXT
from pagegraph.runtime.config import API_KEY_VARIABLE
from pagegraph.runtime.server.child import BOUND_TO_PARENT, child_environment, module_command
from pagegraph.runtime.terminal_chat import Answer, ChatError, TerminalChat

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/new begins anew, /system TEXT sets the system prompt, /retry answers again, /quit or Ctrl-D ends; Ctrl-C stops an answer"
_READY_S = 1800.0  # for a model to be downloaded, loaded and compiled
_STOP_S = 40.0
_ADDRESS = re.compile(r"^  (http://\S+)  serves ", re.M)


@click.command("chat", context_settings=CONTEXT)
@click.argument("target", default=DEFAULT_URL)
@click.option("--model", help="Name of the model at the server (default: its first).")
@click.option("--api-key", help=f"Key that the server asks for; ${API_KEY_VARIABLE} keeps it from other users' eyes.")
@click.option("--system", help="System prompt.")
@click.option("--temperature", type=float, help="0: the likeliest token each time (default: the model's).")
@click.option("--top-p", type=float, help="(default: the model's)")
@click.option("--max-tokens", type=int, help="Of an answer (default: what fits).")
@click.option("-q", "--quick", metavar="TEXT", help="Ask this one thing, print the answer, and end.")
def chat(
    target: str, model: str | None, api_key: str | None, system: str | None, quick: str | None, **params: float | None
) -> None:
    """Chat in the terminal with TARGET: the URL of a server, or a CONFIG as `runtime serve` takes it."""
    api_key = api_key or os.environ.get(API_KEY_VARIABLE)
    fields: dict[str, Any] = {name: value for name, value in params.items() if value is not None}
    is_url = target.startswith(("http://", "https://"))
    with contextlib.nullcontext(target) if is_url else _served(target) as url:
        talk = TerminalChat(url.rstrip("/").removesuffix("/v1"), api_key, model, system, fields)
        try:
            name = talk.find_model()
            if quick is not None:
                _answer(talk, quick)
                return
        except ChatError as error:
            raise click.ClickException(str(error)) from error
        if sys.stdin.isatty():
            import readline  # noqa: F401  # which gives input() its history and keys

            click.secho(f"{name} at {talk.base_url}. {HELP}.", dim=True, err=True)
        _converse(talk)


def _converse(talk: TerminalChat) -> None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                talk.messages.clear()
            elif command == "/system":
                talk.system = rest.strip() or None
            elif command == "/retry":
                _answer(talk, None)
            elif command == "/help" or re.fullmatch(r"/\w+", command):
                click.secho(HELP, dim=True, err=True)
            elif line:
                _answer(talk, line)
        except ChatError as error:
            click.secho(str(error), fg="red", err=True)
            if not sys.stdin.isatty():
                raise click.exceptions.Exit(1) from error


def _answer(talk: TerminalChat, text: str | None) -> Answer:
    """Say `text`, or answer the last message again; write the answer as it comes, reasoning and figures beside it."""

    def show(part: str, is_reasoning: bool) -> None:
        click.secho(part, nl=False, dim=is_reasoning or None, err=is_reasoning)

    answer = talk.again(show) if text is None else talk.say(text, show)
    click.echo()
    if sys.stderr.isatty():
        click.secho(str(answer), dim=True, err=True)
    return answer


@contextlib.contextmanager
def _served(config: str) -> Iterator[str]:
    """The address of a server of CONFIG on a free port, which ends with the chat."""
    with tempfile.TemporaryDirectory(prefix="pagegraph-chat-") as folder:
        log = Path(folder, "log")
        serve = module_command("pagegraph.runtime.cli", "serve", config, "--port", "0", "--workers", "1")
        command = (
            [sys.executable, "-c", BOUND_TO_PARENT, str(os.getpid()), *serve] if sys.platform == "linux" else serve
        )
        with open(log, "w") as out:
            # A session of its own: Ctrl-C is for the chat.
            server = subprocess.Popen(command, stdout=out, stderr=out, env=child_environment(), start_new_session=True)
        try:
            click.secho(f"loading {config} ...", dim=True, err=True)
            yield _address(server, log)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        text = log.read_text(errors="replace")
        if found := _ADDRESS.search(text):
            return found[1]
        if server.poll() is not None:
            raise click.ClickException(f"the server ended: {text[-2000:].strip()}")
        time.sleep(0.1)
    raise click.ClickException(
        f"the server was not ready within {_READY_S:g} s: {log.read_text(errors='replace')[-2000:]}"
    )
