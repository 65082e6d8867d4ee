"""Rounds of blows as tables: what was done, what held, and how long clients waited. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from phalanx.testing.checker import Round

_ROW = "{:>5} {:<13} {:>4} {:<12} {:<22} {:>9} {:>8} {:>9} {:>6}  {}"
_LINE = "{:<26} {:>6} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}"


def heading() -> str:
    """Of `row`."""
    return _ROW.format("round", "blow", "rank", "when", "healed by", "pause ms", "gap ms", "again ms", "s", "result")


def row(found: Round) -> str:
    """A line for one round: its result is `right`, or all that is not."""
    blow = found.blow
    when = f"after {blow.after:.0%}" if blow.state == "any" else f"{blow.state} {blow.step}"
    result = "; ".join(found.violations) or ("right" if found.has_happened else "it never happened")
    return _ROW.format(
        found.index,
        blow.kind,
        "" if blow.kind in ("kill-lines", "kill-engine") else blow.rank,
        "idle" if blow.state == "idle" else when,
        ", ".join(found.rungs),
        f"{found.pause_s * 1e3:.0f}" if found.pause_s else "",
        f"{found.gap_s * 1e3:.0f}",
        f"{found.again_s * 1e3:.0f}" if found.again_s else "",
        f"{found.took_s:.1f}",
        result,
    )


def table(rounds: Iterable[Round], key: Callable[[Round], str], title: str) -> str:
    """A line for each value of `key`: blows that came to be, streams, pauses and gaps in milliseconds, violations."""
    by_key: dict[str, list[Round]] = {}
    for one in rounds:
        by_key.setdefault(key(one), []).append(one)
    titles = (title, "blows", "streams", "pause 50%", "pause 99%", "longest", "gap 50%", "longest", "violations")
    return "\n".join([_LINE.format(*titles), *(_line(name, by_key[name]) for name in sorted(by_key))])


def kills_table(
    rounds: Iterable[tuple[Round, bool]], key: Callable[[Round], Sequence[str]], titles: Sequence[str]
) -> str:
    """Markdown, a line for each value of `key`: kills, the longest gap between two tokens of any stream of a round in
    milliseconds, without a standby line and with one (the flag beside each round), and what did not hold.
    """
    by_key: dict[tuple[str, ...], list[tuple[Round, bool]]] = {}
    for one, has_standby in rounds:
        if one.has_happened:
            by_key.setdefault(tuple(key(one)), []).append((one, has_standby))
    heads = (*titles, "kills", "gap 50%", "99%", "with standby 50%", "99%", "streams", "wrong", "lost", "left", "other")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(_kills_line(name, by_key[name]) for name in sorted(by_key))])


def _kills_line(name: Sequence[str], found: Sequence[tuple[Round, bool]]) -> str:
    rounds = [one for one, _ in found]
    gaps = {
        has: [one.gap_s for one, it_has in found if it_has == has and one.blow.state != "idle"] for has in (False, True)
    }
    faults = [
        sum(counts) for counts in zip(*((one.num_wrong, one.num_lost, one.num_left) for one in rounds), strict=True)
    ]
    other = sum(len(one.violations) for one in rounds) - sum(faults)
    cells = (
        *name,
        len(rounds),
        *(_ms(quantile(gaps[has], share)) for has in (False, True) for share in (0.5, 0.99)),
        sum(one.num_streams for one in rounds),
        *faults,
        max(other, 0),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def rungs(rounds: Iterable[Round]) -> str:
    """How often each brought ranks that compute."""
    counts = Counter(rung for one in rounds for rung in one.rungs)
    return ", ".join(f"{rung} {count}" for rung, count in sorted(counts.items())) or "none"


def _line(name: str, rounds: Sequence[Round]) -> str:
    happened = [one for one in rounds if one.has_happened]
    pauses = [one.pause_s for one in happened if one.pause_s]
    gaps = [one.gap_s for one in happened if one.blow.state != "idle"]
    return _LINE.format(
        name,
        len(happened),
        sum(one.num_streams for one in rounds),
        *(_ms(quantile(pauses, share)) for share in (0.5, 0.99, 1.0)),
        *(_ms(quantile(gaps, share)) for share in (0.5, 1.0)),
        sum(len(one.violations) for one in rounds),
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Of few values: the next higher one. None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return statistics.median(ordered) if share == 0.5 else ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.0f}"
