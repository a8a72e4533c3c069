"""The operator's command line: a word that it does not know starts nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["kubernets"], ["kubernetes", "kubernetes"], ["--kubernetes"], [""]])
def test_unknown_arguments_are_refused(arguments: list[str]) -> None:
    """Neither the operator nor the controller over files runs instead: status 2 and a sentence that names both."""
    command = [sys.executable, "-m", "fleetlm_operator", *arguments]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"operator: unknown arguments {arguments}; none runs a ring over files")


@pytest.mark.parametrize(
    ("arguments", "variable"), [([], "FLEETLM_CONTROLLER_"), (["kubernetes"], "FLEETLM_OPERATOR_")]
)
def test_each_way_to_run_asks_for_its_own_settings(arguments: list[str], variable: str) -> None:
    """Status 78 names what is missing."""
    command = [sys.executable, "-m", "fleetlm_operator", *arguments]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert variable in done.stderr + done.stdout
