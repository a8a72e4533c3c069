"""The control plane host: etcd, API server, controller manager, scheduler, DNS and the storage provisioner."""

from __future__ import annotations

import json
import sys
from typing import Final

from tests.cluster import identities, paths, processes
from tests.cluster.identities import kubeconfig
from tests.cluster.say import Step
from tests.cluster.waiting import until

READY_TIMEOUT_S: Final = 120.0
NODE_GRACE: Final = "20s"
"""A node that stopped speaking is NotReady after this: short, so that tests of dead nodes are."""


def binary(name: str) -> str:
    """The path of a built program."""
    return str(paths.BINARIES / name)


def kubectl(*arguments: object, stdin: str | None = None, timeout_s: float = 120.0) -> str:
    """Runs kubectl as the administrator, in the client's network."""
    return processes.run(
        binary("kubectl"), "--kubeconfig", paths.KUBECONFIG, *arguments, host="client", stdin=stdin, timeout_s=timeout_s
    )


def api_ready() -> bool:
    """Whether the API server says so itself."""
    return kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"


def start() -> None:
    """Starts everything; returns when the API server answers."""
    with Step("control plane"):
        _start_storage_of_objects()
        _start_api_server()
        watched = ("etcd", "kube-apiserver")
        until("API server ready", api_ready, timeout_s=READY_TIMEOUT_S, watch=lambda: processes.must_live(*watched))
        _start_controllers()
        _start_dns()
        processes.start("storage", "cp", sys.executable, "-m", "tests.cluster.storage", str(kubeconfig("storage")))
        kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects()}))


def _start_storage_of_objects() -> None:
    # Without fsync: a power cut would lose the test cluster's objects, and nobody tests etcd's disk here.
    processes.start(
        "etcd", "cp", binary("etcd"), "--data-dir", paths.RUN / "etcd", "--unsafe-no-fsync", "--log-level", "warn"
    )


def _start_api_server() -> None:
    pki, address = identities.FOLDER, paths.host_address("cp")
    processes.start(
        "kube-apiserver",
        "cp",
        binary("kube-apiserver"),
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={address}",
        f"--bind-address={address}",
        "--secure-port=6443",
        f"--service-cluster-ip-range={paths.SERVICES}.0/24",
        f"--token-auth-file={pki}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/api.crt",
        f"--tls-private-key-file={pki}/api.key",
        f"--service-account-key-file={pki}/accounts.key",
        f"--service-account-signing-key-file={pki}/accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--kubelet-preferred-address-types=InternalIP",  # else exec and logs look for the node's name in DNS
        "--enable-aggregator-routing=true",  # webhooks are dialled at pod addresses: there is no kube-proxy here
        "--allow-privileged=true",
        "--event-ttl=30m",
    )


def _start_controllers() -> None:
    pki = identities.FOLDER
    processes.start(
        "kube-controller-manager",
        "cp",
        binary("kube-controller-manager"),
        f"--kubeconfig={kubeconfig('controller-manager')}",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={pki}/accounts.key",
        f"--root-ca-file={pki}/ca.crt",
        "--leader-elect=false",
        f"--node-monitor-grace-period={NODE_GRACE}",
    )
    processes.start(
        "kube-scheduler",
        "cp",
        binary("kube-scheduler"),
        f"--kubeconfig={kubeconfig('scheduler')}",
        "--leader-elect=false",
    )


def _start_dns() -> None:
    corefile = paths.RUN / "Corefile"
    corefile.write_text(
        ".:53 {\n errors\n kubernetes cluster.local {\n"
        f"  kubeconfig {kubeconfig('dns')} fleetlm-test\n  ttl 2\n }}\n}}\n"
    )
    processes.start("coredns", "cp", binary("coredns"), "-conf", corefile)


def objects() -> list[dict[str, object]]:
    """What a cluster has besides its programs: the DNS service, pointed to this host, and two storage classes."""
    ports = [{"name": "udp", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53, "protocol": "TCP"}]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": f"{paths.SERVICES}.10", "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns-host",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [paths.host_address("cp")], "conditions": {"ready": True}}],
            "ports": ports,
        },
        _storage_class("standard", grows=True, default=True),
        _storage_class("fixed-size", grows=False, default=False),
    ]


def _storage_class(name: str, *, grows: bool, default: bool) -> dict[str, object]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": name,
            "annotations": {"storageclass.kubernetes.io/is-default-class": str(default).lower()},
        },
        "provisioner": "fleetlm.io/test-storage",
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
        "allowVolumeExpansion": grows,
    }
