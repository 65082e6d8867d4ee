"""Which rank a process is to be, before it is one: as its arguments of `init_process_group` and its environment say.

Pure; no torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

_FROM_ENVIRONMENT = "env://"


class RankPlace(NamedTuple):
    """A rank among so many."""

    rank: int
    size: int


def told_to_init(arguments: Mapping[str, object], environment: Mapping[str, str]) -> RankPlace | None:
    """What `init_process_group` will take from its arguments, by name, its URL and its environment, in this order.

    None if they do not say, as with MPI, or if the rank has no others.
    """
    url = str(arguments.get("init_method") or _FROM_ENVIRONMENT)
    in_url = dict(parse_qsl(urlsplit(url).query))
    fallback = environment if url.startswith(_FROM_ENVIRONMENT) and arguments.get("store") is None else {}
    rank, size = (
        _number(arguments.get(name)) or _number(in_url.get(name)) or _number(fallback.get(name.upper()))
        for name in ("rank", "world_size")
    )
    return _place(rank, size)


def told_by_launcher(environment: Mapping[str, str]) -> RankPlace | None:
    """What torchrun, and what does as it does, says before the program begins; None if nobody has said anything."""
    return _place(_number(environment.get("RANK")), _number(environment.get("WORLD_SIZE")))


def ranks_here(place: RankPlace, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The ranks of this host, if the launcher says it: torchrun's have one number after the other."""
    local_rank, size = _number(environment.get("LOCAL_RANK")), _number(environment.get("LOCAL_WORLD_SIZE"))
    if local_rank is None or size is None or environment.get("RANK") != str(place.rank):
        return ()
    first = place.rank - int(local_rank)
    return tuple(range(max(first, 0), min(first + int(size), place.size)))


def _place(rank: str | None, size: str | None) -> RankPlace | None:
    if rank is None or size is None or not 0 <= int(rank) < int(size) or int(size) == 1:
        return None
    return RankPlace(int(rank), int(size))


def _number(told: object) -> str | None:
    """As digits; None for what is none, such as the -1 that stands for nothing."""
    text = str(told)
    return text if text.isdecimal() else None
