"""A ring with an archive: a PostgreSQL in the cluster gets every message, whoever of shards and database is killed."""

from __future__ import annotations

import json
from typing import Any, Final

import asyncpg

from tests.cluster import images
from tests.e2e.kubectl import get, kubectl, until
from tests.e2e.rings import Ring, killed_in_place, pod_ready
from tests.e2e.traffic import Traffic, under_traffic

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


async def test_every_message_reaches_the_archive(namespace: str) -> None:
    """URL in a Secret; under load the database's container and a shard's are killed: the archive has all, once."""
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
    last_seqs: dict[str, int] = {}

    async def script(traffic: Traffic) -> None:
        await killed_in_place(namespace, "postgres")
        await traffic.progress()
        await killed_in_place(namespace, f"{ring.name}-shard-0")
        await traffic.progress()
        last_seqs.update(traffic.last_seqs)

    report = await under_traffic(ring, "database and shard killed", script)
    address = (await get(namespace, "service", "postgres"))["spec"]["clusterIP"]
    connection = await asyncpg.connect(url.replace("@postgres/", f"@{address}/"))
    try:
        acked = report.figures["acked"]

        async def all_there() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM fleetlm.messages") >= acked)

        await until("the archive has what was acknowledged", all_there, timeout_s=60)
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
