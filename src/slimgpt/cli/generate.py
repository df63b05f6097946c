"""``slimgpt generate`` and ``slimgpt chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from slimgpt.cli.console import app, err, handle_errors, out, show, silence_libraries
from slimgpt.cli.options import DeviceOption, DtypeOption, ModelArgument, TrustOption
from slimgpt.errors import UsageError
from slimgpt.runtime.setting_checks import SEEDS, check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimgpt.models.text_generation import Sampling

NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling probability.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")]


@app.command()
@handle_errors
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")],
    *,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Print MODEL's answer to PROMPT; a model without a chat template continues it."""
    from slimgpt.models.loading import load
    from slimgpt.models.text_generation import Sampling

    silence_libraries()
    check_seed("seed", seed)
    text = _from_standard_input(lambda: sys.stdin.read()) if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty; give some text")
    with out.status(f"loading {show(model)}"):
        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
    messages = None if raw or not tokenizer.chat_template else [{"role": "user", "content": text}]
    _answer(loaded, tokenizer, messages or text, Sampling(max_new_tokens, temperature, top_p, seed))


@app.command()
@handle_errors
def chat(
    model: ModelArgument,
    *,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Chat with MODEL; an empty line or Ctrl-D ends it."""
    from slimgpt.models.loading import load
    from slimgpt.models.text_generation import Sampling

    silence_libraries()
    check_seed("seed", seed)
    with out.status(f"loading {show(model)}"):
        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
    if not tokenizer.chat_template:
        raise UsageError(f"{model} has no chat template; use slimgpt generate")
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    err.print("[dim]an empty line or Ctrl-D ends it[/]")
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        sampling = Sampling(max_new_tokens, temperature, top_p, (seed + len(messages) // 2) % SEEDS)
        messages.append({"role": "assistant", "content": _answer(loaded, tokenizer, messages, sampling)})


def _read_line() -> str:
    err.print("[bold]> [/]", end="")
    line = _from_standard_input(lambda: sys.stdin.readline()).strip()
    if not sys.stdin.isatty():
        err.print(line, markup=False, highlight=False)
    return line


def _from_standard_input(read: Callable[[], str]) -> str:
    """Text from standard input.

    Raises:
        UsageError: it is none.
    """
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is no text in UTF-8: {error.reason} at byte {error.start + 1}") from error


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], sampling: Sampling
) -> str:
    """Write an answer to standard output, token by token, and return it.

    Raises:
        UsageError: the prompt fills the context.
    """
    from transformers import TextStreamer

    from slimgpt.models.text_generation import generate_answers, prompt_ids

    streamer = None if out.quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    (answer,) = generate_answers(model, tokenizer, [prompt_ids(tokenizer, prompt)], sampling, streamer=streamer)
    if out.quiet:
        typer.echo(answer.text)
    return answer.text.strip()
