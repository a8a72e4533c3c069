"""Who may speak to the API server: certificates of the servers, tokens and kubeconfigs of the users.

Every cluster gets fresh keys and tokens, below `RUN` and readable by root alone.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

from tests.cluster import paths
from tests.cluster.processes import run

FOLDER: Final = paths.RUN / "pki"
DAYS: Final = "30"
ALTERNATIVES: Final = ",".join(
    [
        *(f"DNS:{name}" for name in ("kubernetes", "kubernetes.default", "kubernetes.default.svc")),
        f"IP:{paths.host_address('cp')}",
        f"IP:{paths.SERVICES}.1",  # what pods dial: the first service address
    ]
)
COMPONENTS: Final = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "dns": ("cluster-dns", "system:masters"),
    "storage": ("test-storage", "system:masters"),
}
"""File name → (user, group). DNS and storage are the harness's own parts and need no roles of their own."""


def make(nodes: int) -> None:
    """Writes the authority, the API server's certificate, the accounts' key, `tokens.csv` and the kubeconfigs."""
    FOLDER.mkdir(parents=True, mode=0o700)
    ca, key = FOLDER / "ca.crt", FOLDER / "ca.key"
    _openssl(
        "req",
        "-x509",
        "-newkey",
        "ec:" + str(_curve()),
        "-nodes",
        "-keyout",
        key,
        "-out",
        ca,
        "-subj",
        "/CN=fleetlm-test-ca",
        "-days",
        DAYS,
    )
    _openssl("genrsa", "-out", FOLDER / "accounts.key", "2048")
    request, extensions = FOLDER / "api.csr", FOLDER / "extensions"
    extensions.write_text(f"subjectAltName={ALTERNATIVES}\n")
    _openssl(
        "req",
        "-newkey",
        "ec:" + str(_curve()),
        "-nodes",
        "-keyout",
        FOLDER / "api.key",
        "-out",
        request,
        "-subj",
        "/CN=kube-apiserver",
    )
    signer = ("-CA", ca, "-CAkey", key, "-CAcreateserial")
    _openssl("x509", "-req", "-in", request, *signer, "-out", FOLDER / "api.crt", "-days", DAYS, "-extfile", extensions)
    users = COMPONENTS | {f"node{n}": (f"system:node:node{n}", "system:nodes") for n in range(1, nodes + 1)}
    tokens = {name: secrets.token_hex(16) for name in users}
    lines = [
        f"{tokens[name]},{user},{name}{f',{chr(34)}{group}{chr(34)}' if group else ''}"
        for name, (user, group) in users.items()
    ]
    (FOLDER / "tokens.csv").write_text("\n".join(lines) + "\n")
    for name, token in tokens.items():
        kubeconfig(name).write_text(json.dumps(_kubeconfig(token), indent=1))
        kubeconfig(name).chmod(0o600)


def kubeconfig(name: str) -> Path:
    """Where the kubeconfig of a user lies."""
    return paths.RUN / f"{name}.kubeconfig"


def _curve() -> Path:
    parameters = FOLDER / "p256.pem"
    if not parameters.exists():
        _openssl("ecparam", "-name", "prime256v1", "-out", parameters)
    return parameters


def _openssl(*arguments: object) -> None:
    run("openssl", *arguments)


def _kubeconfig(token: str) -> dict[str, object]:
    server = {"server": f"https://{paths.host_address('cp')}:6443", "certificate-authority": str(FOLDER / "ca.crt")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fleetlm-test",
        "clusters": [{"name": "fleetlm-test", "cluster": server}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "fleetlm-test", "context": {"cluster": "fleetlm-test", "user": "user"}}],
    }
