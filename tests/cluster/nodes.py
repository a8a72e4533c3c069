"""The nodes: containerd, kubelet and kube-proxy, each node with folders, sockets, cgroups and pods of its own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.cluster import cgroups, kind, paths, pause, processes
from tests.cluster.controlplane import binary
from tests.cluster.identities import kubeconfig
from tests.cluster.say import Step
from tests.cluster.waiting import until

READY_TIMEOUT_S: Final = 60.0
IMPORT_TIMEOUT_S: Final = 300.0
PODS_MAX: Final = 100
RESTART_S_MAX: Final = 2
"""A container that ended more than once waits no longer than this for its next start. Kubernetes' own is 10 s, doubled
with each end up to 300: who kills one again and again would measure that."""


def folder(node: str) -> Path:
    """Where everything of a node lies."""
    return paths.RUN / node


def ctr(node: str, *arguments: object, timeout_s: float = 60.0) -> str:
    """Runs containerd's own client against a node's containerd, in the namespace that kubelet uses."""
    return processes.run(*ctr_line(node, *arguments), timeout_s=timeout_s)


def ctr_line(node: str, *arguments: object) -> list[str]:
    """The command line of that."""
    if kind.asked():
        return kind.ctr_line(node, *arguments)
    return ["ctr", "-a", str(folder(node) / "containerd.sock"), "-n", "k8s.io", *map(str, arguments)]


def start(number: int, archives: list[Path]) -> None:
    """Starts node `number` with the images of `archives`."""
    node = f"node{number}"
    for name in ("containerd", "cni", "kubelet", "logs"):
        (folder(node) / name).mkdir(parents=True)
    cgroups.make(node)
    _start_containerd(node, number)
    for archive in [pause.archive(), *archives]:
        load(node, archive)
    _start_kubelet(node)
    _start_proxy(node)


def start_all(count: int, archives: list[Path]) -> None:
    """Starts nodes 1 … `count` at once."""
    with Step(f"{count} nodes"), ThreadPoolExecutor(count) as pool:
        for begun in [pool.submit(start, number, archives) for number in range(1, count + 1)]:
            begun.result()


def load(node: str, archive: Path) -> None:
    """Imports an image archive into a node; what it has already is not copied again."""
    ctr(node, "images", "import", archive, timeout_s=IMPORT_TIMEOUT_S)


def _start_containerd(node: str, number: int) -> None:
    place = folder(node)
    (place / "cni" / "10-pods.conflist").write_text(json.dumps(_cni(place, number)))
    (place / "containerd.toml").write_text(_containerd_toml(place))
    name = f"containerd-{node}"
    processes.start(name, node, "containerd", "-c", place / "containerd.toml")
    until(
        f"{name} answers",
        lambda: bool(ctr(node, "version")),
        timeout_s=READY_TIMEOUT_S,
        watch=lambda: processes.must_live(name),
    )


def _cni(place: Path, number: int) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "dataDir": str(place / "addresses"),
        "ranges": [[{"subnet": paths.pod_subnet(number)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]}


def _containerd_toml(place: Path) -> str:
    # restrict_oom_score_adj: without it every sandbox dies where even root may not lower the score.
    # netns_mounts_under_state_dir: pods' network namespaces lie in our folder, so that `down` finds them and no others.
    return f"""version = 2
root = "{place}/containerd/root"
state = "{place}/containerd/state"
[grpc]
  address = "{place}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  sandbox_image = "{pause.IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{place}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


def _start_kubelet(node: str) -> None:
    place = folder(node)
    (place / "kubelet.json").write_text(json.dumps(_kubelet(node, place)))
    processes.start(
        f"kubelet-{node}",
        node,
        binary("kubelet"),
        f"--config={place / 'kubelet.json'}",
        f"--kubeconfig={kubeconfig(node)}",
        f"--root-dir={place / 'kubelet'}",
        f"--cert-dir={place / 'kubelet' / 'pki'}",
        f"--hostname-override={node}",
        f"--node-ip={paths.host_address(node)}",
    )


def _kubelet(node: str, place: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{place}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{paths.PREFIX}{node}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "podLogsDir": str(place / "logs"),
        "clusterDNS": [f"{paths.SERVICES}.10"],
        "clusterDomain": "cluster.local",
        "resolvConf": "/dev/null",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},  # reachable in these namespaces only
        "imageGCHighThresholdPercent": 100,  # images come from archives: one that is collected is gone
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "nodeStatusUpdateFrequency": "4s",
        "crashLoopBackOff": {"maxContainerRestartPeriod": f"{RESTART_S_MAX}s"},
        "maxPods": PODS_MAX,
        "serializeImagePulls": False,
    }


def _start_proxy(node: str) -> None:
    place = folder(node)
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": node,
        "clusterCIDR": f"{paths.PODS}.0.0/16",
        "clientConnection": {"kubeconfig": str(kubeconfig("proxy"))},
        # Zeros: these kernel settings belong to the whole machine and are left as they are.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    (place / "proxy.json").write_text(json.dumps(config))
    processes.start(f"kube-proxy-{node}", node, binary("kube-proxy"), f"--config={place / 'proxy.json'}")
