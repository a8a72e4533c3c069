"""Evaluates NetworkPolicies as a network that enforces them would: who may open a connection to whom. Pure.

Promise: the rules of the API's documentation for ingress, as far as FleetLM's policies use them; anything else in a
policy is an error here, never an answer. Must not be done here: knowing what FleetLM wants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fleetlm_common.kubeapi import Object

NAMESPACE_NAME = "kubernetes.io/metadata.name"


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod: its namespace (which has its own name as a label, as everywhere) and its labels."""

    namespace: str
    labels: Mapping[str, str]


def may_connect(policies: Iterable[Object], *, source: Peer, target: Peer, port: int) -> bool:
    """Whether `source` reaches that port of `target`: yes if no policy selects `target`, or one that does lets it."""
    selecting = [
        each
        for each in policies
        if each["metadata"]["namespace"] == target.namespace
        and _matches(each["spec"]["podSelector"], target.labels)
        and "Ingress" in each["spec"]["policyTypes"]
    ]
    return not selecting or any(_lets(each, source, port) for each in selecting)


def _lets(policy: Object, source: Peer, port: int) -> bool:
    home = policy["metadata"]["namespace"]
    for rule in policy["spec"].get("ingress", []):
        _only(rule, {"from", "ports"})
        ports = rule.get("ports")
        fits = ports is None or any(each["port"] == port and each["protocol"] == "TCP" for each in ports)
        if fits and ("from" not in rule or any(_is(each, source, home) for each in rule["from"])):
            return True
    return False


def _is(peer: Object, source: Peer, home: str) -> bool:
    """A pod selector alone means pods of the policy's own namespace."""
    _only(peer, {"podSelector", "namespaceSelector"})
    if "namespaceSelector" in peer:
        inside = _matches(peer["namespaceSelector"], {NAMESPACE_NAME: source.namespace})
    else:
        inside = source.namespace == home
    return inside and _matches(peer.get("podSelector", {}), source.labels)


def _matches(selector: Object, labels: Mapping[str, str]) -> bool:
    _only(selector, {"matchLabels", "matchExpressions"})
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _only(part: Object, known: set[str]) -> None:
    assert set(part) <= known, f"not understood: {set(part) - known}"
