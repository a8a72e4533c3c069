"""Installing, a first ring, a first message: what a person does first, by the README and by hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import fleetlm_client
from fleetlm_client import CaughtUp, Message
from tests.cluster import paths
from tests.e2e.install import OPERATOR_NAMESPACE, readme_lines
from tests.e2e.kubectl import get, kubectl, run
from tests.e2e.rings import Ring

FLEETLM = Path(sys.executable).with_name("fleetlm")


async def test_the_lines_of_the_readme(installed: None) -> None:
    """Line for line as they stand there: operator (installed by the first one), ring, ready, append and tail."""
    lines = readme_lines()
    assert len(lines) == 5
    assert lines[0].startswith("helm install")
    path = f"PATH={FLEETLM.parent}:{os.environ['PATH']}"
    script = "\n".join(["trap 'kill $(jobs -p)' EXIT", *lines[1:]])
    said = await run("env", "-C", paths.ROOT, path, "bash", "-ec", script)
    assert said.rstrip().endswith("hello"), said
    await Ring(OPERATOR_NAMESPACE).delete()


async def test_cli_and_sdk_through_the_service(ring: Ring) -> None:
    """What the command appends the SDK reads through the gateway Service, and the other way round."""
    url = await ring.url()
    said = await run(FLEETLM, "append", "first", "hello", "--url", url, "--json")
    assert json.loads(said)["seq"] == 1
    async with fleetlm_client.connect(url, participant_id="sdk") as client, client.join("first", cursor=0) as joined:
        assert (await joined.append({"text": "and again"})).seq == 2
        seen: list[tuple[int, object]] = []
        async for event in joined:
            if isinstance(event, Message):
                seen.append((event.seq, event.content))
            if isinstance(event, CaughtUp) and event.seq >= 2:
                break
            if len(seen) == 2:
                break
    assert seen == [(1, {"text": "hello"}), (2, {"text": "and again"})]
    lines = (await run(FLEETLM, "tail", "first", "--after", "0", "--no-follow", "--url", url, "--json")).splitlines()
    told = [json.loads(line) for line in lines]
    assert [(one["event"], one["seq"]) for one in told] == [("message", 1), ("message", 2), ("caught_up", 2)]


async def test_a_minimal_ring_round_trips(namespace: str) -> None:
    """What was read can be applied again and changes nothing: defaults are stable."""
    made = Ring(namespace)
    await made.apply({"paused": True})
    before = await made.read()
    # With its version it would be an answer to that one only, and the operator tells its status meanwhile.
    metadata = {name: value for name, value in before["metadata"].items() if name != "resourceVersion"}
    await kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps({**before, "metadata": metadata}))
    after = await get(namespace, "shardring", made.name)
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] == 1
