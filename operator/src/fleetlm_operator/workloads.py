"""Spec → StatefulSet of the shards and Deployment of the gateways. Pure.

Promise: the same ring, images and rendering give the same bytes in every version of the operator, so that upgrading the
operator rolls no shard: what changes a pod's template is a new *rendering*, used by rings whose spec changes, while a
ring at rest keeps the one it has (a golden test holds each). Must not be done here: deciding which rendering or size of
claim applies (`ringplan.py`).
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import (
    CLIENT_PORT,
    CREDENTIAL_KEY,
    CREDENTIAL_MOUNT,
    DATA_CLAIM,
    DATA_FOLDER,
    DATA_MOUNT,
    GATEWAY_OPS_PORT,
    SHARD_OPS_PORT,
    SHARD_PORT,
    control_url,
    credential_secret,
    gateway_workload,
    ring_labels,
    selector,
    shard_service,
    shard_workload,
)
from fleetlm_operator.quantity import bytes_of
from fleetlm_operator.ringspec import Archive, Images, Resources, Ring, Scheduling

TEMPLATE_LABEL: Final = "fleetlm.io/template"
"""On pods: which template they were made from; a pod with another value than its StatefulSet's is outdated."""
RENDERING: Final = 2
"""The newest rendering of pod templates. 2: shards hand their slots over when they are asked to end."""
RENDERINGS: Final = frozenset({1, 2})
"""Every rendering that some ring may still run."""
ARCHIVE_MOUNT: Final = "/etc/fleetlm/archive"
"""Where the Secret of the archive is; the documentation of `secretRef` names it."""
USER_ID: Final = 65532
"""Who processes run as; the images know the same number."""
GATEWAY_END_S: Final = 12
"""A gateway's longest way to the end after its drain window (docs/operations/configuration.md)."""
PRE_STOP_S: Final = 5
"""A gateway goes on for so long after it was asked to end: until no Service sends anybody to it any more."""
CHECKPOINT_S: Final = 25
"""Of a shard's grace period: for its checkpoint and what goes more slowly than it should (a rule of the schema)."""
GRACE_MARGIN_S: Final = 8
"""What is left of a grace period when everything went as slowly as it may."""


def stateful_set(ring: Ring, images: Images, *, replicas: int, claim_size: str, rendering: int) -> Object:
    """The shards.

    Args:
        ring: what is asked for.
        images: what to run.
        replicas: how many pods; not always what is asked for.
        claim_size: size in the claim template, which cannot change in place.
        rendering: which of `RENDERINGS`.
    """
    assert rendering in RENDERINGS
    labels = ring_labels(ring.name, "shard")
    match = selector(ring.name, "shard")
    template = _template(ring, labels, _shard_pod(ring, images, rendering))
    claim: Object = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": DATA_CLAIM, "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": claim_size}}},
    }
    if ring.spec.storage.class_name:
        claim["spec"]["storageClassName"] = ring.spec.storage.class_name
    retention = ring.spec.volume_retention
    return {
        "metadata": {"name": shard_workload(ring.name), "labels": labels},
        "spec": {
            "replicas": replicas,
            "serviceName": shard_service(ring.name),
            "selector": {"matchLabels": match},
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 2,
            "persistentVolumeClaimRetentionPolicy": {
                "whenDeleted": retention.when_deleted,
                "whenScaled": retention.when_scaled,
            },
            "template": template,
            "volumeClaimTemplates": [claim],
        },
    }


def deployment(ring: Ring, images: Images) -> Object:
    """The gateways."""
    labels = ring_labels(ring.name, "gateway")
    return {
        "metadata": {"name": gateway_workload(ring.name), "labels": labels},
        "spec": {
            "replicas": ring.spec.gateway.replicas,
            "selector": {"matchLabels": selector(ring.name, "gateway")},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": ring.spec.update.progress_deadline_seconds,
            "template": _template(ring, labels, _gateway_pod(ring, images)),
        },
    }


def digest(value: object) -> str:
    """A short name of what was rendered; equal for equal content."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]


def _template(ring: Ring, labels: dict[str, str], pod: Object) -> Object:
    pod = {key: value for key, value in pod.items() if value}
    if ring.spec.image.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in ring.spec.image.pull_secrets]
    # Labels that every pod of the ring has for ever are no part of the digest: they are its selector's business.
    return {"metadata": {"labels": labels | {TEMPLATE_LABEL: digest(pod)}}, "spec": pod}


def _shard_pod(ring: Ring, images: Images, rendering: int) -> Object:
    spec = ring.spec
    settings = {
        "NAME": "shard-$(POD_INDEX)",
        "DATA": DATA_FOLDER,
        "LISTEN": f"0.0.0.0:{SHARD_PORT}",
        "OPS_LISTEN": f"0.0.0.0:{SHARD_OPS_PORT}",
        "CONTROL": control_url(ring.namespace, ring.name),
        "CREDENTIAL_FILE": f"{CREDENTIAL_MOUNT}/{CREDENTIAL_KEY}",
        "ADVERTISE_HOST": "$(POD_IP)",
        "POD_UID": "$(POD_UID)",
        "FSYNC": spec.log.fsync,
        "FSYNC_INTERVAL_MS": str(spec.log.fsync_interval_milliseconds),
        "SEGMENT_BYTES": str(bytes_of(spec.log.segment_size)),
        "HOT_BYTES_MAX": str(bytes_of(spec.hot.max_bytes)),
        "KEYS_WINDOW_S": str(spec.idempotency.window_seconds),
        "KEYS_MAX": str(spec.idempotency.max_keys),
        "RETENTION_BYTES": str(bytes_of(spec.retention.max_bytes)),
        "RETENTION_AGE_S": str(spec.retention.max_age_seconds),
        "DRAIN_S": str(spec.drain.timeout_seconds),
        "LOG_LEVEL": spec.log_level,
        "LOG_STYLE": "json",
    }
    if rendering >= 2:
        drain = spec.drain
        settings["HANDOVER_S"] = str(drain.termination_grace_period_seconds - drain.timeout_seconds - CHECKPOINT_S)
    container = _container(
        "shard",
        image=images.shard,
        pull_policy=spec.image.pull_policy,
        settings=settings,
        fields={
            "POD_INDEX": "metadata.labels['apps.kubernetes.io/pod-index']",
            "POD_IP": "status.podIP",
            "POD_UID": "metadata.uid",
        },
        ports={"shard": SHARD_PORT, "ops": SHARD_OPS_PORT},
        resources=spec.resources,
    )
    container["volumeMounts"].append({"name": DATA_CLAIM, "mountPath": DATA_MOUNT})
    pod = _pod(
        ring,
        "shard",
        container,
        scheduling=spec.scheduling,
        grace_s=spec.drain.termination_grace_period_seconds,
    )
    if spec.archive is not None:
        _add_archive(pod, spec.archive)
    return pod


def _add_archive(pod: Object, archive: Archive) -> None:
    """Mount the Secret with the URL. A pod starts without it, too: a Secret that is lost costs the archive only."""
    container = pod["containers"][0]
    prefix = f"FLEETLM_{container['name'].upper()}_ARCHIVE_"
    container["env"].append({"name": f"{prefix}URL_FILE", "value": f"{ARCHIVE_MOUNT}/{archive.secret_ref.key}"})
    if archive.max_age_seconds:
        container["env"].append({"name": f"{prefix}RETENTION_S", "value": str(archive.max_age_seconds)})
    container["volumeMounts"].append({"name": "archive", "mountPath": ARCHIVE_MOUNT, "readOnly": True})
    secret = {"secretName": archive.secret_ref.name, "defaultMode": 0o440, "optional": True}
    pod["volumes"].append({"name": "archive", "secret": secret})


def _gateway_pod(ring: Ring, images: Images) -> Object:
    spec = ring.spec.gateway
    settings = {
        "NAME": "$(POD_NAME)",
        "LISTEN": f"0.0.0.0:{CLIENT_PORT}",
        "OPS_LISTEN": f"0.0.0.0:{GATEWAY_OPS_PORT}",
        "CONTROL": control_url(ring.namespace, ring.name),
        "CREDENTIAL_FILE": f"{CREDENTIAL_MOUNT}/{CREDENTIAL_KEY}",
        "ORIGINS": ",".join(spec.origins),
        "SOCKETS": str(spec.sockets),
        "DRAIN_WINDOW_MS": str(spec.drain_window_seconds * 1000),
        "LOG_LEVEL": ring.spec.log_level,
        "LOG_STYLE": "json",
    }
    container = _container(
        "gateway",
        image=images.gateway,
        pull_policy=ring.spec.image.pull_policy,
        settings=settings,
        fields={"POD_NAME": "metadata.name"},
        ports={"client": CLIENT_PORT, "ops": GATEWAY_OPS_PORT},
        resources=spec.resources,
    )
    container["lifecycle"] = {"preStop": {"sleep": {"seconds": PRE_STOP_S}}}
    grace_s = PRE_STOP_S + spec.drain_window_seconds + GATEWAY_END_S + GRACE_MARGIN_S
    return _pod(ring, "gateway", container, scheduling=spec.scheduling, grace_s=grace_s)


def _container(
    name: str,
    *,
    image: str,
    pull_policy: str,
    settings: dict[str, str],
    fields: dict[str, str],
    ports: dict[str, int],
    resources: Resources,
) -> Object:
    """The one container of a pod; `settings` are variables of the component, `fields` what the pod says of itself."""
    prefix = f"FLEETLM_{name.upper()}_"
    own: list[Object] = [
        {"name": variable, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
        for variable, path in fields.items()
    ]
    told: list[Object] = [{"name": prefix + key, "value": value} for key, value in settings.items() if value]
    asked = {
        kind: {resource: str(amount) for resource, amount in amounts.items()}
        for kind, amounts in (("requests", resources.requests), ("limits", resources.limits))
        if amounts
    }
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": pull_policy,
        "env": own + told,  # variables that are referred to come first: Kubernetes expands in order
        "ports": [{"name": port, "containerPort": number, "protocol": "TCP"} for port, number in ports.items()],
        **({"resources": asked} if asked else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "livenessProbe": _probe("/health/live", period_s=10, failures=6),
        "readinessProbe": _probe("/health/ready", period_s=2, failures=2),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "credential", "mountPath": CREDENTIAL_MOUNT, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of the container's own
        ],
    }


def _probe(path: str, *, period_s: int, failures: int) -> Object:
    """Liveness is patient: it ends a process that hangs, never one that is busy."""
    return {
        "httpGet": {"path": path, "port": "ops", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": 5 if failures > 2 else 2,
    }


def _pod(ring: Ring, component: str, container: Object, *, scheduling: Scheduling, grace_s: int) -> dict[str, Any]:
    match = selector(ring.name, component)
    secret = credential_secret(ring.name)
    return {
        "serviceAccountName": f"{ring.name}-{component}",
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "credential", "secret": {"secretName": secret, "defaultMode": 0o440}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
        "nodeSelector": scheduling.node_selector,
        "tolerations": list(scheduling.tolerations),
        "priorityClassName": scheduling.priority_class_name,
        "topologySpreadConstraints": [
            {
                "topologyKey": each.topology_key,
                "maxSkew": each.max_skew,
                "whenUnsatisfiable": each.when_unsatisfiable,
                "labelSelector": {"matchLabels": match},
            }
            for each in scheduling.spread
        ],
    }
