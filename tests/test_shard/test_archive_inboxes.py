"""Inboxes from the archive on a real PostgreSQL: order, counts, and that no change goes untold."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import pytest_asyncio

from fleetlm_cli.postgres import Postgres
from fleetlm_common.errors import Invalid, NotFound, TryAgain
from fleetlm_common.limits import UNREAD_MAX
from fleetlm_common.rpc import Changed, Changes, ChangesPlace, Entries, Inbox, InboxEntry, InboxPlace, Participated
from fleetlm_shard.archive import inboxes as module
from fleetlm_shard.archive.asking import Asker
from fleetlm_shard.archive.inboxes import CHANGED_MAX, LOST_AFTER_S, Inboxes
from fleetlm_shard.archive.rows import rows_of
from fleetlm_shard.archive.store import CHANGES_KEPT_S
from fleetlm_shard.records import CursorMoved, Record, SessionCreated
from tests.support.logkit import AT_US, message
from tests.support.postgres import empty_database, running
from tests.test_shard.test_archive_store import a_store, fetch, of

NOW = ChangesPlace(0, 0)
SECOND_US = 1_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    """One server for this module."""
    async with running(tmp_path_factory.mktemp("archive")) as postgres:
        yield postgres


pytestmark = pytest.mark.asyncio(loop_scope="module")


class Archive:
    """A database, a writer of it, and who asks it."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.inboxes = Inboxes()
        self.inboxes.asker = Asker(dsn, name="test", what="sessions are")
        self.pos = 0

    async def write(self, *records: Record) -> None:
        """One transaction."""
        async with a_store(self.dsn) as (store, _):
            await store.write(rows_of(of(*records), without=()), from_pos=self.pos, to_pos=self.pos + 1)
        self.pos += 1

    async def inbox(self, participant: str, *, limit: int = 100) -> list[InboxEntry]:
        """The first page."""
        return (await self.inboxes.inbox(Inbox(participant, None, limit))).entries

    async def changes(self, since: ChangesPlace, *participants: str) -> Changed:
        """What changed."""
        return await self.inboxes.changes(Changes(list(participants), since))


@asynccontextmanager
async def an_archive(server: Postgres) -> AsyncGenerator[Archive]:
    """An empty one."""
    archive = Archive(await empty_database(server))
    await archive.write()
    try:
        yield archive
    finally:
        assert archive.inboxes.asker is not None
        archive.inboxes.asker.close()


def shown(entries: list[InboxEntry]) -> list[tuple[str, int, int]]:
    """Session, unread, last read seq."""
    return [(each.session, each.unread, each.last_read_seq) for each in entries]


async def test_an_inbox_counts_what_others_wrote_after_the_read_cursor(server: Postgres) -> None:
    """Newest activity first; own messages do not count, nor what is read; a cursor never goes back."""
    async with an_archive(server) as archive:
        later = AT_US + SECOND_US
        await archive.write(
            SessionCreated(1, "old", AT_US - 5, b'{"topic":"x"}'),
            message("old", 1, sender="bob"),
            message("old", 2, sender="ann"),
            message("old", 3, sender="bob"),
            message("new", 1, sender="ann", at_us=later),
            message("others", 1, sender="bob", at_us=later),
        )
        assert await archive.inbox("ann") == [
            InboxEntry("new", 1, later, later, b"{}", 0, 0, unread_more=False),
            InboxEntry("old", 3, AT_US - 5, AT_US, b'{"topic":"x"}', 0, 2, unread_more=False),
        ]
        await archive.write(CursorMoved(1, "old", "ann", 2))
        assert shown(await archive.inbox("ann")) == [("new", 0, 0), ("old", 1, 2)]
        await archive.write(CursorMoved(1, "old", "ann", 1), message("old", 4, sender="bob", at_us=later + 1))
        assert shown(await archive.inbox("ann")) == [("old", 2, 2), ("new", 0, 0)]
        await archive.write(CursorMoved(1, "old", "ann", 4))
        assert shown(await archive.inbox("ann")) == [("old", 0, 4), ("new", 0, 0)]
        assert await archive.inbox("nobody") == []


async def test_counting_ends(server: Postgres) -> None:
    """A reader who never marks anything read costs a bounded look, and is told that there is more."""
    async with an_archive(server) as archive:
        first = [message("s", seq, sender="bob") for seq in range(1, UNREAD_MAX + 1)]
        await archive.write(*first, CursorMoved(1, "s", "ann", 0))
        [entry] = await archive.inbox("ann")
        assert (entry.unread, entry.unread_more) == (UNREAD_MAX, False)
        await archive.write(message("s", UNREAD_MAX + 1, sender="bob"))
        [entry] = await archive.inbox("ann")
        assert (entry.unread, entry.unread_more) == (UNREAD_MAX, True)


async def test_pages_follow_each_other(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of one moment are told apart by their ids; a page ends by its bytes, too; limits are said."""
    async with an_archive(server) as archive:
        names = [f"s-{number:02d}" for number in range(25)]
        await archive.write(*(message(name, 1, sender="ann") for name in names))

        async def all_of(limit: int) -> list[list[str]]:
            pages: list[list[str]] = []
            after: InboxPlace | None = None
            more = True
            while more:
                page = await archive.inboxes.inbox(Inbox("ann", after, limit))
                last, more = page.entries[-1], page.more
                pages.append([entry.session for entry in page.entries])
                after = InboxPlace(last.active_at_us, last.session)
            return pages

        pages = await all_of(10)
        assert [len(page) for page in pages] == [10, 10, 5]
        assert [name for page in pages for name in page] == names[::-1]
        monkeypatch.setattr(module, "PAGE_BYTES_MAX", 3)
        pages = await all_of(10)
        assert {len(page) for page in pages[:-1]} == {2}, "{} has two bytes"
        assert [name for page in pages for name in page] == names[::-1]
        listed = await archive.inboxes.participated(Participated("ann", "s-03", 4))
        assert listed.sessions == ["s-04", "s-05", "s-06", "s-07"]
        for limit in (0, 101):
            with pytest.raises(Invalid) as refused:
                await archive.inboxes.inbox(Inbox("ann", None, limit))
            assert refused.value.field == "limit"


async def test_changes_are_those_of_the_participants_asked_for(server: Postgres) -> None:
    """Messages, read cursors and metadata count; nothing is told again when nothing happens."""
    async with an_archive(server) as archive:
        await archive.write(message("s", 1, sender="ann"), message("t", 1, sender="bob"))
        place = (await archive.changes(NOW)).now
        assert (await archive.changes(place, "ann", "bob")).pairs == []
        await archive.write(message("s", 2, sender="bob"))
        changed = await archive.changes(place, "ann", "bob", "cid")
        assert sorted(changed.pairs) == [("ann", "s", 2, 0), ("bob", "s", 2, 0)]
        assert (await archive.changes(changed.now, "ann", "bob")).pairs == []
        await archive.write(CursorMoved(1, "s", "cid", 2))
        again = await archive.changes(changed.now, "cid")
        assert again.pairs == [("cid", "s", 2, 2)]
        found = await archive.inboxes.entries(Entries([("cid", "s"), ("ann", "s"), ("ann", "nothing")]))
        assert sorted((name, entry.unread, entry.last_read_seq) for name, entry in found.entries) == [
            ("ann", 1, 0),
            ("cid", 0, 2),
        ]


async def test_who_commits_late_is_told_all_the_same(server: Postgres) -> None:
    """A transaction that had begun before a place and ends after it: its change comes with the next question."""
    async with an_archive(server) as archive:
        await archive.write(message("s", 1, sender="ann"))
        slow = await asyncpg.connect(archive.dsn)
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute("INSERT INTO fleetlm.changes (sessions) VALUES ($1::bytea[])", [b"s"])
        await archive.write(message("t", 1, sender="ann"))
        place = (await archive.changes(NOW)).now
        seen = await archive.changes(place, "ann")
        assert ("ann", "s", 1, 0) not in seen.pairs
        await transaction.commit()
        await slow.close()
        assert ("ann", "s", 1, 0) in (await archive.changes(seen.now, "ann")).pairs


async def test_a_place_that_cannot_be_gone_on_from_is_lost(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too long ago, of a database that was put back, or more than a page: read anew."""
    async with an_archive(server) as archive:
        await archive.write(message("s", 1, sender="ann"))
        place = (await archive.changes(NOW)).now
        assert not (await archive.changes(place, "ann")).lost
        old = ChangesPlace(place.xid, place.at_us - (LOST_AFTER_S + 1) * SECOND_US)
        assert (await archive.changes(old, "ann")).lost
        ahead = ChangesPlace(place.xid + 1_000_000, place.at_us)
        assert (await archive.changes(ahead, "ann")).lost
        await archive.write(*(message(f"s-{number}", 1, sender="ann") for number in range(6)))
        assert len((await archive.changes(place, "ann")).pairs) == 6
        assert CHANGED_MAX > 6
        monkeypatch.setattr(module, "CHANGED_MAX", 5)
        assert (await archive.changes(place, "ann")).lost


async def test_old_changes_are_swept(server: Postgres) -> None:
    """They live longer than any place that is not lost."""
    async with an_archive(server) as archive:
        await archive.write(message("s", 1, sender="ann"), message("t", 1))
        async with a_store(archive.dsn) as (store, _):
            await fetch(
                archive.dsn, f"UPDATE fleetlm.changes SET at = now() - interval '{CHANGES_KEPT_S + 1} s' RETURNING 1"
            )
            for seq in range(2, 202):
                await store.write(rows_of(of(message("s", seq)), without=()), from_pos=archive.pos, to_pos=archive.pos)
        assert await fetch(archive.dsn, "SELECT count(*) FROM fleetlm.changes") == [(200,)]
    assert LOST_AFTER_S + 60 < CHANGES_KEPT_S


async def test_without_an_archive_or_its_answer(server: Postgres) -> None:
    """Each is said."""
    inboxes = Inboxes()
    with pytest.raises(NotFound) as none:
        await inboxes.inbox(Inbox("ann", None, 1))
    assert none.value.reason == "no_archive"
    inboxes.asker = Asker("postgresql://fleetlm@/none?host=/nowhere", name="test", what="sessions are")
    with pytest.raises(TryAgain) as away:
        await inboxes.changes(Changes(["ann"], NOW))
    assert away.value.reason == "unavailable"
