"""Rules of the custom resources at a real API server: each refuses what it must, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import pytest
import yaml

from fleetlm_common.kubeapi import ApiError, ApiRefused, Object
from fleetlm_common.kubenames import RING_MAPS, SHARD_RINGS
from tests.support.apiserver import ROOT
from tests.support.operatorworld import World

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]


def pin(first: int, last: int, shard: str = "shard-0") -> Object:
    """A pin as people write it."""
    return {"first": first, "last": last, "shard": shard}


REFUSED: Final[list[tuple[Object, str]]] = [
    ({"slots": 256}, "make a new ShardRing to have another"),
    ({"storage": {"size": "9Gi"}}, "a volume cannot shrink"),
    ({"storage": {"size": "100Mi"}}, "at least 512Mi"),
    ({"storage": {"className": "other"}}, "volumes cannot change their class"),
    ({"log": {"segmentSize": "2Gi"}}, "between 4Mi and 1Gi"),
    ({"hot": {"maxBytes": "1Ki"}}, "at least 1Mi"),
    ({"drain": {"timeoutSeconds": 100}}, "at least timeoutSeconds + 25"),
    ({"replicas": 101}, "less than or equal to 100"),
    ({"cordoned": ["demo-shard-1"]}, "should match"),
    ({"cordoned": ["shard-100"]}, "should match"),
    ({"forgottenVolumes": [{"shard": "shard-1"}]}, "Required value"),
    ({"forgottenVolumes": [{"shard": "shard-1", "volume": ""}]}, "at least 1 chars long"),
    ({"forgottenVolumes": [{"shard": "demo-shard-1", "volume": "v"}]}, "should match"),
    ({"forgottenVolumes": [{"shard": "shard-1", "volume": "v"}] * 2}, "Duplicate value"),
    ({"forgottenVolumes": [{"shard": "shard-1", "volume": f"v{n}"} for n in range(65)]}, "at most 64 items"),
    ({"pins": [pin(3, 2)]}, "last slot comes before its first"),
    ({"pins": [pin(0, 3), pin(9, 9), pin(3, 4)]}, "two pins name the same slot"),
    ({"pins": [pin(0, 3), pin(0, 0)]}, "Duplicate value"),
    ({"pins": [pin(500, 512)]}, "the last one is slots - 1"),
    ({"pins": [pin(0, 3, "shard-01")]}, "should match"),
    ({"pins": [pin(4 * n, 4 * n + 1) for n in range(65)]}, "at most 64 items"),
]
RULES: Final = "x-kubernetes-validations"


def messages(plural: str) -> set[str]:
    """What the rules of a resource say when they refuse."""

    def inside(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (rule["message"] for rule in node.get(RULES, []))
            for name, child in node.items():
                yield from inside(child) if name != RULES else ()
        elif isinstance(node, list):
            for child in node:
                yield from inside(child)

    return set(inside(yaml.safe_load((ROOT / "crds" / f"fleetlm.io_{plural}.yaml").read_text())))


def unmet(plural: str, words: Iterable[str]) -> set[str]:
    """Rules that no test broke."""
    return {message for message in messages(plural) if not any(each in message for each in words)}


async def test_each_rule_refuses_with_its_message(world: World) -> None:
    """And a smallest ShardRing round-trips: applied again, nothing changes."""
    named = (("9lives", "begin with a letter"), ("x" * 41, "at most 40 characters"))
    assert not unmet("shardrings", [words for _, words in [*REFUSED, *named]])
    await world.make()
    first = await world.ring()
    await world.make()
    assert (await world.ring())["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    for spec, words in REFUSED:
        with pytest.raises(ApiRefused, match=words.replace("+", r"\+")):
            await world.edit(spec)
    for name, words in named:
        body = {"apiVersion": SHARD_RINGS.api, "kind": SHARD_RINGS.kind, "metadata": {"name": name}}
        with pytest.raises(ApiRefused, match=words):
            await world.api.apply(SHARD_RINGS, world.namespace, body, manager="t")


async def test_as_many_pins_and_cordons_as_there_may_be(world: World) -> None:
    """The API server finds the rules cheap enough for them; shards that are not there may be named."""
    spec: Object = {"pins": [pin(8 * n, 8 * n + 7, f"shard-{n}") for n in range(64)]}
    await world.make({**spec, "cordoned": [f"shard-{n}" for n in range(100)]})
    assert len((await world.ring())["spec"]["pins"]) == 64


async def test_an_epoch_never_goes_back(world: World) -> None:
    """The API server itself refuses it, and a map without the next epoch, another uid, other slots, no map."""

    def spec(epoch: int, owner: str = "a") -> Object:
        ranges = [{"first": 0, "last": 7, "owner": owner, "epoch": epoch}]
        members = [{"name": owner, "volumeId": "v"}]
        return {
            "uid": "u",
            "slots": 8,
            "shards": 1,
            "map": {"format": 1, "epoch": epoch, "members": members, "ranges": ranges},
        }

    async def write(found: Object) -> None:
        body = {"apiVersion": RING_MAPS.api, "kind": RING_MAPS.kind, "metadata": {"name": "m"}, "spec": found}
        await world.api.apply(RING_MAPS, world.namespace, body, manager="t")

    await write(spec(1))
    await write(spec(2))
    without = {key: value for key, value in spec(3).items() if key != "map"}
    refusals = (
        (spec(1), "never goes back"),
        (spec(4), "never jumps"),
        (spec(2, "b"), "needs the next epoch"),
        ({**spec(3), "uid": "other"}, "for life"),
        ({**spec(3), "slots": 9}, "fixed for the life"),
        (without, "keeps one"),
    )
    assert not unmet("ringmaps", [words for _, words in refusals])
    for refused, words in refusals:
        with pytest.raises(ApiError, match=words):
            await write(refused)
    await write(spec(3))
