"""A storage provisioner: hostPath volumes made, grown and deleted as claims ask for it.

Runs as a process of the control plane host, `python -m tests.cluster.storage KUBECONFIG`. Level-triggered: each round
lists claims and volumes and does what is missing: it may be killed anywhere. All nodes share the machine's disk, so a
volume follows its pod to another node as a network volume would, and a frozen node's container goes on writing to it:
the test bed for fencing. Sizes are not enforced. Uses the standard library only.
"""

from __future__ import annotations

import json
import shutil
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from tests.cluster import paths
from tests.cluster.say import say

PROVISIONER: Final = "fleetlm.io/test-storage"
CLASSES: Final = frozenset({"standard", "fixed-size"})
VOLUMES: Final = paths.RUN / "volumes"
ROUND_S: Final = 0.25
"""Between two rounds; a claim is bound within about twice this."""
REQUEST_TIMEOUT_S: Final = 5.0

Json = dict[str, Any]


class Api:
    """The API server in three verbs, as the kubeconfig's user."""

    def __init__(self, config: Json) -> None:
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._server: str = cluster["server"]
        self._token: str = user["token"]
        self._trust = ssl.create_default_context(cafile=cluster["certificate-authority"])

    def call(self, verb: str, path: str, body: Json | None = None) -> Json:
        """One request; the answer's JSON."""
        kind = "application/merge-patch+json" if verb == "PATCH" else "application/json"
        asked = urllib.request.Request(
            self._server + path,
            method=verb,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": kind},
        )
        with urllib.request.urlopen(asked, timeout=REQUEST_TIMEOUT_S, context=self._trust) as answer:
            found: Json = json.load(answer)
        return found


def volume_of(claim: Json) -> Json:
    """The PersistentVolume that a claim gets."""
    meta = claim["metadata"]
    name = f"pvc-{meta['uid']}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        # By this annotation Kubernetes leaves the deletion to us.
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "capacity": {"storage": asked_size(claim)},
            "accessModes": claim["spec"]["accessModes"],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": claim["spec"]["storageClassName"],
            "hostPath": {"path": str(VOLUMES / name), "type": "Directory"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
        },
    }


def asked_size(claim: Json) -> str:
    """The size that a claim asks for, as a Kubernetes quantity."""
    return str(claim["spec"]["resources"]["requests"]["storage"])


def is_ours(claim: Json) -> bool:
    """Whether the claim's class is one of ours and it is not about to go."""
    return claim["spec"].get("storageClassName") in CLASSES and "deletionTimestamp" not in claim["metadata"]


def provide(api: Api, claim: Json) -> None:
    """Makes the folder and the volume of a claim that has none."""
    volume = volume_of(claim)
    folder = VOLUMES / volume["metadata"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # kubelet applies no fsGroup to hostPath
    api.call("POST", "/api/v1/persistentvolumes", volume)
    say(f"provided {folder.name} for {claim['metadata']['namespace']}/{claim['metadata']['name']}")


def grow(api: Api, claim: Json) -> None:
    """Gives a bound claim the size that it asks for by now; the API server has judged whether the class allows it."""
    size, meta = asked_size(claim), claim["metadata"]
    api.call(
        "PATCH", f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}", {"spec": {"capacity": {"storage": size}}}
    )
    path = f"/api/v1/namespaces/{meta['namespace']}/persistentvolumeclaims/{meta['name']}/status"
    api.call("PATCH", path, {"status": {"capacity": {"storage": size}, "conditions": []}})
    say(f"grew {meta['namespace']}/{meta['name']} to {size}")


def take_back(api: Api, volume: Json) -> None:
    """Deletes a released volume and its folder."""
    name = volume["metadata"]["name"]
    shutil.rmtree(VOLUMES / name, ignore_errors=True)
    api.call("DELETE", f"/api/v1/persistentvolumes/{name}")
    say(f"took back {name}")


def one_round(api: Api) -> None:
    """Does everything that is missing now."""
    volumes: dict[str, Json] = {v["metadata"]["name"]: v for v in api.call("GET", "/api/v1/persistentvolumes")["items"]}
    for claim in api.call("GET", "/api/v1/persistentvolumeclaims")["items"]:
        if not is_ours(claim):
            continue
        if f"pvc-{claim['metadata']['uid']}" not in volumes and not claim["spec"].get("volumeName"):
            provide(api, claim)
        elif claim["status"].get("phase") == "Bound" and claim["status"]["capacity"]["storage"] != asked_size(claim):
            grow(api, claim)
    for volume in volumes.values():
        mine = volume["spec"].get("storageClassName") in CLASSES and "deletionTimestamp" not in volume["metadata"]
        if mine and volume["status"]["phase"] == "Released":
            take_back(api, volume)


def main(kubeconfig: str) -> None:
    """Rounds without end; an API server that is away is waited for."""
    api = Api(json.loads(Path(kubeconfig).read_text()))
    never = threading.Event()
    while not never.wait(ROUND_S):
        try:
            one_round(api)
        except (OSError, urllib.error.URLError) as error:
            say(f"round failed: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
