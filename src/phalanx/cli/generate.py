"""`phalanx generate`: outputs of one prompt or of a file of them, without a server."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from phalanx.cli.options import SectionedCommand, engine_options, given, sampling_options
from phalanx.cli.output import Write, opened
from phalanx.cli.prompt_file import PromptLine, read_prompts
from phalanx.cli.setting_types import type_for
from phalanx.config import Config
from phalanx.engine.admission import fitted
from phalanx.errors import ConfigError, EngineDeadError, RequestError
from phalanx.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from phalanx.engine.engine import Engine

MAX_TOKENS = 256
"""Without a limit, a model without an end-of-sequence token would fill its context."""
_SHOWN_DEFAULTS = {
    "max_tokens": MAX_TOKENS,
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), "the model's own"),
}
NUM_IN_ENGINE = 1024
"""Prompts that are handed to the engine at a time: more than it runs, and few beside the prompts of a large file."""


class OutputLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of the output file."""

    index: int
    id: str | int | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    text: str = msgspec.field(default_factory=str)
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int


@click.command(
    cls=SectionedCommand,
    params=[
        click.Option(["--file", "-f"], help="Prompts: a line each, or a line of JSON each if it ends in .jsonl."),
        click.Option(["--output", "-o"], help="Write a line of JSON for each prompt here instead of to the terminal."),
        click.Option(["--chat"], is_flag=True, help="Each prompt is a user's message; the model's template is used."),
        *sampling_options(_SHOWN_DEFAULTS, leave_out=("logprobs",)),  # which would not be in the output
        *engine_options(leave_out=("served_model_name",)),
    ],
)
@click.argument("model", type=type_for("model", str))
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...", type=type_for("prompt", str))
def generate(
    model: str, prompts: tuple[str, ...], file: str | None, output: str | None, chat: bool, **settings: Any
) -> None:
    """Generate from PROMPT, or from each line of a file.

    One prompt's text appears while it is made. Several give a line of JSON each, in their order.
    """
    lines = _lines(prompts, file)
    sampling = given(settings, SamplingParams)
    SamplingParams(**{"max_tokens": MAX_TOKENS} | sampling).check()
    names = SamplingParams.__struct_fields__
    config = Config.build(model=model, **given({k: v for k, v in settings.items() if k not in names}))
    with opened(output) as write:
        is_plain = _is_plain(lines, file, output)
        asyncio.run(_generate(config, lines, sampling, chat=chat, write=write, is_plain=is_plain))


def _lines(prompts: Sequence[str], file: str | None) -> list[PromptLine]:
    if file is None:
        if not prompts:
            raise click.UsageError("there is no prompt: give some after MODEL, or a file of them with --file")
        return [PromptLine(prompt=prompt) for prompt in prompts]
    if prompts:
        raise ConfigError("--file", file, "give either prompts or a file of them")
    return read_prompts(Path(file))


def _is_plain(lines: Sequence[PromptLine], file: str | None, output: str | None) -> bool:
    return len(lines) == 1 and file is None and output is None


async def _generate(
    config: Config, lines: Sequence[PromptLine], sampling: dict[str, Any], *, chat: bool, write: Write, is_plain: bool
) -> None:
    async with _engine(config) as engine:
        settings = PromptSettings(engine, sampling, chat)
        if is_plain:
            await _print_one(engine, settings.token_ids(lines[0]), settings, write)
        else:
            await _write_all(engine, lines, settings, write)


@asynccontextmanager
async def _engine(config: Config) -> AsyncIterator[Engine]:
    from phalanx.cli.progress import StartScreen
    from phalanx.engine.fleet import start_engine

    with StartScreen() as screen:
        engine = await start_engine(config, screen.note)
    try:
        yield engine
    finally:
        await engine.close()


class PromptSettings:
    """What the command line says of every prompt."""

    def __init__(self, engine: Engine, sampling: Mapping[str, Any], chat: bool) -> None:
        """`sampling` has the parameters that were given."""
        self._engine = engine
        self._has_limit = "max_tokens" in sampling
        self._params = msgspec.structs.replace(engine.default_sampling, **{"max_tokens": MAX_TOKENS, **sampling})
        self._chat = chat

    def token_ids(self, line: PromptLine) -> list[int]:
        tokenizer = self._engine.tokenizer
        if line.messages is not None:
            return tokenizer.apply_chat(line.messages)
        assert line.prompt is not None
        if self._chat:
            return tokenizer.apply_chat([{"role": "user", "content": line.prompt}])
        return tokenizer.encode(line.prompt)

    def params(self, prompt: Sequence[int]) -> SamplingParams:
        if self._has_limit:
            return self._params
        return fitted(self._params, len(prompt), self._engine.info.max_model_len)


async def _print_one(engine: Engine, prompt: list[int], settings: PromptSettings, write: Write) -> None:
    num_tokens, started = 0, time.monotonic()
    async for delta in engine.generate(prompt, settings.params(prompt)):
        if delta.finish_reason == "error":
            raise EngineDeadError(delta.error or "the request failed")
        num_tokens += len(delta.token_ids)
        write(delta.text)
    write("\n")
    if sys.stderr.isatty():
        taken_s = time.monotonic() - started
        click.echo(f"({num_tokens} tokens, {num_tokens / taken_s:.1f} a second)", err=True)


async def _write_all(engine: Engine, lines: Sequence[PromptLine], settings: PromptSettings, write: Write) -> None:
    """Write outputs in the order of `lines`, each as soon as those before it are written."""
    places = asyncio.Semaphore(NUM_IN_ENGINE)

    async def one(index: int, line: PromptLine) -> OutputLine:
        async with places:
            try:
                return await _output_line(engine, index, line, settings)
            except RequestError as error:
                raise RequestError(f"{error.field} (index {index})", error.value, error.allowed) from None

    tasks = [asyncio.create_task(one(index, line)) for index, line in enumerate(lines)]
    try:
        with _bar(len(tasks)) as advance:
            for task in tasks:
                task.add_done_callback(lambda _: advance())
            for task in tasks:
                write(msgspec.json.encode(await task).decode() + "\n")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _output_line(engine: Engine, index: int, line: PromptLine, settings: PromptSettings) -> OutputLine:
    prompt = settings.token_ids(line)
    deltas = [delta async for delta in engine.generate(prompt, settings.params(prompt))]
    if deltas[-1].finish_reason == "error":
        raise EngineDeadError(deltas[-1].error or "the request failed")
    assert deltas[-1].finish_reason is not None
    return OutputLine(
        index=index,
        id=line.id,
        prompt=line.prompt,
        messages=line.messages,
        text="".join(delta.text for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
        num_prompt_tokens=len(prompt),
        num_output_tokens=sum(len(delta.token_ids) for delta in deltas),
    )


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """Gives a function that counts one more as done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)
