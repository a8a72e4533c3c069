"""The sandbox image of every pod: one static program that waits, packed without any image tool."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Final

from tests.cluster import paths

IMAGE: Final = "localhost/fleetlm-test-pause:1"


def archive() -> Path:
    """The image as a file that containerd imports; made anew each time, it takes no time."""
    layer = _tar({"pause": (paths.BINARIES / "pause").read_bytes()})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
        "history": [{"created_by": "tests/cluster"}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    whole = {"config.json": _bytes(config), "layer.tar": layer, "manifest.json": _bytes(manifest)}
    target = paths.RUN / "pause.tar"
    if not target.exists():
        target.write_bytes(_tar(whole))
    return target


def _bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()
