"""Spec → everything else that a ring has: services, budgets, accounts, policies, leases. Pure.

Promise: each child says whose it is by labels and, unless it must outlive the ring, by an owner reference, so that
deletion is the API server's garbage collection and waits for nobody. Must not be done here: secrets (`credential` only
names the empty one), the StatefulSet and the Deployment (`workloads.py`).
"""

from __future__ import annotations

from typing import Final

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import (
    CLIENT_PORT,
    GATEWAY_OPS_PORT,
    GROUP,
    LEASES,
    RING_MAPS,
    SHARD_OPS_PORT,
    SHARD_PORT,
    SHARD_RINGS,
    credential_secret,
    gateway_workload,
    ring_labels,
    selector,
    shard_pod,
    shard_service,
    shard_workload,
)
from fleetlm_operator.resources import (
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Child,
)
from fleetlm_operator.ringspec import Ring
from fleetlm_operator.workloads import digest

APPLIED_ANNOTATION: Final = "fleetlm.io/applied"
"""Digest of what the operator applied last: shows when a field that was asked for is no longer."""
NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"


def finished(child: Child, ring: Ring, *, outlives: bool = False) -> Child:
    """The child with kind, namespace, owner and digest; `outlives` the ring: it has no owner."""
    body: Object = {"apiVersion": child.resource.api, "kind": child.resource.kind, **child.body}
    metadata: Object = {**body["metadata"], "namespace": ring.namespace}
    if not outlives and ring.spec.deletion_policy == "Delete":
        metadata["ownerReferences"] = [owner_reference(ring)]
    body["metadata"] = metadata
    annotations = {**metadata.get("annotations", {}), APPLIED_ANNOTATION: digest(body)}
    body["metadata"] = {**metadata, "annotations": annotations}
    return Child(child.resource, body)


def owner_reference(ring: Ring) -> Object:
    """The ring as the owner that takes the child with it."""
    return {
        "apiVersion": SHARD_RINGS.api,
        "kind": SHARD_RINGS.kind,
        "name": ring.name,
        "uid": ring.uid,
        "controller": True,
    }


def furniture(ring: Ring, *, shards: int, operator_namespace: str) -> list[Child]:
    """Everything that is applied whatever state the ring is in; `shards` leases of announcements."""
    return [
        *_services(ring),
        *_budgets(ring),
        *_access(ring, shards),
        *(_policies(ring, operator_namespace) if ring.spec.network_policy.enabled else []),
        *(_lease(ring, number) for number in range(shards)),
    ]


def unwanted_policies(ring: Ring) -> list[str]:
    """Names of the NetworkPolicies that must not be there."""
    return [] if ring.spec.network_policy.enabled else [shard_workload(ring.name), gateway_workload(ring.name)]


def credential(ring: Ring) -> Child:
    """The Secret without its content: what makes it puts that in, once."""
    return Child(SECRETS, {"metadata": {"name": credential_secret(ring.name), "labels": ring_labels(ring.name)}})


def ring_map(ring: Ring) -> Child:
    """The RingMap without its content."""
    return Child(RING_MAPS, {"metadata": {"name": ring.name, "labels": ring_labels(ring.name)}})


def _lease(ring: Ring, ordinal: int) -> Child:
    """Where a shard announces itself; the annotation is the shard's."""
    return Child(
        LEASES, {"metadata": {"name": shard_pod(ring.name, ordinal), "labels": ring_labels(ring.name, "shard")}}
    )


def _services(ring: Ring) -> list[Child]:
    service = ring.spec.gateway.service
    headless: Object = {
        "metadata": {"name": shard_service(ring.name), "labels": ring_labels(ring.name, "shard")},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(ring.name, "shard"),
            "ports": [_port("shard", SHARD_PORT), _port("ops", SHARD_OPS_PORT)],
        },
    }
    metadata: Object = {"name": gateway_workload(ring.name), "labels": ring_labels(ring.name, "gateway")}
    if service.annotations:
        metadata["annotations"] = service.annotations
    clients: Object = {
        "metadata": metadata,
        "spec": {
            "type": service.type,
            "selector": selector(ring.name, "gateway"),
            "ports": [_port("client", CLIENT_PORT)],
        },
    }
    if service.load_balancer_class and service.type == "LoadBalancer":
        clients["spec"]["loadBalancerClass"] = service.load_balancer_class
    return [Child(SERVICES, headless), Child(SERVICES, clients)]


def _port(name: str, number: int) -> Object:
    return {"name": name, "port": number, "protocol": "TCP", "targetPort": name}


def _budgets(ring: Ring) -> list[Child]:
    """One pod of each kind at a time; a pod that is not ready protects nothing and may always go."""
    return [
        Child(
            DISRUPTION_BUDGETS,
            {
                "metadata": {"name": f"{ring.name}-{component}", "labels": ring_labels(ring.name, component)},
                "spec": {
                    "maxUnavailable": 1,
                    "unhealthyPodEvictionPolicy": "AlwaysAllow",
                    "selector": {"matchLabels": selector(ring.name, component)},
                },
            },
        )
        for component in ("shard", "gateway")
    ]


def _access(ring: Ring, shards: int) -> list[Child]:
    """What shards and gateways may ask the API server: read the map and the announcements; a shard writes its own."""
    read: list[Object] = [
        {
            "apiGroups": [GROUP],
            "resources": ["ringmaps"],
            "resourceNames": [ring.name],
            "verbs": ["get", "list", "watch"],
        },
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "watch"]},
    ]
    announce: Object = {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": [shard_pod(ring.name, number) for number in range(shards)],
        "verbs": ["patch"],
    }
    rules = {"shard": [*read, announce], "gateway": read}
    children: list[Child] = []
    for component, allowed in rules.items():
        name = f"{ring.name}-{component}"
        metadata: Object = {"name": name, "labels": ring_labels(ring.name, component)}
        account = {"kind": "ServiceAccount", "name": name, "namespace": ring.namespace}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        children += [
            Child(SERVICE_ACCOUNTS, {"metadata": metadata}),
            Child(ROLES, {"metadata": metadata, "rules": allowed}),
            Child(ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [account]}),
        ]
    return children


def _policies(ring: Ring, operator_namespace: str) -> list[Child]:
    """Shards hear their ring's gateways and each other; operations ports hear this namespace and those that may."""
    namespaces = sorted({operator_namespace, *ring.spec.network_policy.ops_namespaces})
    watchers: list[Object] = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchExpressions": [{"key": NAMESPACE_LABEL, "operator": "In", "values": namespaces}]}},
    ]
    peers: list[Object] = [
        {"podSelector": {"matchLabels": selector(ring.name, component)}} for component in ("gateway", "shard")
    ]
    ingress: dict[str, list[Object]] = {
        "shard": [
            {"from": peers, "ports": [{"port": SHARD_PORT, "protocol": "TCP"}]},
            {"from": watchers, "ports": [{"port": SHARD_OPS_PORT, "protocol": "TCP"}]},
        ],
        "gateway": [
            {"ports": [{"port": CLIENT_PORT, "protocol": "TCP"}]},
            {"from": watchers, "ports": [{"port": GATEWAY_OPS_PORT, "protocol": "TCP"}]},
        ],
    }
    return [
        Child(
            NETWORK_POLICIES,
            {
                "metadata": {"name": f"{ring.name}-{component}", "labels": ring_labels(ring.name, component)},
                "spec": {
                    "podSelector": {"matchLabels": selector(ring.name, component)},
                    "policyTypes": ["Ingress"],
                    "ingress": rules,
                },
            },
        )
        for component, rules in ingress.items()
    ]
