"""The chart's files against their sources: resources, versions, names, rights. What needs no Helm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml

from fleetlm_common import kubenames
from fleetlm_operator.config import OPERATOR_PREFIX, OperatorConfig

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "fleetlm"


def rules() -> list[dict[str, list[str]]]:
    """The operator's rights, as the chart grants them."""
    text = (CHART / "templates" / "_helpers.tpl").read_text()
    found: list[dict[str, list[str]]] = yaml.safe_load(text.partition('"fleetlm.rules" -}}')[2].partition("{{- end")[0])
    return found


def may(group: str, resource: str) -> set[str]:
    """What the operator may do to a resource."""
    return {
        verb
        for rule in rules()
        if group in rule["apiGroups"] and resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_resources_are_those_of_the_repository() -> None:
    """One source, `crds/`; the chart carries a copy to the byte (cp crds/*.yaml charts/fleetlm/files/crds/)."""
    sources = {path.name: path.read_bytes() for path in (ROOT / "crds").glob("*.yaml")}
    assert {path.name: path.read_bytes() for path in (CHART / "files" / "crds").glob("*.yaml")} == sources
    assert len(sources) == 2


@pytest.mark.parametrize("path", sorted((CHART / "files" / "crds").glob("*.yaml")), ids=lambda path: path.stem)
def test_resources_stay_when_the_chart_goes(path: Path) -> None:
    """Uninstalling must not delete rings: a CRD that goes takes every object of its kind with it."""
    assert yaml.safe_load(path.read_text())["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_chart_has_the_version_of_the_operator() -> None:
    """The default image is the one that was released with the chart."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = re.search(r'^version = "(.+)"$', (ROOT / "operator" / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert chart["appVersion"] == chart["version"] == version[1]


def test_each_value_is_in_the_schema_and_nothing_else() -> None:
    """A misspelt value is refused, at every level that the chart owns."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compared(value: dict[str, Any], known: dict[str, Any], where: str) -> None:
        assert known["additionalProperties"] is False, where
        assert set(value) == set(known["properties"]) - {"global"}, where
        for name, inner in value.items():
            if "properties" in known["properties"][name]:
                compared(inner, known["properties"][name], f"{where}.{name}")

    compared(values, schema, "values")


def test_the_variables_are_those_that_the_operator_knows() -> None:
    """The operator refuses unknown variables: one too many, and no pod of it starts."""
    text = (CHART / "templates" / "deployment.yaml").read_text()
    given = set(re.findall(rf"{OPERATOR_PREFIX}(\w+)", text))
    assert given <= {field.name.upper() for field in msgspec.structs.fields(OperatorConfig)}
    assert {"POD_NAME", "POD_NAMESPACE"} <= given
    assert "enableServiceLinks: false" in text


def test_the_ops_port_is_the_operators() -> None:
    """Service, probes and container agree with the operator."""
    port = str(kubenames.OPERATOR_OPS_PORT)
    assert f"containerPort: {port}" in (CHART / "templates" / "deployment.yaml").read_text()
    assert f"port: {port}" in (CHART / "templates" / "service.yaml").read_text()


def test_the_operator_holds_what_it_grants() -> None:
    """Kubernetes lets nobody grant a right that he does not hold: shards' and gateways' are among the operator's."""
    assert may(kubenames.GROUP, "ringmaps") >= {"get", "list", "watch"}
    assert may("coordination.k8s.io", "leases") >= {"get", "list", "watch", "patch"}


def test_the_operator_has_no_sweeping_right() -> None:
    """No wildcard; Secrets are neither listed nor watched nor deleted; volumes and accounts are never deleted."""
    assert not [rule for rule in rules() for values in rule.values() if "*" in values]
    assert may("", "secrets") == {"get", "create", "patch"}
    assert may("", "persistentvolumeclaims") == {"list", "watch", "patch"}
    assert may(kubenames.GROUP, "shardrings") == {"get", "list", "watch"}
    assert "delete" not in may(kubenames.GROUP, "ringmaps")
