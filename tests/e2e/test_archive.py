"""A ring with an archive: a PostgreSQL in the cluster gets every message, whoever of shards and database is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator
from typing import Any, Final

import asyncpg
import pytest

import fleetlm_client
from fleetlm_client import Gap, Message
from fleetlm_shard.archive.restore import TAIL
from tests.cluster import images
from tests.e2e.kubectl import get, kubectl, until
from tests.e2e.rings import Ring, killed_in_place, pod_ready, signal_container, volume
from tests.e2e.traffic import Traffic, under_traffic

SESSIONS: Final = 12
"""With so many, each of two shards has some."""
PASSWORD: Final = "not-a-secret"
NOBODY: Final = 65534
"""PostgreSQL wants a user that has a name."""
SERVER: Final = """
import os
from fleetlm_cli.postgres import command
if not os.path.exists("/data/whole"):
    with open("/tmp/password", "w") as file:
        file.write(os.environ["PASSWORD"])
    words = command("initdb", "-D", "/data/db", "-U", "fleetlm", "-A", "scram-sha-256", "--pwfile=/tmp/password",
                    "-E", "UTF8", "--locale=C")
    assert os.spawnv(os.P_WAIT, words[0], words) == 0
    with open("/data/db/pg_hba.conf", "a") as file:
        file.write("host all all all scram-sha-256\\n")
    open("/data/whole", "w").close()
words = command("postgres", "-D", "/data/db", "--listen_addresses=*", "--unix_socket_directories=/tmp")
os.execv(words[0], words)
"""


def database() -> list[dict[str, Any]]:
    """A PostgreSQL that survives the death of its container, and its Service."""
    labels = {"app": "postgres"}
    container = {
        "name": "postgres",
        "image": images.name("cli"),
        "command": ["/app/bin/python", "-c", SERVER],
        "env": [{"name": "PASSWORD", "value": PASSWORD}],
        "readinessProbe": {"tcpSocket": {"port": 5432}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        "containers": [container],
        "volumes": [{"name": "data", "emptyDir": {}}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
            "fsGroup": NOBODY,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    metadata = {"name": "postgres", "labels": labels}
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"port": 5432}]},
        },
    ]


@pytest.fixture
async def archived(namespace: str) -> Ring:
    """Two shards and the archive that they write to, whose URL is in a Secret."""
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": database()})
    await kubectl("apply", "-n", namespace, "-f", "-", stdin=everything)
    url = f"postgresql://fleetlm:{PASSWORD}@postgres/postgres"
    await kubectl("create", "secret", "generic", "archive", f"--from-literal=url={url}", "-n", namespace)

    async def serves() -> bool:
        return pod_ready(await get(namespace, "pod", "postgres"))

    await until("the database is ready", serves)
    ring = Ring(namespace)
    await ring.apply({"replicas": 2, "gateway": {"replicas": 1}, "archive": {"secretRef": {"name": "archive"}}})
    await ring.ready()
    return ring


async def connected(namespace: str) -> asyncpg.Connection[asyncpg.Record]:
    """To the archive, from outside of the cluster; the caller closes it."""
    address = (await get(namespace, "service", "postgres"))["spec"]["clusterIP"]
    return await asyncpg.connect(f"postgresql://fleetlm:{PASSWORD}@{address}/postgres")


async def holds(connection: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    """Wait until so many messages are archived."""

    async def all_there() -> bool:
        return bool(await connection.fetchval("SELECT count(*) FROM fleetlm.messages") >= count)

    await until("the archive has what was acknowledged", all_there, timeout_s=60)


async def test_every_message_reaches_the_archive(archived: Ring) -> None:
    """Under load the database's container and a shard's are killed: the archive has all, once."""
    ring, namespace = archived, archived.namespace
    last_seqs: dict[str, int] = {}

    async def script(traffic: Traffic) -> None:
        await killed_in_place(namespace, "postgres")
        await traffic.progress()
        await killed_in_place(namespace, f"{ring.name}-shard-0")
        await traffic.progress()
        last_seqs.update(traffic.last_seqs)

    report = await under_traffic(ring, "database and shard killed", script)
    connection = await connected(namespace)
    try:
        acked = report.figures["acked"]
        await holds(connection, acked)
        rows = await connection.fetch(
            "SELECT session, min(seq) AS first, max(seq) AS last, count(*) AS held FROM fleetlm.messages GROUP BY 1"
        )
        assert all((row["first"], row["last"]) == (1, row["held"]) for row in rows), "no hole, nothing twice"
        assert sum(row["held"] for row in rows) >= acked
        held = {row["session"].decode(): row["last"] for row in rows}
        assert all(held.get(session, 0) >= seq for session, seq in last_seqs.items())
    finally:
        await connection.close()
    await ring.ready()


@pytest.mark.long
async def test_a_lost_volume_is_restored_from_the_archive(archived: Ring) -> None:
    """`givenUpVolumes`: its shard goes on with what is archived; readers are told which tail may be missing."""
    ring, namespace = archived, archived.namespace
    url = await ring.url()
    sessions = [f"kept-{number}" for number in range(SESSIONS)]
    async with fleetlm_client.connect(url, participant_id="writer") as client:
        for session in sessions:
            async with client.join(session) as joined:
                assert [(await joined.append({"at": at})).seq for at in (1, 2, 3)] == [1, 2, 3]
    connection = await connected(namespace)
    try:
        await holds(connection, 3 * SESSIONS)
    finally:
        await connection.close()
    members = (await get(namespace, "ringmap", ring.name))["spec"]["map"]["members"]
    lost = next(member["volumeId"] for member in members if member["name"] == "shard-1")
    folder = await volume(ring, 1)
    shutil.rmtree(folder / "volume")
    await signal_container(await get(namespace, "pod", f"{ring.name}-shard-1"))
    assert lost in (await ring.says("Degraded", "VolumeLost"))["message"], "it names what a person has to write"
    await ring.patch({"givenUpVolumes": [lost]})
    await ring.ready()
    restored = 0
    async with fleetlm_client.connect(url, participant_id="reader") as client:
        for session in sessions:
            async with client.join(session, cursor=0) as joined:
                ack = await joined.append({"at": 4})
                seen = [event async for event in _until(joined, ack.seq)]
            told = [event.content for event in seen if isinstance(event, Message)]
            gaps = [(event.from_seq, event.next_seq) for event in seen if isinstance(event, Gap)]
            assert told == [{"at": at} for at in (1, 2, 3, 4)], f"{session}: {seen}"
            restored += bool(gaps)
            assert (gaps, ack.seq) in (([], 4), ([(4, 4 + TAIL)], 4 + TAIL)), f"{session}: {gaps}, {ack}"
    assert 0 < restored < SESSIONS, "the sessions of one of two shards"


async def _until(joined: fleetlm_client.Session, seq: int) -> AsyncGenerator[fleetlm_client.Event]:
    """What comes, up to a message."""
    async for event in joined:
        yield event
        if isinstance(event, Message) and event.seq == seq:
            return
