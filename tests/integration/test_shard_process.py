"""The real shard process: what it says survives its death, and what it refuses it says why."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, TryAgain
from fleetlm_common.filecontrol import change_ring
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import Member
from fleetlm_common.rpc import Kind
from fleetlm_shard.process import EXIT_FENCED, EXIT_LEFT, HANDOVER_BEGINS_S
from tests.support.eventually import eventually
from tests.support.rpcclient import RpcClient, draft, fragment
from tests.support.shardprocess import SLOTS, ShardRing


async def test_an_acknowledged_message_survives_sigkill(tmp_path: Path) -> None:
    """Acks, seqs, ids and bytes are the same after a crash; a retry with the same key gets the first answer."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        first = await client.append("s", "one", "two")
        assert [(ack.seq, ack.deduped) for ack in first] == [(1, False), (2, False)]
        await client.mark_read("s", "bob", 2)
        before = await client.read("s", after=0)
        stream = await client.subscribe("s", after=1)
        assert await stream.next() == (2, [msgspec.json.decode(before.messages[1])])
        await shard.kill()
    async with ring.shard() as shard, await shard.client() as client:
        after = await client.read("s", after=0)
        assert after.messages == before.messages
        again = await client.append("s", "one", "two")
        assert [(ack.seq, ack.id, ack.inserted_at, ack.deduped) for ack in again] == [
            (ack.seq, ack.id, ack.inserted_at, True) for ack in first
        ]
        assert await client.mark_read("s", "bob", 0) == 2
        [result] = await client.append_entries("s", rpc.Entry([rpc.Draft("one", fragment("other"))]))
        assert result.error is not None
        assert result.error.code == "IDEMPOTENCY_CONFLICT"
        with pytest.raises(Conflict) as refused:
            await client.append("s", "three", expected_seq=1)
        assert refused.value.last_seq == 2
        assert (await client.append("s", "two", expected_seq=0))[0].deduped


async def test_sigkill_at_random_moments_under_load(tmp_path: Path) -> None:
    """Each kill falls into a stream of appends; everything acknowledged is there once, contiguous, in its place."""
    ring = ShardRing(tmp_path)
    acked: dict[str, int] = {}
    sent = 0
    for life in range(4):
        async with ring.shard() as shard, await shard.client() as client:
            flights: list[tuple[str, asyncio.Future[tuple[int, bytes]]]] = []
            for _ in range(400 + 137 * life):
                sent += 1
                entry = rpc.Entry([draft(f"text-{sent}")])
                body = rpc.encode(rpc.Append(client.epoch, f"s{sent % 7}", [entry]))
                flights.append((f"text-{sent}", client.send(Kind.APPEND, body)))
                if len(flights) % 20 == 0:
                    await asyncio.wait([flights[-20][1]])
            # Killed with the last ones in flight.
            await shard.kill()
            for text, flight in flights:
                if flight.done() and flight.exception() is None:
                    kind, payload = flight.result()
                    assert kind == Kind.APPENDED
                    [result] = msgspec.msgpack.decode(payload, type=rpc.Appended).results
                    acked[text] = result.acks[0].seq
    async with ring.shard() as shard, await shard.client() as client:
        found: dict[object, int] = {}
        for number in range(7):
            messages = await client.read_all(f"s{number}")
            assert [message["seq"] for message in messages] == list(range(1, len(messages) + 1))
            for message in messages:
                assert message["content"] not in found
                found[message["content"]] = int(str(message["seq"]))
        assert len(acked) > 1000
        assert {text: found.get(text) for text in acked} == acked


async def test_a_graceful_end_answers_what_is_in_flight_and_says_goodbye(tmp_path: Path) -> None:
    """SIGTERM: every request is answered, GOAWAY arrives, the status is 0, and the next boot reads a checkpoint."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        flights = [
            client.send(Kind.APPEND, rpc.encode(rpc.Append(client.epoch, "s", [rpc.Entry([draft(str(number))])])))
            for number in range(200)
        ]
        await asyncio.wait([flights[0]])
        shard.signal(signal.SIGTERM)
        answers = await asyncio.gather(*flights)
        await asyncio.wait_for(client.goaway.wait(), 10)
        acked = 0
        for kind, payload in answers:
            if kind == Kind.APPENDED:
                [result] = msgspec.msgpack.decode(payload, type=rpc.Appended).results
                acked += result.error is None
        assert await shard.ended() == 0
        assert not (await ring.control.read()).shards[ShardName("shard-0")].ready
    async with ring.shard() as shard, await shard.client() as client:
        # Drained requests were not taken; what was taken was answered.
        assert (await client.info("s")).last_seq == acked
        read = await shard.event("log.read")
        # The key window is read again, nothing is damaged.
        assert read["damaged_ranges"] == 0


async def test_a_shard_that_is_replaced_in_place_waits_for_nobody(tmp_path: Path) -> None:
    """Asked to end it is served while others may take its slots; once the ring says that nobody will, it ends."""
    ring = ShardRing(tmp_path)
    name = ShardName("shard-0")
    async with ring.shard(env={"HANDOVER_S": "60"}) as shard:
        mine = Member(name, (await ring.announced()).shards[name].volume_id)
        await ring.publish((mine, Member(ShardName("shard-1"), "volume-1")), [name] * ring.slots)
        await eventually(lambda: shard.printed().count("map.adopted") == 2, "it knows of the other")
        async with await shard.client() as client:
            shard.signal(signal.SIGTERM)
            await shard.event("handing_over")
            assert [ack.seq for ack in await client.append("s", "one")] == [1]
            change_ring(ring.control_folder, lambda spec: msgspec.structs.replace(spec, in_place=(name,)))
            async with asyncio.timeout(HANDOVER_BEGINS_S / 2):
                assert await shard.ended() == 0


async def test_an_empty_volume_of_a_member_is_refused(tmp_path: Path) -> None:
    """The map binds the shard to its volume: another, empty one is VolumeLost, however often it starts."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        await client.append("s", "one")
        shard.signal(signal.SIGTERM)
        await shard.ended()
    shutil.move(tmp_path / "shard-0", tmp_path / "kept")
    for _ in range(2):
        async with ring.process() as shard:
            await shard.wait_reason("VolumeLost")
            assert "listening" not in shard.printed()
            status, text = await shard.get("/admin/status")
            assert (status, msgspec.json.decode(text)["serving"]) == (200, None)
    shutil.rmtree(tmp_path / "shard-0")
    shutil.move(tmp_path / "kept", tmp_path / "shard-0")
    async with ring.shard() as shard, await shard.client() as client:
        assert (await client.info("s")).last_seq == 1


async def test_a_member_speaks_again_after_a_process_on_another_volume(tmp_path: Path) -> None:
    """One that was frozen until the ring did without its volume: its last word does not hide who serves, and where."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard:
        own = (await ring.announced(port=await shard.port())).shards[ShardName("shard-0")]
        for number in range(2):
            other = msgspec.structs.replace(own, volume_id=f"forgotten-{number}", port=1, ready=False)
            await ring.control.announce(other)
            again = await ring.announced(port=own.port)
            assert again.shards[own.name] == own


async def test_a_volume_of_another_shard_is_refused_and_left_alone(tmp_path: Path) -> None:
    """ForeignVolume: not ready, says so, changes no byte."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        await client.append("s", "one")
        shard.signal(signal.SIGTERM)
        await shard.ended()
    before = {path: path.read_bytes() for path in sorted((tmp_path / "shard-0").rglob("*")) if path.is_file()}
    async with ring.process(name="shard-1", data=tmp_path / "shard-0") as shard:
        await shard.wait_reason("ForeignVolume")
        shard.signal(signal.SIGTERM)
        assert await shard.ended() == 0
    assert {path: path.read_bytes() for path in sorted((tmp_path / "shard-0").rglob("*")) if path.is_file()} == before


async def test_a_shard_waits_until_it_is_a_member(tmp_path: Path) -> None:
    """It announces itself with its volume, is not ready, refuses with a reason, and serves once the map names it."""
    ring = ShardRing(tmp_path)
    async with ring.process() as shard:
        await shard.wait_reason("NotMember")
        async with await shard.client() as client:
            with pytest.raises(TryAgain) as refused:
                await client.append("s", "one")
            assert refused.value.reason == "unavailable"
            assert not (await ring.control.read()).shards[ShardName("shard-0")].ready
            await ring.bind()
            await shard.wait_reason("Ready")
            assert [ack.seq for ack in await client.append("s", "one")] == [1]
            async with asyncio.timeout(10):
                async for view in ring.control.watch():
                    if view.shards[ShardName("shard-0")].ready:
                        break


async def test_a_living_elder_leaves_when_a_younger_process_asks(tmp_path: Path) -> None:
    """Two processes on one volume: the elder syncs and goes, the younger has everything that was acknowledged."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as elder, await elder.client() as client:
        await client.append("s", "one")
        async with ring.process() as younger:
            assert await elder.ended() == EXIT_LEFT
            await younger.wait_reason("Ready")
            async with await younger.client() as other:
                assert [ack.seq for ack in await other.append("s", "two")] == [2]
                assert [message["content"] for message in await other.read_all("s")] == ["one", "two"]


async def test_a_frozen_elder_is_fenced(tmp_path: Path) -> None:
    """SIGSTOP the elder with appends in flight, let a younger take over, SIGCONT: it acknowledges nothing and ends."""
    ring = ShardRing(tmp_path)
    env = {"TAKEOVER_AFTER_S": "1"}
    async with ring.shard(env=env) as elder, await elder.client() as client:
        await client.append("s", "one")
        hello = await elder.hello()
        elder.signal(signal.SIGSTOP)
        flights = [
            client.send(Kind.APPEND, rpc.encode(rpc.Append(client.epoch, "s", [rpc.Entry([draft(f"late {number}")])])))
            for number in range(50)
        ]
        info = client.send(Kind.INFO, rpc.encode(rpc.Info(client.epoch, "s")))
        ahead = client.send(Kind.READ, rpc.encode(rpc.Read(client.epoch, "s", 10, after=2)))
        conflict = client.send(
            Kind.APPEND, rpc.encode(rpc.Append(client.epoch, "s", [rpc.Entry([draft("c")], expected_seq=0)]))
        )
        async with ring.process(env=env) as younger:
            await younger.wait_reason("Ready")
            async with await younger.client() as other:
                assert [ack.seq for ack in await other.append("s", "two", "three")] == [2, 3]
                elder.signal(signal.SIGCONT)
                assert await elder.ended() == EXIT_FENCED
                await asyncio.wait_for(client.lost.wait(), 10)
                for each in (*flights, info, ahead, conflict):
                    assert isinstance(each.exception(), ConnectionError), "the elder answered from what it knew"
                assert client.other == []
                assert [message["content"] for message in await other.read_all("s")] == ["one", "two", "three"]
                assert hello.volume_id == (await younger.hello()).volume_id
            await younger.kill()
        async with ring.shard() as third, await third.client() as last:
            assert [message["content"] for message in await last.read_all("s")] == ["one", "two", "three"]


async def test_a_full_disk_is_said_and_reading_goes_on(tmp_path: Path) -> None:
    """Only the reserve is left: appends hear TRY_AGAIN disk_full, readiness says DiskFull, reads are answered."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        await client.append("s", "one")
        await shard.kill()
    async with ring.process(env={"DISK_RESERVE_BYTES": str(2**60)}) as shard:
        await shard.wait_reason("DiskFull")
        async with await shard.client() as client:
            with pytest.raises(TryAgain) as refused:
                await client.append("s", "two")
            assert refused.value.reason == "disk_full"
            assert (await client.append("s", "one"))[0].deduped
            assert len(await client.read_all("s")) == 1


async def test_a_full_disk_before_the_first_slot_is_opened(tmp_path: Path) -> None:
    """A fresh shard on a full disk stays up, says why, and takes nothing."""
    ring = ShardRing(tmp_path)
    async with ring.process(env={"DISK_RESERVE_BYTES": str(2**60)}) as shard:
        await ring.bind()
        await shard.wait_reason("DiskFull")
        async with await shard.client() as client:
            with pytest.raises(TryAgain) as refused:
                await client.append("s", "one")
            assert refused.value.reason == "disk_full"
            assert await client.read_all("s") == []
        shard.signal(signal.SIGTERM)
        assert await shard.ended() == 0


async def test_a_log_whose_volume_disappears_ends_the_process(tmp_path: Path) -> None:
    """A disk that fails: who waits is told or cut off, nothing is acknowledged, the exit status is not 0."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        await client.append("s", "one")
        # The heartbeat and the look meet a folder that is no folder any more.
        shutil.move(tmp_path / "shard-0", tmp_path / "gone")
        (tmp_path / "shard-0").write_text("not a volume")
        assert await shard.ended() != 0
        await asyncio.wait_for(client.lost.wait(), 10)


async def test_broken_configuration_is_named(tmp_path: Path) -> None:
    """Unknown and wrong variables: status 78 and words that name the variable; nothing is made."""
    ring = ShardRing(tmp_path)
    for env, words in (
        ({"SEGMENT_BITES": "1"}, "FLEETLM_SHARD_SEGMENT_BITES"),
        ({"FSYNC": "sometimes"}, "FLEETLM_SHARD_FSYNC"),
        ({"LISTEN": "nowhere"}, "FLEETLM_SHARD_LISTEN"),
        ({"CONTROL": "http://x"}, "CONTROL"),
        ({"CREDENTIAL_FILE": str(tmp_path / "missing")}, "FLEETLM_SHARD_CREDENTIAL_FILE"),
        ({"KEYS_MAX": "10", "KEYS_HARD_MAX": "5"}, "KEYS_MAX"),
        ({"NAME": "No Name"}, "NAME"),
    ):
        async with ring.process(env=env) as shard:
            assert await shard.ended() == 78, env
            assert words in shard.printed()
    assert not (tmp_path / "shard-0").exists()


async def test_the_shard_serves_while_the_control_plane_is_away(tmp_path: Path) -> None:
    """No map, no matter: traffic goes on; a restart in the same pod goes by the map that is stored on the volume."""
    ring = ShardRing(tmp_path)
    env = {"POD_UID": "pod-1"}
    async with ring.shard(env=env) as shard, await shard.client() as client:
        hello = await shard.hello()
        shutil.move(ring.control_folder, tmp_path / "away")
        assert [ack.seq for ack in await client.append("s", "one")] == [1]
        await shard.kill()
        async with ring.process(env=env) as again:
            await again.wait_reason("Ready")
            async with await RpcClient.connect("127.0.0.1", await again.port(), hello) as other:
                assert [ack.seq for ack in await other.append("s", "two")] == [2]
            await again.kill()
        async with ring.process(env={"POD_UID": "pod-2"}) as stranger:
            await stranger.wait_reason("MapUnavailable")
        shutil.move(tmp_path / "away", ring.control_folder)


async def test_a_second_credential_is_refused(tmp_path: Path) -> None:
    """Gateways with another secret are shown out, and the secret is in no log line."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard:
        hello = msgspec.structs.replace(await shard.hello(), credential=b"guess")
        client = await RpcClient.open("127.0.0.1", await shard.port())
        kind, _ = await client.request(Kind.HELLO, rpc.encode(hello))
        assert kind == Kind.ERROR
        await asyncio.wait_for(client.lost.wait(), 10)
        async with await shard.client() as good:
            await good.append("s", "secret content")
        printed = shard.printed()
        assert "test-credential" not in printed
        assert "guess" not in printed
        assert "secret content" not in printed


async def test_slots_of_others_are_moved(tmp_path: Path) -> None:
    """A shard that owns half of the slots serves those, and names the owner of the others."""
    ring = ShardRing(tmp_path)
    async with ring.process() as shard:
        view = await ring.announced()
        members = (
            Member(ShardName("shard-0"), view.shards[ShardName("shard-0")].volume_id),
            Member(ShardName("shard-1"), "another-volume"),
        )
        owners = [ShardName(f"shard-{slot % 2}") for slot in range(SLOTS)]
        await ring.publish(members, owners)
        await shard.wait_reason("Ready")
        async with await shard.client() as client:
            served = moved = 0
            for number in range(40):
                kind, _ = await client.request(Kind.READ, rpc.encode(rpc.Read(client.epoch, f"s{number}", 10, after=0)))
                served += kind == Kind.PAGE
                moved += kind == Kind.MOVED
            assert (served + moved, served > 5, moved > 5) == (40, True, True)
            await eventually(lambda: client.other == [], "nothing else is said")


COLD_MESSAGES = 60_000
COLD_BODY_BYTES = 2000
ANONYMOUS_BYTES_MAX = 32 * 1024 * 1024
"""By which the shard's own memory may grow (mapped segments are the page cache's); 12 MiB were seen."""


def anonymous_bytes(pid: int) -> int:
    """Memory of the process that is no file's."""
    [line] = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.timeout(180)
async def test_what_memory_does_not_hold_is_replayed_in_bounded_memory(tmp_path: Path) -> None:
    """120 MB of one session from the local log alone, by four readers at once: contiguous, and memory stays flat."""
    ring = ShardRing(tmp_path)
    small = {"HOT_BYTES_MAX": str(1024 * 1024), "SEGMENT_BYTES": str(8 * 1024 * 1024)}
    async with ring.shard(env=small) as shard, await shard.client() as client:

        async def fifty(first: int) -> None:
            drafts = [draft(f"{number} {'x' * COLD_BODY_BYTES}") for number in range(first, first + 50)]
            [result] = await client.append_entries("s", rpc.Entry(drafts, None))
            assert result.error is None

        for first in range(0, COLD_MESSAGES, 500):
            await asyncio.gather(*(fifty(each) for each in range(first, first + 500, 50)))
        begin_bytes = peak_bytes = anonymous_bytes(shard.pid)

        async def read_all(reader: RpcClient) -> None:
            nonlocal peak_bytes
            after = 0
            while after < COLD_MESSAGES:
                page = await reader.read("s", after=after)
                assert page.gap is None
                for body in page.messages:
                    after += 1
                    assert msgspec.json.decode(body)["seq"] == after
                peak_bytes = max(peak_bytes, anonymous_bytes(shard.pid))

        async with await shard.client() as b, await shard.client() as c, await shard.client() as d:
            await asyncio.gather(*map(read_all, (client, b, c, d)))
        assert peak_bytes - begin_bytes < ANONYMOUS_BYTES_MAX, f"grew by {(peak_bytes - begin_bytes) >> 20} MiB"
