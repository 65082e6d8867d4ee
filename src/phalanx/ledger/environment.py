"""The environment in which the Python processes of a program record what they do, by themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from phalanx.ledger.registry import VARIABLE

_SITE = Path(__file__).parent / "site"


def recorded(environment: Mapping[str, str], roster_place: str) -> dict[str, str]:
    """The environment for a program whose processes are to stand on the registry at `roster_place`."""
    paths = [str(_SITE), environment.get("PYTHONPATH", "")]
    return {**environment, VARIABLE: roster_place, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
