"""What the operations pages say of the controller is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from fleetlm_operator import rolling
from fleetlm_operator.config import OPERATOR_PREFIX, PREFIX, ControllerConfig, OperatorConfig
from fleetlm_operator.kubemetrics import KubeMetrics
from fleetlm_operator.metrics import Metrics
from fleetlm_operator.planning import Reason
from fleetlm_operator.verdict import DegradedReason, PausedReason, ProgressingReason, ReadyReason, StalledReason
from tests.support import crdreference

PAGES = Path(__file__).parents[2] / "docs" / "operations"


def default(field: msgspec.structs.FieldInfo) -> str:
    """As the page shows it."""
    if field.required:
        return "required"
    return f"`{field.default}`" if field.default else "empty"


@pytest.mark.parametrize(("prefix", "kind"), [(PREFIX, ControllerConfig), (OPERATOR_PREFIX, OperatorConfig)])
def test_every_setting_is_documented(prefix: str, kind: type[msgspec.Struct]) -> None:
    """Name and default of each variable, and no other."""
    rows = re.findall(rf"^\| `({prefix}\w+)` \| (\S+) \|", (PAGES / "configuration.md").read_text(), re.MULTILINE)
    expected = {prefix + field.name.upper(): default(field) for field in msgspec.structs.fields(kind)}
    assert dict(rows) == expected


def test_every_metric_is_documented() -> None:
    """Name and kind of each series, and no other."""
    registry = CollectorRegistry()
    Metrics(registry)
    KubeMetrics(registry)
    rows = re.findall(r"^\| `(fleetlm_operator_\w+)` \| (\w+) \|", (PAGES / "metrics.md").read_text(), re.MULTILINE)
    there = {metric.name + ("_total" if metric.type == "counter" else ""): metric.type for metric in registry.collect()}
    assert dict(rows) == there


def test_every_reason_is_documented() -> None:
    """Alerts are written against these words."""
    page = (PAGES / "configuration.md").read_text()
    assert all(f"`{reason}`" in page for reason in get_args(Reason))


@pytest.mark.parametrize(
    ("condition", "reasons"),
    [
        ("Ready", ReadyReason),
        ("Progressing", ProgressingReason),
        ("Degraded", DegradedReason),
        ("Stalled", StalledReason),
        ("Paused", PausedReason),
    ],
)
def test_every_reason_of_a_condition_is_explained(condition: str, reasons: object) -> None:
    """Each with what to do, and no reason that there is not."""
    page = (PAGES.parent / "kubernetes" / "conditions.md").read_text()
    section = page.partition(f"\n## {condition}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(get_args(reasons))


def test_every_predicate_is_explained() -> None:
    """`status.blockedBy` names them."""
    page = (PAGES.parent / "kubernetes" / "upgrades.md").read_text()
    source = Path(rolling.__file__).read_text()
    assert set(re.findall(r'Block\("(\w+)"', source)) == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def test_the_reference_is_current() -> None:
    """`make docs` writes it."""
    assert crdreference.PAGE.read_text() == crdreference.render()
