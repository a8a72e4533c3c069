"""The setting that names a control plane."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fleetlm_common.config import ConfigError
from fleetlm_common.control import ControlPlane
from fleetlm_common.controlurl import from_url
from fleetlm_common.filecontrol import FileControlPlane


def named(value: str) -> ControlPlane:
    """The control plane that `value` names."""
    return from_url(value, variable="X_CONTROL", env={}, entropy=random.Random(1), agent="test")


def test_an_address_of_files_names_an_absolute_folder(tmp_path: Path) -> None:
    """`file:/folder` is a control plane over that folder."""
    plane = named(f"file:{tmp_path}")
    assert isinstance(plane, FileControlPlane)
    assert plane.folder == tmp_path


def test_an_address_on_kubernetes_names_namespace_and_ring() -> None:
    """`kubernetes:NAMESPACE/RING` names a ring; nothing is asked before it is used."""
    assert str(named("kubernetes:prod/chat-1")) == "kubernetes:prod/chat-1"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "/folder",
        "file:relative",
        "file://host/folder",
        "http://x",
        "file",
        "kubernetes:chat",
        "kubernetes:Prod/chat",
        "kubernetes:prod/",
        "kubernetes:prod/chat/x",
        "kubernetes:/chat",
    ],
)
def test_anything_else_is_refused_by_the_name_of_the_variable(wrong: str) -> None:
    """The refusal names the variable and says the two forms."""
    with pytest.raises(ConfigError, match=r"X_CONTROL.*file:/absolute/folder or kubernetes:NAMESPACE/RING"):
        named(wrong)
