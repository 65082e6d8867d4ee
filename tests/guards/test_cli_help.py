"""Each command's --help, as it was last agreed on. PHALANX_UPDATE_HELP=1 writes the files anew."""

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from phalanx.cli.commands import phalanx

ROOT = Path(__file__).parents[2]
SNAPSHOTS = Path(__file__).parent / "help"
COMMANDS = {"phalanx": [], **{f"phalanx-{name}": [name] for name in phalanx.commands}}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+\b")


def help_of(arguments: list[str]) -> str:
    result = CliRunner().invoke(phalanx, [*arguments, "--help"], prog_name="phalanx", terminal_width=100)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_as_agreed(name: str) -> None:
    snapshot = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("PHALANX_UPDATE_HELP") == "1":
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(help_of(COMMANDS[name]))
    assert help_of(COMMANDS[name]) == snapshot.read_text(), "agreed? then run with PHALANX_UPDATE_HELP=1"


def test_no_snapshot_is_left_over() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(COMMANDS)


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md", "docs/cli.md", "docs/ray.md", "docs/upcycle.md"])
def test_flags_of_the_documents_exist(document: str) -> None:
    known = {flag for arguments in COMMANDS.values() for flag in FLAG.findall(help_of(arguments))}
    commands = re.findall(r"^\s*(?:\$ )?(?:\S*/)?phalanx .*|`[^`]*--[a-z][^`]*`", (ROOT / document).read_text(), re.M)
    documented = {flag for text in commands if "curl" not in text for flag in FLAG.findall(text)}
    assert documented <= known
