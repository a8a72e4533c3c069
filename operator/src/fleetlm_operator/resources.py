"""The kinds of objects that the operator makes or looks at, besides FleetLM's own. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import Resource

STATEFUL_SETS: Final = Resource("apps/v1", "StatefulSet", "statefulsets")
DEPLOYMENTS: Final = Resource("apps/v1", "Deployment", "deployments")
PODS: Final = Resource("v1", "Pod", "pods")
NODES: Final = Resource("v1", "Node", "nodes")
CLAIMS: Final = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
SERVICES: Final = Resource("v1", "Service", "services")
SECRETS: Final = Resource("v1", "Secret", "secrets")
SERVICE_ACCOUNTS: Final = Resource("v1", "ServiceAccount", "serviceaccounts")
EVENTS: Final = Resource("v1", "Event", "events")
ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "Role", "roles")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
DISRUPTION_BUDGETS: Final = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES: Final = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")


class Child(NamedTuple):
    """An object that a ring should have."""

    resource: Resource
    body: Object

    @property
    def name(self) -> str:
        """Its name."""
        name: str = self.body["metadata"]["name"]
        return name

    @property
    def key(self) -> str:
        """Kind and name, for people and as a key: `Service demo-gateway`."""
        return f"{self.resource.kind} {self.name}"
