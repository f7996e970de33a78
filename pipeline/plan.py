"""The plan: shards, their units, and what is still to do. From listings and footers only."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, compress
from typing import Any

from pipeline.batch_file import check_not_others
from pipeline.config import JobConfig
from pipeline.config.data import OnChange
from pipeline.errors import InputError, NoSuchFileError, RefusedError
from pipeline.parts import (
    Overlay,
    Stamp,
    check_same_origin,
    deferred_rows,
    key_of,
    missing_ranges,
    name_of,
    overlays_of,
    part_path,
    parts_among,
    read_stamp,
    retries_of,
)
from pipeline.records import Counts, Unit
from pipeline.shards import FOOTER_THREADS, Shard, find_shards
from pipeline.staging import suffix_of
from pipeline.storage import Folder
from pipeline.task import Task

OWN_FOLDER = "_axbatch"


@dataclass(frozen=True)
class Deferred:
    """What the parts of a shard say of the rows that they leave to the next lane."""

    rows: int = 0
    longest: int = 0
    """Tokens of context that the longest of them needs."""
    units: tuple[Unit, ...] = ()
    """In whose parts they are."""
    done: tuple[Unit, ...] = ()
    """The next lane's parts of them."""

    @property
    def waiting(self) -> int:
        """Rows that the next lane has not done yet."""
        return sum(stop - start for start, stop in missing_ranges(self.rows, self.done))


@dataclass(frozen=True)
class ShardPlan:
    """A shard and its state on storage."""

    shard: Shard
    key: str
    """The name of its units and parts, see `key_of`."""
    published: Stamp | None
    """The stamp of its output file, if it has one."""
    pending: list[tuple[int, int]]
    """Row ranges without a part; with none, and none deferred, it is ready to publish."""
    leftovers: tuple[str, ...] = ()
    """See Plan."""
    deferred: Deferred = Deferred()
    completes: ShardPlan | None = None
    """The shard whose deferred rows it consists of; that one is published with it."""
    overlay: Overlay | None = None
    """Its own place in the shard that it completes."""

    @property
    def pending_rows(self) -> int:
        return sum(stop - start for start, stop in self.pending)

    @property
    def to_do_rows(self) -> int:
        """Without a part, or with one that leaves them to the next lane, which has none."""
        return self.pending_rows + self.deferred.waiting

    @property
    def done_rows(self) -> int:
        return self.shard.rows - self.to_do_rows

    def units(self) -> Iterator[Unit]:
        """Pending units in row order, cut on a grid that follows from the shard alone."""
        return cut_units(self.key, self.pending, self.shard.rows_per_unit)

    @property
    def pending_units(self) -> int:
        size = self.shard.rows_per_unit
        return sum(-(-stop // size) - start // size for start, stop in self.pending)


def cut_units(key: str, ranges: Sequence[tuple[int, int]], rows_per_unit: int) -> Iterator[Unit]:
    """Units of the rows in `ranges`; they end at the multiples of `rows_per_unit`."""
    for start, stop in ranges:
        while start < stop:
            cut = min(stop, (start // rows_per_unit + 1) * rows_per_unit)
            yield Unit(key, start, cut)
            start = cut


@dataclass(frozen=True)
class Plan:
    """All shards, by name; of a retry, those with rows to do again."""

    identity: str
    shards: list[ShardPlan]
    untouched: Counts = field(default_factory=Counts)
    """Of published files that a retry leaves alone."""
    leftovers: Sequence[str] = ()
    """Keys whose parts nobody needs any more: a crash came before they were dropped, or the input
    has changed since."""
    may_defer: bool = False
    """Whether parts may leave rows to a next lane."""

    @property
    def is_retry(self) -> bool:
        return any(s.shard.selected is not None for s in self.shards)

    @property
    def rows(self) -> int:
        return sum(s.shard.rows for s in self.shards)

    @property
    def pending_rows(self) -> int:
        return sum(s.pending_rows for s in self.shards)

    @property
    def pending_units(self) -> int:
        return sum(s.pending_units for s in self.shards)

    @property
    def deferred_rows(self) -> int:
        """Rows that parts leave to the next lane, those too that it has done already."""
        return sum(s.deferred.rows for s in self.shards)

    @property
    def waiting_rows(self) -> int:
        """Deferred rows that the next lane has not done yet."""
        return sum(s.deferred.waiting for s in self.shards)

    @property
    def to_do_rows(self) -> int:
        """In whichever lane."""
        return sum(s.to_do_rows for s in self.shards)

    @property
    def done_rows(self) -> int:
        return self.rows - self.to_do_rows

    @property
    def longest(self) -> int:
        """Tokens of context that the longest deferred row needs, of published shards too: so a
        job that is resumed goes on with the engine it had."""
        stamped = [s.published.counts.longest for s in self.shards if s.published]
        waiting = [s.deferred.longest for s in self.shards]
        return max([self.untouched.longest, *stamped, *waiting])

    @property
    def unpublished(self) -> list[ShardPlan]:
        return [s for s in self.shards if s.published is None]

    @property
    def unpublished_units(self) -> int:
        """Of all rows of these."""
        return sum(-(-s.shard.rows // s.shard.rows_per_unit) for s in self.unpublished)

    @property
    def published_counts(self) -> Counts:
        counts = Counts()
        counts.add(self.untouched)
        for shard in self.shards:
            if shard.published:
                counts.add(shard.published.counts)
        return counts

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "shards": len(self.shards),
            "rows": self.rows,
            "bytes": sum(s.shard.bytes for s in self.shards),
            "units_pending": self.pending_units,
            "rows_pending": self.to_do_rows,
            "rows_deferred": self.waiting_rows,
            "shards_published": len(self.shards) - len(self.unpublished),
        }


def make_plan(job: JobConfig, task: Task, identity: str) -> Plan:
    """List the input, read its footers, and compare with what the output holds.

    Raises:
        InputError: nothing there, not Parquet, a missing column, a taken column name.
        RefusedError: output made by another identity or from an input that has changed since.
    """
    output = Folder(job.output.path)
    shards = find_shards(job, task, output)
    return plan_shards(shards, output, identity, job.input.on_change, job.model.context == "auto")


def plan_shards(
    shards: Sequence[Shard],
    output: Folder,
    identity: str,
    on_change: OnChange = "refuse",
    may_defer: bool = False,
) -> Plan:
    """Compare the shards with what the output holds; with `may_defer`, see what their parts leave
    to the next lane. Raises RefusedError, see `make_plan`."""
    entries = output.list()
    parts = parts_among(entries)
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for key in parts:
        keys[name_of(key)].append(key)
    made = {entry.path for entry in entries if OWN_FOLDER not in entry.path.split("/")}

    def state(shard: Shard) -> ShardPlan:
        key = key_of(shard.name, identity, shard.fingerprint)
        published = _published(shard, output, identity, on_change) if shard.name in made else None
        if published:
            begun = retries_of(published)
            leftovers = tuple(k for k in keys.get(shard.name, ()) if not k.startswith(begun))
            return ShardPlan(shard, key, published, [], leftovers)
        if shard.is_batch:
            check_not_others(output, shard.name, identity, made)
        leftovers = tuple(k for k in keys.get(shard.name, ()) if not k.startswith(key))
        for other in leftovers:
            # One part speaks for all of its key, as their key says where they come from.
            path = part_path(parts[other][0])
            url = f"{output.url}/{path}"
            with suppress(NoSuchFileError):  # published, and dropped, while we looked
                _check_origin(read_stamp(output, path), shard, identity, url, on_change)
        return ShardPlan(
            shard, key, None, missing_ranges(shard.rows, parts.get(key, [])), leftovers
        )

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        states = list(pool.map(state, shards))
        if on_change == "refuse":
            others = sorted({*made, *keys} - {shard.name for shard in shards})
            was_made = pool.map(lambda name: name in keys or _is_of(identity, name, output), others)
            _refuse_vanished(compress(others, was_made), output)
    if may_defer:
        states = with_deferred(states, output, parts)
    leftovers = [key for each in states for key in each.leftovers]
    return Plan(identity, states, leftovers=leftovers, may_defer=may_defer)


def with_deferred(
    plans: Sequence[ShardPlan], output: Folder, parts: Mapping[str, list[Unit]]
) -> list[ShardPlan]:
    """What the parts of each shard that is not published leave to the next lane, from their
    footers. A name can't say it: two writers of one unit may disagree on a row that killed an
    engine, and have to collide."""
    units = [unit for p in plans if not p.published for unit in _merged(parts.get(p.key, []))]

    def counts_of(unit: Unit) -> Counts:
        with suppress(NoSuchFileError):  # published, and dropped, while we looked
            stamp = read_stamp(output, part_path(unit))
            return stamp.counts if stamp else Counts()
        return Counts()

    found: defaultdict[str, list[tuple[Unit, Counts]]] = defaultdict(list)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for unit, counts in zip(units, pool.map(counts_of, units), strict=True):
            if counts.deferred:
                found[unit.shard].append((unit, counts))
    later: defaultdict[str, list[list[Unit]]] = defaultdict(list)
    for key, done in parts.items():
        later[name_of(key)].append(done)

    def completed(planned: ShardPlan) -> ShardPlan:
        of_it = found.get(planned.key)
        if not of_it:
            return planned
        overlays = overlays_of(planned.key)
        made = [d for d in later[planned.shard.name] if d[0].shard.startswith(overlays)]
        deferred = Deferred(
            sum(counts.deferred for _, counts in of_it),
            max(planned.deferred.longest, *(counts.longest for _, counts in of_it)),
            tuple(unit for unit, _ in of_it),
            tuple(max(made, key=lambda done: sum(unit.rows for unit in done), default=())),
        )
        return replace(planned, deferred=deferred)

    return list(map(completed, plans))


def find_deferred(
    plans: Sequence[ShardPlan], output: Folder, parts: Mapping[str, list[Unit]]
) -> dict[str, array[int]]:
    """By the key of each shard, the rows that its parts leave to the next lane. Reads the parts
    that are known to hold some. Where parts overlap, a row counts as merging takes it."""
    units, starts = [], []
    for planned in plans:
        known = sorted(planned.deferred.units)
        begins = [unit.start for unit in known]
        ends = list(accumulate((unit.stop for unit in known), max))
        for unit, start in _merged(parts.get(planned.key, [])).items():
            before = bisect_left(begins, unit.stop)  # as many begin before its end
            if before and ends[before - 1] > unit.start:
                units.append(unit)
                starts.append(start)
    rows = {planned.key: array("q") for planned in plans}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        read = pool.map(lambda unit: list(deferred_rows(output, part_path(unit))), units)
        for unit, start, found in zip(units, starts, read, strict=True):
            rows[unit.shard].extend(unit.start + r for r in found if unit.start + r >= start)
    return rows


def _merged(parts: Iterable[Unit]) -> dict[Unit, int]:
    """Those of a shard's parts that merging takes rows of, with the first row that it takes."""
    taken, position = {}, 0
    for unit in parts:
        if unit.stop > position:
            taken[unit] = max(unit.start, position)
            position = unit.stop
    return taken


def _published(shard: Shard, output: Folder, identity: str, on_change: OnChange) -> Stamp | None:
    """The stamp of the shard's output file; None if that was made from an input that has changed
    since, and is to be made again."""
    url = f"{output.url}/{shard.name}"
    try:
        stamp = read_stamp(output, shard.name)
    except InputError:
        stamp = None
    if stamp is None:
        raise RefusedError(
            f"{url}: is there already and is not axbatch's output",
            "Choose an empty `output.path`, or move the file away to have it made again.",
        )
    return stamp if _check_origin(stamp, shard, identity, url, on_change) else None


def _check_origin(
    stamp: Stamp | None, shard: Shard, identity: str, url: str, on_change: OnChange
) -> bool:
    """Whether `stamp` belongs to this job and this version of the shard's input. Raises
    RefusedError if it doesn't and that is not to be mended by doing the shard again."""
    if stamp is None:
        return False
    changed = stamp.fingerprint != shard.fingerprint
    fingerprint = stamp.fingerprint if on_change == "reprocess" else shard.fingerprint
    check_same_origin(stamp, identity, fingerprint, url)
    return not changed


def _refuse_vanished(names: Iterable[str], output: Folder) -> None:
    """Raises RefusedError for the first of these outputs, whose input files are gone."""
    for name in names:
        raise RefusedError(
            f"{output.url}/{name}: its input file is not among the input any more",
            "Put it back, or keep what was made of it with `input.on_change: reprocess`.",
        )


def _is_of(identity: str, name: str, output: Folder) -> bool:
    """Whether this job published the file. Others' files may lie in the output folder."""
    if suffix_of(name) not in (".parquet", ".pq"):
        return False
    try:
        stamp = read_stamp(output, name)
    except InputError:
        return False
    return stamp is not None and (stamp.shard, stamp.identity) == (name, identity)
