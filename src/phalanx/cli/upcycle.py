"""`phalanx upcycle`: a dense model made into a mixture of experts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click
import msgspec

from phalanx.cli.documentation import field_texts
from phalanx.cli.options import flag, given
from phalanx.cli.setting_types import type_for
from phalanx.errors import ConfigError
from phalanx.models.mixture import Mixture

if TYPE_CHECKING:
    from phalanx.models.progress import Progress


def _options() -> list[click.Parameter]:
    hints, texts = get_type_hints(Mixture, include_extras=True), field_texts(Mixture)
    return [_option(field, hints[field.name], texts[field.name]) for field in msgspec.structs.fields(Mixture)]


def _option(field: msgspec.structs.FieldInfo, hint: Any, text: str) -> click.Option:
    if field.default not in (None, msgspec.NODEFAULT):
        text = f"{text} [default: {field.default:g}]"
    name = flag(field.name)
    return click.Option([name], type=type_for(name, hint), required=field.required, help=text)


@click.command(params=_options())
@click.argument("source", type=type_for("SOURCE", str))
@click.argument("target", type=type_for("TARGET", str))
@click.option("--revision", type=type_for("--revision", str), help="Branch, tag or commit of a hub model.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in TARGET.")
def upcycle(source: str, target: str, revision: str | None, overwrite: bool, **settings: Any) -> None:
    """Make a mixture of experts from the dense model SOURCE.

    Each expert begins as a copy of the model's MLP. TARGET is the directory to write; it is there only when it is
    complete.
    """
    mixture = _mixture(settings)
    made = _upcycle(source, target, mixture, revision=revision, overwrite=overwrite)
    click.echo(f"{target}: {made}, {mixture.num_experts} experts, {mixture.num_experts_per_tok} a token")


def _mixture(settings: dict[str, Any]) -> Mixture:
    try:
        return Mixture(**given(settings))
    except ConfigError as error:  # told by the name of its flag
        raise ConfigError(flag(error.field), error.value, error.allowed) from error


def _upcycle(source: str, target: str, mixture: Mixture, *, revision: str | None, overwrite: bool) -> str:
    """Says what was made."""
    from phalanx.models.checkpoint import resolve
    from phalanx.models.whole_directory import prepare_target

    directory = Path(os.path.expanduser(target)).resolve()  # what was left of a run that was killed is beside it
    prepare_target(directory, overwrite=overwrite)  # before the model is fetched or converted
    with _bar() as progress:
        checkpoint = resolve(source, revision=revision, progress=progress)
        from phalanx.models.upcycle import upcycle

        made = upcycle(checkpoint, directory, mixture, overwrite=overwrite, progress=progress)
    return made.architecture


@contextmanager
def _bar() -> Iterator[Progress]:
    """Shows on a terminal what is being done, and how much of it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
