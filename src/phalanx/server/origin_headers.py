"""Headers that say which weights and which ranks have made an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from phalanx.engine.stream import Origin

WEIGHTS_VERSION = "X-Phalanx-Weights-Version"
EPOCH = "X-Phalanx-Epoch"


def headers_of(origins: Iterable[Origin]) -> Mapping[str, str]:
    """One number each, or several with commas if it was not the same all the time; none if nothing was made."""
    found = list(origins)
    if not found:
        return {}
    return {
        WEIGHTS_VERSION: _listed(origin.weights_version for origin in found),
        EPOCH: _listed(origin.epoch for origin in found),
    }


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
