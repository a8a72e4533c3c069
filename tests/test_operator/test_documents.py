"""What the operations pages say of the controller is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_operator.config import PREFIX, ControllerConfig
from fleetlm_operator.metrics import Metrics
from fleetlm_operator.planning import Reason

PAGES = Path(__file__).parents[2] / "docs" / "operations"


def test_every_setting_is_documented() -> None:
    """Name and default of each variable, and no other."""
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| (\S+) \|", (PAGES / "configuration.md").read_text(), re.MULTILINE)
    expected = {
        PREFIX + field.name.upper(): "required" if field.required else f"`{field.default}`"
        for field in msgspec.structs.fields(ControllerConfig)
    }
    assert dict(rows) == expected


def test_every_metric_is_documented() -> None:
    """Name and kind of each series, and no other."""
    registry = CollectorRegistry()
    Metrics(registry)
    rows = re.findall(r"^\| `(fleetlm_operator_\w+)` \| (\w+) \|", (PAGES / "metrics.md").read_text(), re.MULTILINE)
    there = {metric.name + ("_total" if metric.type == "counter" else ""): metric.type for metric in registry.collect()}
    assert dict(rows) == there


def test_every_reason_is_documented() -> None:
    """Alerts are written against these words."""
    page = (PAGES / "configuration.md").read_text()
    assert all(f"`{reason}`" in page for reason in get_args(Reason))
