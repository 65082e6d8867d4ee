"""What the watcher of one node tells the judge of all: what it sees of its ranks, and only what is new. Pure.

    node → judge    Sighting, Stacks, Replaced
    judge → node    TellAll, AskStacks

Times are of the clock of the host that they come from. Two hosts' clocks may differ by days, so a `NodeView` puts all
of them upon the judge's before anybody compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.journal_reader import Entries
from phalanx.ledger.look import RankLook
from phalanx.ledger.record import Kind, Record

OFFSET_WINDOW_NS = 60 * 10**9
"""Two clocks drift apart by some milliseconds a minute at the very most; a minute has a message without delay in it."""


_NS = 1e9


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Field order is the wire format."""


class Sighting(_Message, frozen=True):
    """What has become of a node's ranks since the last one. Without ranks it is a sign of life."""

    now_ns: int
    is_whole: bool
    """Whether with this the judge has all that the journals have, and not their newest records alone."""
    ranks: tuple[RankLook, ...]
    """Those with anything new; of their records and texts only what is new."""


class Stacks(_Message, frozen=True):
    """Where ranks are, as far as they answer."""

    of: dict[int, tuple[str, ...]]


class Replaced(_Message, frozen=True):
    """Watchers of this node have ended before this one. Told once over each link."""

    num_restarts: int


class TellAll(_Message, frozen=True):
    """Something is suspicious: for a while tell whole journals."""


class AskStacks(_Message, frozen=True):
    """Say where these ranks are."""

    ranks: tuple[int, ...]


FromNode = Sighting | Stacks | Replaced
FromJudge = TellAll | AskStacks


class Telling:
    """What a node has told, and so what is new. For messages that arrive, all of them, in their order."""

    def __init__(self) -> None:
        self._told: dict[int, RankLook] = {}
        self._records: dict[int, dict[int, Record]] = {}
        self._texts: dict[int, set[int]] = {}

    def sighting(
        self,
        now_ns: int,
        ranks: Mapping[int, RankLook],
        *,
        is_whole: bool,
        also: Mapping[int, Sequence[Record]] | None = None,
    ) -> Sighting:
        """Counts as told from now on. `is_whole`: `ranks` have all records that there are. `also`: more of each."""
        news = [self._news(one, () if also is None else also.get(one.rank, ())) for one in ranks.values()]
        return Sighting(now_ns, is_whole, tuple(one for one in news if one is not None))

    def _news(self, one: RankLook, also: Sequence[Record]) -> RankLook | None:
        records = self._records.setdefault(one.rank, {})
        texts = self._texts.setdefault(one.rank, set())
        new = tuple(record for record in (*also, *one.entries.records) if records.get(record.number) != record)
        new_texts = {digest: text for digest, text in one.entries.texts.items() if digest not in texts}
        is_still = float(one.still_s > 0)  # for how long, the judge counts on by itself
        bare = _with(msgspec.structs.replace(one, still_s=is_still), (), {})
        if not new and not new_texts and self._told.get(one.rank) == bare:
            return None
        self._told[one.rank] = bare
        texts.update(new_texts)
        _take(records, new)
        return _with(one, new, new_texts)


class NodeView:
    """What the judge knows of one node: all that was told, upon its own clock."""

    def __init__(self) -> None:
        self._ranks: dict[int, RankLook] = {}
        self._told_ns: dict[int, int] = {}
        self._records: dict[int, dict[int, Record]] = {}
        self._texts: dict[int, dict[int, str]] = {}
        self._moved: dict[int, tuple[int, int, RankLook]] = {}
        """Looks that were asked for before, with the offset and number of records that they are good for."""
        self._now_ns = 0
        self._offset = _ClockOffset()
        self.is_whole = False
        """Whether `looks` can give all that the journals have."""

    def take(self, sighting: Sighting, received_ns: int) -> None:
        """`received_ns`: by the judge's clock."""
        self._offset.take(received_ns - sighting.now_ns, received_ns)
        self._now_ns = sighting.now_ns
        self.is_whole = sighting.is_whole
        for one in sighting.ranks:
            self._ranks[one.rank] = one
            self._told_ns[one.rank] = sighting.now_ns
            self._moved.pop(one.rank, None)
            _take(self._records.setdefault(one.rank, {}), one.entries.records)
            self._texts.setdefault(one.rank, {}).update(one.entries.texts)

    @property
    def seen_ns(self) -> int:
        """When, by the judge's clock, it was as `looks` says it. Not before the first sighting."""
        return self._now_ns + self._offset.value_ns

    def looks(self, most_records: int) -> dict[int, RankLook]:
        """The node's ranks, with the newest records of each."""
        found = {}
        for rank, one in self._ranks.items():
            still_s = one.still_s + (self._now_ns - self._told_ns[rank]) / _NS if one.still_s else 0.0
            found[rank] = msgspec.structs.replace(self._look(one, most_records), still_s=still_s)
        return found

    def steps(self) -> dict[int, tuple[Record, ...]]:
        """The records of steps alone. How long one took is the same upon any clock."""
        return {
            rank: tuple(record for record in records.values() if record.kind == Kind.STEP)
            for rank, records in self._records.items()
        }

    def newest_steps(self) -> list[int]:
        """The step that each rank is in, or was in last."""
        return [one.entries.step for one in self._ranks.values()]

    def _look(self, one: RankLook, most_records: int) -> RankLook:
        offset_ns = self._offset.value_ns
        before = self._moved.get(one.rank)
        if before is not None and before[:2] == (offset_ns, most_records):
            return before[2]
        newest = _newest(list(self._records[one.rank].values()), one.entries, most_records)
        records = tuple(_moved_record(record, offset_ns) for record in newest)
        entries = _moved(one.entries, offset_ns)
        look = _with(msgspec.structs.replace(one, entries=entries), records, self._texts[one.rank])
        self._moved[one.rank] = offset_ns, most_records, look
        return look


class _ClockOffset:
    """What to add to another host's clock: the least that any message of the last minute or two gave.

    A message's offset is the clocks' difference and the time that it was on its way; so what is taken is the least
    delayed one. Times seem later by that delay, and waits are never taken for longer than they are.
    """

    def __init__(self) -> None:
        self._least: int | None = None
        self._least_before: int | None = None
        self._since_ns = 0

    def take(self, offset_ns: int, now_ns: int) -> None:
        if self._least is None or now_ns - self._since_ns > OFFSET_WINDOW_NS:
            self._least_before, self._least, self._since_ns = self._least, offset_ns, now_ns
        self._least = min(self._least, offset_ns)

    @property
    def value_ns(self) -> int:
        return min(offset for offset in (self._least, self._least_before) if offset is not None)


def _newest(records: list[Record], entries: Entries, most: int) -> list[Record]:
    """So many, and all that a device is not through with, as when a journal is read."""
    if entries.device is not None and entries.device.finished < entries.device.launched:
        most = max(most, sum(record.number >= entries.device.finished for record in records))
    return records[-most:]


def with_their_texts(one: RankLook) -> RankLook:
    """With no other texts than those of its records."""
    texts, records = one.entries.texts, one.entries.records
    return _with(one, records, {each.digest: texts[each.digest] for each in records if each.digest in texts})


def _with(one: RankLook, records: tuple[Record, ...], texts: dict[int, str]) -> RankLook:
    entries = msgspec.structs.replace(one.entries, records=records, texts=texts)
    return msgspec.structs.replace(one, entries=entries)


def _take(records: dict[int, Record], new: Iterable[Record]) -> None:
    """Add to records by number, in their order, of which a journal has NUM_RECORDS."""
    is_in_order = True
    for record in new:
        is_in_order = is_in_order and (
            record.number in records or not records or record.number > next(reversed(records))
        )
        records[record.number] = record
    if not is_in_order:
        in_order = sorted(records.items())
        records.clear()
        records.update(in_order)
    if records:
        newest = next(reversed(records))
        while (oldest := next(iter(records))) <= newest - NUM_RECORDS:
            del records[oldest]


def _moved(entries: Entries, offset_ns: int) -> Entries:
    """With its times, the fields whose names end so, upon another clock."""
    times = {
        name: at + offset_ns
        for name in entries.__struct_fields__
        if name.endswith("_ns") and (at := getattr(entries, name))
    }
    return msgspec.structs.replace(entries, **times)


def _moved_record(record: Record, offset_ns: int) -> Record:
    done_ns = record.done_ns + offset_ns if record.done_ns else 0
    return record._replace(issued_ns=record.issued_ns + offset_ns, done_ns=done_ns)
