"""Whether the archive holds what a volume's log holds, for `fleetlm archive verify`.

Promise: reads a volume only, also one that a process runs on (what is archived is durable); memory is bounded by a
piece of the log. Must not be done here: talking to people.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fleetlm_shard.archive.feed import Places, Segment, read_piece
from fleetlm_shard.archive.store import connect
from fleetlm_shard.chain import read_chain
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.identity import read_identity
from fleetlm_shard.records import Message
from fleetlm_shard.segments import LOG_FOLDER, parse_names
from fleetlm_shard.verify import LogReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncpg import Connection, Record

DIFFERENCES_MAX: Final = 1000
"""Named one by one."""


@dataclass(slots=True)
class Comparison:
    """What was compared: `checked` messages of the log up to `pos`; those that the archive lacks, or has otherwise.

    `quarantined` and messages of halted slots are known to be missing from the table; they are counted, not named.
    `pruned`: older than the archive's oldest week.
    """

    folder: str
    shard: str = ""
    pos: int = 0
    checked: int = 0
    quarantined: int = 0
    halted: int = 0
    pruned: int = 0
    missing: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    different: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    problem: str = ""

    @property
    def ok(self) -> bool:
        """The archive has everything that it should have."""
        return not (self.missing or self.different or self.problem)


async def compare(folder: Path, dsn: str, *, progress: Callable[[int, int], None]) -> Comparison:
    """Compare a volume's log with the archive, up to the position that the archive has reached.

    Args:
        folder: the shard's data folder.
        dsn: of the database.
        progress: called with the position reached and the last one.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError: folder or database cannot be read.
        LogUnreadable: the log cannot be put together.
    """
    found, disk = Comparison(str(folder)), OsDisk(folder)
    identity = read_identity(disk)
    if identity is None:
        found.problem = "it has no identity: this folder is not a shard's volume"
        return found
    found.shard = identity.shard
    connection = await connect(dsn, name="fleetlm archive verify")
    try:
        pos = await connection.fetchval("SELECT pos FROM fleetlm.positions WHERE volume_id = $1", identity.volume_id)
        if pos is None:
            found.problem = "the archive has never heard of this volume"
            return found
        found.pos = pos
        rows = await connection.fetch(
            "SELECT slot, from_pos FROM fleetlm.halted WHERE volume_id = $1", identity.volume_id
        )
        halted = {row["slot"]: row["from_pos"] for row in rows}
        oldest_us = await _oldest_us(connection)
        chain = read_chain(disk, LogReader(identity.ring_uid, identity.shard), parse_names(disk.listdir(LOG_FOLDER)))
        places = Places([Segment(link.header, link.end_pos) for link in chain.links], pos)
        at = places.segments[0].header.base_pos if places.segments else pos
        while at < pos:
            piece = read_piece(disk, places, at)
            messages: dict[tuple[bytes, int], Message] = {}
            for own, record in piece.records:
                if not isinstance(record, Message) or own >= pos:
                    continue
                if own >= halted.get(record.slot, pos):
                    found.halted += 1
                elif record.inserted_at_us < oldest_us:
                    found.pruned += 1
                else:
                    messages[record.session.encode(), record.seq] = record
            await _check(connection, messages, found)
            at = piece.end_pos
            progress(min(at, pos), pos)
    finally:
        await connection.close()
    return found


async def _check(connection: Connection[Record], messages: dict[tuple[bytes, int], Message], found: Comparison) -> None:
    rows = await connection.fetch(
        "SELECT m.session, m.seq, m.body FROM fleetlm.messages m"
        " JOIN unnest($1::bytea[], $2::bigint[]) AS asked(session, seq) USING (session, seq)",
        [session for session, _ in messages],
        [seq for _, seq in messages],
    )
    bodies = {(row["session"], row["seq"]): row["body"] for row in rows}
    for place, message in messages.items():
        found.checked += 1
        body = bodies.get(place)
        if body == message.json:
            continue
        named = (message.session, message.seq)
        if body is not None:
            if len(found.different) < DIFFERENCES_MAX:
                found.different.append(named)
        elif await connection.fetchval(
            "SELECT true FROM fleetlm.quarantine WHERE session = $1 AND seq = $2", place[0], place[1]
        ):
            found.quarantined += 1
        elif len(found.missing) < DIFFERENCES_MAX:
            found.missing.append(named)


async def _oldest_us(connection: Connection[Record]) -> int:
    """Where the oldest week begins, if a prune has taken what was before it; else 0."""
    pruned = await connection.fetchval("SELECT pruned_before_us FROM fleetlm.archive")
    return int(pruned or 0)
