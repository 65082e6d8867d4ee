"""Where ranks would run, as `phalanx doctor` shows it."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.cli.checks import Check
from phalanx.config import Config
from phalanx.errors import PhalanxError, PlacementError


def placement(config: Config) -> Iterator[Check]:
    """Whether there is room for the ranks. With Ray they are placed for a moment, without a model."""
    ranks = config.parallel.world_size
    try:
        yield _on_ray(config) if config.executor.launcher == "ray" else _on_this_host(config)
    except PlacementError as error:
        yield Check("placement", "fail", error.complaint, "free some, or ask for less: see docs/ray.md", error.table)
    except PhalanxError as error:
        yield Check("placement", "fail", f"{ranks} ranks: {error}", "see docs/ray.md")


def _on_this_host(config: Config) -> Check:
    from phalanx.executor.platform import pick_device, pick_threads

    ranks = "1 rank" if config.parallel.world_size == 1 else f"{config.parallel.world_size} ranks"
    device, threads = pick_device(config), pick_threads(config)
    return Check("placement", "ok", f"{ranks} on this host, {device}, CPU threads of each: {threads}")


def _on_ray(config: Config) -> Check:
    from phalanx.executor.platform import require_ray

    require_ray()
    from phalanx.executor.ray.survey import survey

    found = survey(config)
    nodes = len({rank.node_id for rank in found.ranks})
    detail = f"{len(found.ranks)} ranks on {nodes} node{'s' if nodes > 1 else ''}"
    return Check("placement", "ok", detail, None, found.table(), found)
