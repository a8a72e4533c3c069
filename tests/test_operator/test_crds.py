"""The schemas in crds/: defaults equal the operator's, everything is bounded and described, the status stays small."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from fleetlm_common.control import RingSpec
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.kubemap import ring_map_spec
from fleetlm_common.kubenames import RING_MAPS, SHARD_RINGS
from fleetlm_common.ring import MOVES_MAX, SHARDS_MAX, Member, RingMap, ranges_from
from fleetlm_common.slots import SLOTS_MAX
from fleetlm_operator.ringspec import ring_from
from fleetlm_operator.rolling import Block
from fleetlm_operator.verdict import BLOCKS_MAX, MESSAGE_CHARS_MAX, judge, status_object
from tests.test_operator.modelcluster import ModelCluster, ring_object

CRDS = Path(__file__).parents[2] / "crds"
Schema = dict[str, Any]


def crd(plural: str) -> Schema:
    """The CRD of that name."""
    found: Schema = yaml.safe_load((CRDS / f"fleetlm.io_{plural}.yaml").read_text())
    return found


def schema(plural: str) -> Schema:
    """Its schema."""
    found: Schema = crd(plural)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def nodes(where: str, node: Schema) -> Iterator[tuple[str, Schema]]:
    """Every part of a schema with its path."""
    yield where, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(f"{where}.{name}", child)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from nodes(f"{where}[]", node[key])


def defaulted(node: Schema, value: object) -> object:
    """What the API server makes of a value: defaults filled in."""
    if isinstance(value, dict) and "properties" in node:
        filled = dict(value)
        for name, child in node["properties"].items():
            if name not in filled and "default" in child:
                filled[name] = child["default"]
            if name in filled:
                filled[name] = defaulted(child, filled[name])
        return filled
    if isinstance(value, list):
        return [defaulted(node["items"], item) for item in value]
    return value


@pytest.mark.parametrize("resource", [SHARD_RINGS, RING_MAPS], ids=lambda each: each.kind)
def test_names_are_those_that_the_code_asks_for(resource: Any) -> None:
    """Group, version, kind and plural."""
    found = crd(resource.plural)["spec"]
    assert f"{found['group']}/{found['versions'][0]['name']}" == resource.api
    assert (found["names"]["kind"], found["names"]["plural"]) == (resource.kind, resource.plural)


def test_defaults_are_the_operators() -> None:
    """A ring that says nothing means the same to the API server and to the operator."""
    filled = defaulted(schema("shardrings")["properties"]["spec"], {})
    assert isinstance(filled, dict)
    assert ring_from(ring_object(filled)).spec == ring_from(ring_object({})).spec
    known = msgspec.to_builtins(ring_from(ring_object({})).spec)
    assert set(schema("shardrings")["properties"]["spec"]["properties"]) == set(known), "a field that nobody reads"


@pytest.mark.parametrize("plural", ["shardrings", "ringmaps"])
def test_everything_is_bounded_and_described(plural: str) -> None:
    """Every list, map, string and number of spec and status has a bound; every field a description."""
    for part in ("spec", "status"):
        for where, node in nodes(
            part, schema(plural)["properties"].get(part, {"type": "object", "description": "none"})
        ):
            assert where.endswith("[]") or "description" in node, f"{where} has no description"
            kind = node.get("type")
            if kind == "array":
                assert "maxItems" in node, where
            if kind == "string":
                assert {"maxLength", "enum", "format"} & set(node), where
            if kind == "integer":
                assert "minimum" in node, where
                assert "maximum" in node or part == "status", where
            if "additionalProperties" in node:
                assert "maxProperties" in node, where


@pytest.mark.parametrize("plural", ["shardrings", "ringmaps"])
def test_rules_say_what_to_do(plural: str) -> None:
    """Each CEL rule has a message for people."""
    rules = [rule for _, node in nodes("", schema(plural)) for rule in node.get("x-kubernetes-validations", [])]
    assert rules
    assert all(len(rule["message"]) > 20 for rule in rules)


def test_the_scale_subresource_points_at_what_is_there() -> None:
    """`kubectl scale` and an autoscaler find their fields."""
    scale = crd("shardrings")["spec"]["versions"][0]["subresources"]["scale"]
    for path in scale.values():
        node = schema("shardrings")
        for name in path.removeprefix(".").split("."):
            node = node["properties"][name]


def test_the_status_stays_small() -> None:
    """1,024 slots on 100 shards, everything wrong at once: below 8 KiB, and the schema takes it."""
    cluster = ModelCluster({"replicas": 100, "slots": 1024}, bad=lambda image: image.endswith(":bad"))
    cluster.settle()
    cluster.edit(version="bad")
    for _ in range(4):
        cluster.step()
    seen, plan = cluster.observe(), cluster.plan
    assert plan is not None
    verdict = judge(seen, plan, ())
    blocks = tuple(Block(f"Predicate{number}", "x" * 500) for number in range(BLOCKS_MAX))
    verdict = msgspec.structs.replace(verdict, blocks=blocks, sentence="x" * 5000)
    status = status_object(seen, plan, verdict)
    assert len(msgspec.json.encode(status)) < 8 * 1024
    assert len(status["message"]) <= MESSAGE_CHARS_MAX
    allowed = schema("shardrings")["properties"]["status"]["properties"]
    assert set(status) <= set(allowed)
    assert status["operation"]["kind"] in allowed["operation"]["properties"]["kind"]["enum"]
    assert verdict.phase in allowed["phase"]["enum"]


def test_the_largest_ring_map_fits() -> None:
    """As many ranges as slots, as many members and moves as there may be: far below the 1.5 MiB that etcd takes."""
    names = [ShardName(f"shard-{number}") for number in range(SHARDS_MAX)]
    ring = RingMap(
        uid="u" * 36,
        slots=SLOTS_MAX,
        epoch=Epoch(2**53 - 1),
        members=tuple(Member(name, "v" * 32) for name in names),
        ranges=ranges_from([(names[slot % SHARDS_MAX], Epoch(2**53 - 1)) for slot in range(SLOTS_MAX)]),
    )
    spec = ring_map_spec(RingSpec(ring.uid, ring.slots, SHARDS_MAX), ring)
    assert len(msgspec.json.encode(spec)) < 128 * 1024
    rules = schema("ringmaps")["properties"]["spec"]["properties"]["map"]["properties"]
    assert rules["ranges"]["maxItems"] == SLOTS_MAX
    assert rules["members"]["maxItems"] == SHARDS_MAX
    assert rules["moves"]["maxItems"] == MOVES_MAX


def test_times_do_not_move_while_nothing_happens() -> None:
    """A condition keeps the time of its last change."""
    cluster = ModelCluster()
    cluster.settle()
    before = cluster.ring_object["status"]
    cluster.now = datetime(2027, 1, 1, tzinfo=UTC)
    cluster.step()
    assert cluster.ring_object["status"] == before
