"""`phalanx reload`, `phalanx sleep` and `phalanx wake`: other weights in a server that runs, and its rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from phalanx.cli.running_server import TIMEOUT_S, RunningServer
from phalanx.cli.setting_types import SecondsRange

if TYPE_CHECKING:
    import msgspec

ORDER_TIMEOUT_S = 600.0
"""For what is read from a checkpoint, and for the server to answer."""


@click.command()
@click.argument("url")
@click.argument("model", required=False)
@click.option(
    "--when",
    type=click.Choice(["now", "idle"]),
    default="now",
    show_default=True,
    help="Requests that run go on with the new weights, or end with the old ones while others wait.",
)
@click.option(
    "--timeout",
    type=SecondsRange(min=0.0, min_open=True, max=1e6),
    default=ORDER_TIMEOUT_S,
    show_default=True,
    help="Seconds that reading, and waiting for requests, may take. Then the old weights stay.",
)
def reload(url: str, model: str | None, when: str, timeout: float) -> None:
    """Have the server at URL compute with the weights in the directory MODEL; without it, read the same files again.

    It must be the same model with other weights. Requests stream on meanwhile; if it fails, the old weights stay.
    """
    from phalanx.server.maintenance import ReloadRequest

    asked = ReloadRequest(model=model, when="idle" if when == "idle" else "now", timeout_s=timeout)
    _order(url, "/reload", asked, timeout + TIMEOUT_S)


@click.command()
@click.argument("url")
@click.option(
    "--level",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="1 gives back the memory of the KV cache, 2 that of the weights too.",
)
def sleep(url: str, level: int) -> None:
    """Have the server at URL give memory back until `phalanx wake`. Requests wait meanwhile."""
    from phalanx.server.maintenance import SleepRequest

    _order(url, "/sleep", SleepRequest(level=2 if level == 2 else 1), ORDER_TIMEOUT_S)


@click.command()
@click.argument("url")
@click.argument("model", required=False)
def wake(url: str, model: str | None) -> None:
    """Have the server at URL go on after `phalanx sleep`; after level 2 with the weights in the directory MODEL."""
    from phalanx.server.maintenance import WakeRequest

    _order(url, "/wake", WakeRequest(model=model), ORDER_TIMEOUT_S)


def _order(url: str, path: str, asked: msgspec.Struct, timeout_s: float) -> None:
    from phalanx.server.maintenance import MaintenanceReport

    found = RunningServer(url).call("POST", path, MaintenanceReport, asked, timeout_s=timeout_s)
    for one in found.engines:
        level = f" (level {one.level})" if one.level else ""
        click.echo(f"engine {one.engine}: {one.state}{level}, weights version {one.weights_version}")
    if found.last is not None:
        click.echo(f"it took {found.last.took_s:.1f} s")
