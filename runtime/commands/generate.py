"""`runtime generate`: one completion, streamed to the terminal by an engine in this process."""

from __future__ import annotations

import sys

import click

from pagegraph.runtime.cli import config_command
from pagegraph.runtime.commands.show_config import sampling_defaults
from pagegraph.runtime.config import load_config, require_local_files
from pagegraph.runtime.sampling_params import BadParameter, SamplingParams, check_stop
from pagegraph.runtime.server.start_errors import as_one_sentence, load_tokenizer


@config_command("generate")
@click.option(
    "--config",
    "path",
    required=True,
    metavar="CONFIG",
    help="YAML file, model folder, .gguf file or Hugging Face name.",
)
@click.option("--prompt", required=True, help="Text to complete; - reads standard input.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message through the chat template.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to generate."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    help="0, or below 1e-5: the likeliest token.  [default: the model's, else 0]",
)
@click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus to sample from.  [default: the model's, else 1]")
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    help="Likeliest tokens to sample from; 0: all.  [default: the model's, else 0]",
)
@click.option("--stop", multiple=True, help="Text that ends the completion; may be repeated.")
def generate(
    path: str,
    prompt: str,
    chat: bool,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    stop: tuple[str, ...],
    overrides: dict[str, str],
) -> None:
    """Complete one prompt; the text goes to standard output, progress to standard error."""
    config = load_config(path, overrides).config
    require_local_files(config)
    sampling_defaults(config)  # what is wrong with them is said before the model is loaded
    text = sys.stdin.read() if prompt == "-" else prompt
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens, "seed": config.seed}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        SamplingParams(**given)
        words = check_stop(stop)
    except BadParameter as error:
        raise click.ClickException(str(error)) from None
    from pagegraph.runtime.llm import LLM  # here and not above: importing torch takes seconds, a bad flag should not

    with as_one_sentence(config.log_level):
        tokenizer = load_tokenizer(config)
        if chat and tokenizer.chat_template is None:
            raise click.ClickException(
                f"{config.model} has no chat template; leave --chat out to complete the prompt as it is"
            )
        asked = tokenizer.apply_chat([{"role": "user", "content": text}]) if chat else text
        llm = LLM(config, progress=sys.stderr.isatty())
        try:
            params = SamplingParams(**{"temperature": 0.0, **llm.sampling_defaults, **given})
            for piece in llm.stream(asked, params, stop=words):
                click.echo(piece, nl=False)
            click.echo()
        finally:
            llm.close()
