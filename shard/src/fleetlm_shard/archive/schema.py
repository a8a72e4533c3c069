"""Tables of the archive and how they came to be (docs/archive.md, "Tables").

Promise: migrations go forward only, one process at a time, each in one transaction with the number that it leaves; a
database of another ring, or of a newer version, is refused and left as it is. Ids and messages are `bytea`: whatever
was acknowledged can be stored, byte for byte. Must not be done here: rows (`store.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetlm_shard.archive.errors import ArchiveRefused

if TYPE_CHECKING:
    from asyncpg import Connection, Record

MIGRATION_LOCK: Final = 0x466C65657441
"""Advisory lock of everybody who migrates or makes partitions (`FleetA`)."""
WEEK_US: Final = 7 * 24 * 3600 * 1_000_000
"""Width of a partition: deletion by age is a drop, and a replay of a year looks into 52 of them."""

MIGRATIONS: Final = (
    """
    CREATE TABLE fleetlm.sessions (
        session bytea PRIMARY KEY,
        slot integer NOT NULL,
        inserted_at_us bigint NOT NULL,
        first_seq bigint NOT NULL DEFAULT 0,
        last_seq bigint NOT NULL DEFAULT 0,
        metadata bytea NOT NULL DEFAULT '{}'
    );
    CREATE TABLE fleetlm.messages (
        session bytea NOT NULL,
        seq bigint NOT NULL,
        inserted_at_us bigint NOT NULL,
        sender bytea NOT NULL,
        key bytea NOT NULL,
        content_hash bytea NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (session, seq, inserted_at_us)
    ) PARTITION BY RANGE (inserted_at_us);
    CREATE TABLE fleetlm.participants (
        participant bytea NOT NULL,
        session bytea NOT NULL,
        sent_seq bigint NOT NULL DEFAULT 0,
        read_seq bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (participant, session)
    );
    CREATE TABLE fleetlm.positions (
        volume_id text PRIMARY KEY,
        shard text NOT NULL,
        term bigint NOT NULL,
        pos bigint NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE fleetlm.halted (
        volume_id text NOT NULL,
        slot integer NOT NULL,
        from_pos bigint NOT NULL,
        session bytea NOT NULL,
        seq bigint NOT NULL,
        halted_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (volume_id, slot)
    );
    CREATE TABLE fleetlm.quarantine (
        volume_id text NOT NULL,
        pos bigint NOT NULL,
        session bytea NOT NULL,
        seq bigint NOT NULL,
        reason text NOT NULL,
        record bytea NOT NULL,
        body bytea,
        quarantined_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (volume_id, pos)
    );
    CREATE INDEX ON fleetlm.quarantine (session, seq);
    """,
    """
    ALTER TABLE fleetlm.sessions ADD COLUMN active_at_us bigint NOT NULL DEFAULT 0;
    UPDATE fleetlm.sessions AS s SET active_at_us = greatest(s.inserted_at_us, coalesce((
        SELECT m.inserted_at_us FROM fleetlm.messages m WHERE m.session = s.session AND m.seq = s.last_seq), 0));
    CREATE INDEX ON fleetlm.participants (session, participant);
    CREATE TABLE fleetlm.changes (
        xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        sessions bytea[] NOT NULL
    );
    CREATE INDEX ON fleetlm.changes (xid);
    CREATE INDEX ON fleetlm.changes (at);
    """,
)
"""Each brings the database one version further; never changed once it was released."""
VERSION: Final = len(MIGRATIONS)


async def migrate(connection: Connection[Record], *, ring_uid: str) -> None:
    """Bring the database to `VERSION`; waits for others who do.

    Raises:
        ArchiveRefused: it belongs to another ring or a newer version of FleetLM.
        asyncpg.PostgresError: the database refuses, for example for want of a right.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        # A role that may not make schemas can use one that an administrator made.
        if await connection.fetchval("SELECT to_regclass('fleetlm.archive')") is None:
            if await connection.fetchval("SELECT to_regnamespace('fleetlm')") is None:
                await connection.execute("CREATE SCHEMA fleetlm")
            await connection.execute(
                "CREATE TABLE fleetlm.archive (sole boolean PRIMARY KEY DEFAULT true CHECK (sole),"
                " ring_uid text NOT NULL, version integer NOT NULL, pruned_before_us bigint NOT NULL DEFAULT 0)"
            )
            await connection.execute("INSERT INTO fleetlm.archive (ring_uid, version) VALUES ($1, 0)", ring_uid)
        row = await connection.fetchrow("SELECT ring_uid, version FROM fleetlm.archive")
        assert row is not None, "the table has one row"
        if row["ring_uid"] != ring_uid:
            raise ArchiveRefused(
                "ForeignArchive", f"the database holds the archive of ring {row['ring_uid']}, this is {ring_uid}"
            )
        version = row["version"]
        if version > VERSION:
            raise ArchiveRefused(
                "NewerArchive", f"the archive has version {version}, this FleetLM knows up to {VERSION}: upgrade it"
            )
        for script in MIGRATIONS[version:]:
            await connection.execute(script)
        if version < VERSION:
            await connection.execute("UPDATE fleetlm.archive SET version = $1", VERSION)


async def make_partitions(connection: Connection[Record], weeks: set[int]) -> None:
    """Make the partitions of these weeks since 1970 that are not there; a transaction of its own."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        for week in sorted(weeks):
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS fleetlm.{partition_name(week)} PARTITION OF fleetlm.messages"
                f" FOR VALUES FROM ({week * WEEK_US}) TO ({(week + 1) * WEEK_US})"
            )


def partition_name(week: int) -> str:
    """The table that holds the messages of a week since 1970."""
    return f"messages_{week}"
