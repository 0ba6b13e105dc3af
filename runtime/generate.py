"""`runtime generate`: one completion, streamed to the terminal by an engine in this process."""

from __future__ import annotations

import sys

import click

from runtime.cli import config_command
from runtime.config import load_config, require_local_files
from runtime.protocol import SamplingParams


@config_command("generate")
@click.option("--config", "path", required=True, metavar="CONFIG", help="YAML file, model folder, .gguf file or Hugging Face name.")
@click.option("--prompt", required=True, help="Text to complete; - reads standard input.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message through the chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus to sample from.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Likeliest tokens to sample from; 0: all.")
@click.option("--stop", multiple=True, help="Text that ends the completion; may be repeated.")
def generate(
    path: str,
    prompt: str,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop: tuple[str, ...],
    overrides: dict[str, str],
) -> None:
    """Complete one prompt; the text goes to standard output, progress to standard error."""
    config = load_config(path, overrides).config
    require_local_files(config)
    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=config.seed)
    from runtime.llm import LLM  # here and not above: importing torch takes seconds, a bad flag should not

    llm = LLM(config, progress=sys.stderr.isatty())
    try:
        asked = llm.tokenizer.apply_chat([{"role": "user", "content": text}]) if chat else text
        for piece in llm.stream(asked, params, stop=list(stop)):
            click.echo(piece, nl=False)
        click.echo()
    finally:
        llm.close()
