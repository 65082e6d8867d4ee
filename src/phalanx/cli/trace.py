"""`phalanx trace`: what dumps say after the fact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from phalanx.cli.exit_codes import FOUND
from phalanx.cli.output import opened
from phalanx.cli.setting_types import type_for
from phalanx.errors import DumpError, UserError

if TYPE_CHECKING:
    from phalanx.ledger.after import Trace


_LINES_SHOWN = 10


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints. `verdict` is a ledger's Verdict as an object, or null."""

    source: str
    text: str
    verdict: msgspec.Raw
    ranks: tuple[int, ...]
    missing: tuple[int, ...]
    groups: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]


@click.command()
@click.argument("directory", metavar="DIR", type=type_for("DIR", str))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of lines.")
@click.option(
    "--perfetto", type=type_for("--perfetto", str), metavar="FILE", help="Write a trace for ui.perfetto.dev to look at."
)
@click.option(
    "--flight-recorder",
    type=type_for("--flight-recorder", str),
    metavar="DIR",
    help="Write dumps that torchfrtrace reads, of dumps of ours, into a directory that is new or empty.",
)
def trace(directory: str, as_json: bool, perfetto: str | None, flight_recorder: str | None) -> None:
    """Say which rank was to blame, from the dumps in DIR.

    They are what `--ledger-dump` has written, or what PyTorch's Flight Recorder has: a file for each rank, its name
    ending in the rank, a pickle (of which nothing is run) or JSON. The exit code is 0 if nothing is wrong, 3 if
    something is.
    """
    found = read_trace(Path(directory))
    if perfetto is not None:
        from phalanx.ledger.perfetto import perfetto as timeline

        with opened(perfetto, "--perfetto") as write:
            write(timeline(found).decode())
    left_out = 0 if flight_recorder is None else _export(found, Path(flight_recorder))
    if left_out:
        found = found._replace(notes=(*found.notes, f"{left_out} records left out that torch has no name for"))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(_findings(found))).decode())
    else:
        _print(found)
    if found.verdict is not None:
        click.get_current_context().exit(FOUND)


def read_trace(directory: Path) -> Trace:
    """What the directory's dumps say, whosever they are. Raises DumpError."""
    from phalanx.ledger import dump, flight_recorder
    from phalanx.ledger.recorded import trace_of

    try:
        if dump.is_dump(directory):
            return dump.read(directory)
        if flight_recorder.is_recording(directory):
            return trace_of(flight_recorder.read(directory))
    except OSError as error:
        raise DumpError(f"{directory} cannot be read: {error.strerror}") from error
    raise DumpError(
        f"{directory} holds no dump: neither {dump.WHOLE}, nor files whose names end in a rank, such as"
        f" {flight_recorder.PREFIX}0"
    )


def _export(found: Trace, directory: Path) -> int:
    """How many records were left out."""
    from phalanx.ledger.flight_recorder import write
    from phalanx.ledger.flight_recorder_export import recordings_of

    if found.source != "phalanx":
        raise UserError("--flight-recorder: these are dumps of a Flight Recorder already")
    recordings, left_out = recordings_of(found)
    try:
        write(directory, recordings)
    except OSError as error:
        raise DumpError(f"{directory} cannot be written: {error.strerror}") from error
    return left_out


def _text(found: Trace) -> str:
    """The verdict, culprit first, and from where the collectives were issued or where the ranks are."""
    if found.verdict is None:
        return "nothing is wrong"
    verdict = found.verdict
    said = str(msgspec.structs.replace(verdict, stacks={}))
    for rank, lines in verdict.stacks.items():
        has_not_come = verdict.cause == "late" and rank in verdict.culprits
        recorded = "issued its last from" if has_not_come else "issued it from"
        where = "is at" if found.source == "phalanx" else recorded
        said += f"\n  rank {rank} {where}" + "".join(f"\n    {line}" for line in lines[:_LINES_SHOWN])
    return said


def _findings(found: Trace) -> Findings:
    return Findings(
        source=found.source,
        text=_text(found),
        verdict=msgspec.Raw(msgspec.json.encode(found.verdict)),
        ranks=tuple(found.look.ranks),
        missing=found.missing,
        groups={name: tuple(ranks) for name, ranks in found.look.groups.items()},
        notes=found.notes,
    )


def _print(found: Trace) -> None:
    ranks, groups = len(found.look.ranks), len(found.look.groups)
    click.echo(_text(found))
    of = "our ledger" if found.source == "phalanx" else "PyTorch's Flight Recorder"
    click.echo(f"(from dumps of {of}: {ranks} rank{'s'[: ranks != 1]}, {groups} group{'s'[: groups != 1]})")
    for note in found.notes:
        click.echo(f"note: {note}")
