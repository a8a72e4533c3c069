"""Builds the programs of the cluster from Go modules: Kubernetes, etcd, CoreDNS, Helm 3 and 4.

`go/<name>/go.mod` and `go.sum` fix every version and checksum, so two machines build the same programs and an upgrade
is a change that a reviewer sees. A program whose module files are unchanged since it was built is not built again:
beside it lies the digest of those files. Only the Go module registry is asked, never a download page.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster import paths
from tests.cluster.say import ClusterError, Step

GO_PLACES: Final = ("go", "/usr/local/go/bin/go", "/usr/lib/go/bin/go")
BUILD_TIMEOUT_S: Final = 3600.0
"""The API server takes three minutes of two idle cores from an empty cache; a busy machine several times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One program: its name on disk, the folder below `go/` that fixes its version, the package that is its main."""

    name: str
    module: str
    package: str
    flags: str = "-s -w"


def _kubernetes() -> tuple[Program, ...]:
    version = "k8s.io/component-base/version"
    major, minor, _ = paths.KUBERNETES.removeprefix("v").split(".")
    flags = (
        f"-s -w -X {version}.gitVersion={paths.KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
    )
    names = ("kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
    return tuple(Program(name=n, module="kubernetes", package=f"k8s.io/kubernetes/cmd/{n}", flags=flags) for n in names)


PROGRAMS: Final = (
    Program(name="pause", module="pause", package="."),
    Program(name="etcd", module="etcd", package="go.etcd.io/etcd/server/v3"),
    *_kubernetes(),
    Program(name="coredns", module="coredns", package="github.com/coredns/coredns"),
    Program(name="helm", module="helm4", package="helm.sh/helm/v4/cmd/helm"),
    Program(name="helm3", module="helm3", package="helm.sh/helm/v3/cmd/helm"),
)
"""In the order in which they are built. `helm` is version 4, `helm3` the one that many installations still run."""


def digest(program: Program) -> str:
    """What decides whether `program` must be built anew: its module files and its flags, as a hex digest."""
    folder = paths.HERE / "go" / program.module
    hasher = hashlib.sha256()
    for name in ("go.mod", "go.sum", "main.go"):
        if (folder / name).exists():
            hasher.update((folder / name).read_bytes())
    hasher.update(f"{program.package} {program.flags}".encode())
    return hasher.hexdigest()


def missing(folder: Path = paths.BINARIES) -> list[Program]:
    """The programs that `folder` lacks, or has from other module files."""
    return [p for p in PROGRAMS if not _is_built(folder, p)]


def build(programs: Sequence[Program] = PROGRAMS, folder: Path = paths.BINARIES) -> None:
    """Builds into `folder` what is missing of `programs`, and says how long each took.

    Raises:
        ClusterError: no usable Go, or a build that failed, with its output.
    """
    if not _wanted(programs, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, program in enumerate(programs, 1):
        # One builder a program: processes of one test run that need it wait for the first, others build other programs.
        with (folder / f".{program.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _wanted([program], folder):
                with Step(f"build {program.name} ({number} of {len(programs)})"):
                    _build_one(_go(), folder, program)


def _wanted(programs: Sequence[Program], folder: Path) -> list[Program]:
    return [program for program in missing(folder) if program in programs]


def _is_built(folder: Path, program: Program) -> bool:
    stamp = folder / f".{program.name}.digest"
    return (folder / program.name).exists() and stamp.exists() and stamp.read_text() == digest(program)


def _build_one(go: str, folder: Path, program: Program) -> None:
    target = folder / f".{program.name}.new"
    command = [go, "build", "-trimpath", "-ldflags", program.flags, "-o", str(target), program.package]
    # GOTOOLCHAIN: a module that asks for another Go must fail here and not download a toolchain.
    env = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false -mod=readonly"}
    done = subprocess.run(
        command,
        cwd=paths.HERE / "go" / program.module,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_TIMEOUT_S,
    )
    if done.returncode:
        raise ClusterError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    target.replace(folder / program.name)
    # Written last: a build that was killed between the two lines is built again, never trusted.
    (folder / f".{program.name}.digest").write_text(digest(program))


def _go() -> str:
    tried: list[str] = []
    for place in GO_PLACES:
        found = shutil.which(place)
        if found is None:
            continue
        said = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout.strip()
        if said.removeprefix("go").startswith("1.26"):
            return found
        tried.append(f"{found} is {said}")
    raise ClusterError(
        f"Kubernetes {paths.KUBERNETES} needs Go 1.26 on the PATH or in /usr/local/go ({tried or 'none found'})"
    )
