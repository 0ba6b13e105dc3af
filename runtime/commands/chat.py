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
from typing import Any

import click

from pagegraph.runtime.cli import CONTEXT
from pagegraph.runtime.config import API_KEY_VARIABLE, ConfigError, first_key
from pagegraph.runtime.server.child import bound_to_parent, child_environment, module_command
from pagegraph.runtime.terminal_chat import Answer, ChatError, TerminalChat

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/new begins anew, /system TEXT sets the system prompt, /retry answers again, /quit or Ctrl-D ends; Ctrl-C stops an answer"
_READY_S = 1800.0  # for a model to be downloaded, loaded and compiled
_STOP_S = 40.0
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/\S*)?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and newline
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
    try:
        api_key = api_key or first_key(os.environ)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    fields: dict[str, Any] = {name: value for name, value in params.items() if value is not None}
    is_url = target.startswith(("http://", "https://"))
    if not is_url and _HOST_AND_PORT.fullmatch(target) and not os.path.exists(target):
        raise click.UsageError(f"{target} is no CONFIG; did you mean http://{target}?")
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
                talk.forget()
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

    is_open = False  # whether something was written that no newline ends

    def show(part: str, is_reasoning: bool) -> None:
        nonlocal is_open
        is_open = True
        part = _printable(part) if (sys.stderr if is_reasoning else sys.stdout).isatty() else part
        click.echo(click.style(part, dim=True) if is_reasoning else part, nl=False, err=is_reasoning)

    try:
        answer = talk.again(show) if text is None else talk.say(text, show)
    except ChatError:
        if is_open:
            click.echo()
        raise
    click.echo()
    if sys.stderr.isatty():
        click.secho(str(answer), dim=True, err=True)
    return answer


def _printable(text: str) -> str:
    """Text that commands no terminal: what a model says, or quotes, may hold escape sequences."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


@contextlib.contextmanager
def _served(config: str) -> Iterator[str]:
    """The address of a server of CONFIG on a free port, which ends with the chat."""
    with tempfile.TemporaryFile() as log:  # without a name: nothing is left of it, however the chat ends
        serve = module_command("pagegraph.runtime.cli", "serve", config, "--port", "0", "--workers", "1")
        # A session of its own: Ctrl-C is for the chat.
        server = subprocess.Popen(
            bound_to_parent(serve), stdout=log, stderr=log, env=child_environment(), start_new_session=True
        )
        try:
            click.secho(f"loading {config} ...", dim=True, err=True)
            yield _address(server, log.fileno())
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(server: subprocess.Popen[bytes], log: int) -> str:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        has_ended = server.poll() is not None
        text = _written(log)
        if found := _ADDRESS.search(text):
            return found[1]
        if has_ended:
            raise click.ClickException(f"the server ended: {text[-2000:].strip()}")
        time.sleep(0.1)
    raise click.ClickException(f"the server was not ready within {_READY_S:g} s: {_written(log)[-2000:]}")


def _written(log: int) -> str:
    """All of a log that another process writes to: its place in the file is not moved."""
    return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
