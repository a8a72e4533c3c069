"""Builds the images of `images/Dockerfile` and saves them as one archive: `python -m tests.cluster.images`.

With a Docker engine Docker builds, from `python:3.11-slim-bookworm`. Without one buildah does, on a Debian 12 made by
debootstrap, for where this was written no image registry is reached; the Dockerfile is the same. Versions of
dependencies are those of uv.lock. An archive whose sources have not changed is not built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from tests.cluster import paths
from tests.cluster.processes import run
from tests.cluster.say import ClusterError, Step, say

TARGETS: Final = ("shard", "gateway", "operator", "cli")
MEMBERS: Final = ("common", "shard", "gateway", "operator", "client", "cli")
BUILD_TIMEOUT_S: Final = 1800.0
BASE: Final = "localhost/fleetlm-base:bookworm"
PLATFORMS: Final = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_31", "manylinux_2_34")
"""Wheels that Debian 12's C library runs, whatever machine downloads them."""
TRIMMED: Final = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache/apt",
    "var/lib/apt/lists",
)
ARCHIVES_KEPT: Final = 3


def version() -> str:
    """The product's version, which is the images' tag."""
    found: str = tomllib.loads((paths.ROOT / "common" / "pyproject.toml").read_text())["project"]["version"]
    return found


def name(target: str) -> str:
    """An image's whole name."""
    return f"{paths.REGISTRY}/fleetlm-{target}:{version()}"


def archive() -> Path:
    """Builds what has changed and returns the archive of all images.

    Raises:
        ClusterError: neither Docker nor buildah, or a build that failed.
    """
    target = paths.IMAGES / f"fleetlm-{version()}-{_digest()}.tar"
    if target.exists():
        os.utime(target)
        return target
    paths.IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fleetlm-images-") as scratch:
        context = Path(scratch) / "context"
        with Step("wheels"):
            _wheels(context / "wheels")
        made = Path(scratch) / "images.tar"
        if _has_docker():
            _by_docker(context, made)
        else:
            _by_buildah(context, made)
        shutil.move(made, target)
    for old in sorted(paths.IMAGES.glob("fleetlm-*.tar"), key=lambda path: -path.stat().st_mtime)[ARCHIVES_KEPT:]:
        old.unlink()
    return target


def _digest() -> str:
    """What the images are made of, in 16 hex digits."""
    hasher = hashlib.sha256()
    files = [paths.ROOT / "uv.lock", paths.ROOT / "images" / "Dockerfile"]
    for member in MEMBERS:
        files.append(paths.ROOT / member / "pyproject.toml")
        files += sorted(f for f in (paths.ROOT / member / "src").rglob("*") if f.is_file() and f.suffix != ".pyc")
    for file in files:
        hasher.update(f"{file.relative_to(paths.ROOT)}\n".encode() + file.read_bytes())
    return hasher.hexdigest()[:16]


def _names(context: Path) -> str:
    """What the wheels are, in 16 hex digits: sources may change while images are being built of them."""
    hasher = hashlib.sha256()
    for file in sorted((context / "wheels").iterdir()):
        hasher.update(f"{file.name}\n".encode() + file.read_bytes())
    return hasher.hexdigest()[:16]


def _wheels(folder: Path) -> None:
    """The members' wheels, pip's, and those of every dependency as locked."""
    uv = _uv()
    folder.mkdir(parents=True)
    run(uv, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", folder, paths.ROOT, timeout_s=300)
    asked = ["--quiet", "--locked", "--no-dev", "--no-emit-workspace", "--no-hashes", "--no-annotate", "--no-header"]
    locked = run(uv, "export", *asked, "--all-packages", "--project", paths.ROOT)
    requirements = folder.parent / "requirements.txt"
    requirements.write_text(locked + "\npip\n")
    machine = platform.machine().replace("arm64", "aarch64")
    where = [word for each in PLATFORMS for word in ("--platform", f"{each}_{machine}")]
    pip = (uv.parent / "python", "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    # One version of Python and no source packages: what is built here would not be what is locked.
    only = ("--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--no-deps", *where)
    run(*pip, *only, "--dest", folder, "--requirement", requirements, timeout_s=BUILD_TIMEOUT_S)


def _uv() -> Path:
    found = sorted((paths.ROOT / ".cache").glob("uv-*/bin/uv"))
    if not found:
        raise ClusterError("uv is missing; `make setup` brings it")
    return found[-1].absolute()


def _has_docker() -> bool:
    try:
        run("docker", "info", timeout_s=20)
    except (ClusterError, OSError):
        return False
    return True


def _by_docker(context: Path, made: Path) -> None:
    dockerfile = paths.ROOT / "images" / "Dockerfile"
    for target in TARGETS:
        with Step(f"image {target} by Docker"):
            line = (
                "docker",
                "build",
                "--quiet",
                "--file",
                dockerfile,
                "--target",
                target,
                "--build-arg",
                f"WHEELS={_names(context)}",
                "--tag",
                name(target),
                context,
            )
            run(*line, timeout_s=BUILD_TIMEOUT_S)
    run("docker", "save", "--output", made, *map(name, TARGETS), timeout_s=BUILD_TIMEOUT_S)


def _by_buildah(context: Path, made: Path) -> None:
    if shutil.which("buildah") is None or shutil.which("debootstrap") is None:
        raise ClusterError(
            "no Docker engine, and buildah or debootstrap is missing; apt-get install buildah debootstrap"
        )
    _base()
    layout = made.parent / "layout"
    dockerfile = paths.ROOT / "images" / "Dockerfile"
    # Chroot isolation has no network of its own; the build asks for nothing (--no-index).
    options = ("--isolation", "chroot", "--network", "host", "--layers", "--build-arg", f"BASE={BASE}")
    wheels = ("--build-arg", f"WHEELS={_names(context)}")
    for target in TARGETS:
        with Step(f"image {target} by buildah"):
            line = (
                "buildah",
                "bud",
                *options,
                *wheels,
                "--file",
                dockerfile,
                "--target",
                target,
                "--tag",
                name(target),
                context,
            )
            run(*line, timeout_s=BUILD_TIMEOUT_S)
            # Uncompressed: it is unpacked on this machine a moment later. One layout: shared layers stand once.
            run(
                "buildah",
                "push",
                "--quiet",
                "--disable-compression",
                name(target),
                f"oci:{layout}:{target}",
                timeout_s=600,
            )
    _name_by_containerd(layout)
    with tarfile.open(made, "w") as tar:
        tar.add(layout, arcname=".")


def _name_by_containerd(layout: Path) -> None:
    """Writes each image's whole name where containerd's import looks for it."""
    index = json.loads((layout / "index.json").read_text())
    for manifest in index["manifests"]:
        target = manifest["annotations"]["org.opencontainers.image.ref.name"]
        manifest["annotations"]["io.containerd.image.name"] = name(target)
    (layout / "index.json").write_text(json.dumps(index))


def _base() -> None:
    """Debian 12 with Python 3.11, trimmed; made once a machine."""
    try:
        run("buildah", "inspect", "--type", "image", BASE)
    except ClusterError:
        pass
    else:
        return
    with Step("base image: Debian 12 by debootstrap"), tempfile.TemporaryDirectory(prefix="fleetlm-base-") as scratch:
        root = Path(scratch) / "root"
        run(
            "debootstrap",
            "--variant=minbase",
            "--include=python3,python3-venv",
            "bookworm",
            root,
            timeout_s=BUILD_TIMEOUT_S,
        )
        for folder in TRIMMED:
            shutil.rmtree(root / folder, ignore_errors=True)
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "add", "--quiet", container, root, "/", timeout_s=300)
        run("buildah", "commit", "--quiet", "--rm", container, BASE, timeout_s=300)


if __name__ == "__main__":
    try:
        say(str(archive()))
    except ClusterError as failed:
        say(f"error: {failed}")
        sys.exit(1)
