"""docs/kubernetes/reference.md from the schemas in crds/: `python -m tests.support.crdreference` writes it.

Promise: nothing about a field stands in the page that does not stand in the schema. Must not be done here: prose about
how to use it (the other pages of docs/kubernetes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "kubernetes" / "reference.md"
Schema = dict[str, Any]

HEAD: Final = """# ShardRing and RingMap: every field

Made from the schemas in [crds/](../../crds) by `make docs`; a test says when it is not current.
`kubectl explain sr.spec` shows the same.

The smallest ShardRing is

```yaml
apiVersion: fleetlm.io/v1alpha1
kind: ShardRing
metadata:
  name: demo
```
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(_resource(plural) for plural in ("shardrings", "ringmaps"))


def _resource(plural: str) -> str:
    crd: Schema = yaml.safe_load((ROOT / "crds" / f"fleetlm.io_{plural}.yaml").read_text())
    names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    short = ", ".join(f"`{name}`" for name in names["shortNames"])
    name = f"`{crd['spec']['group']}/{version['name']}`"
    lines = [f"\n## {names['kind']}\n", f"{name}, short name {short}. {schema['description']}\n"]
    for part in ("spec", "status"):
        if part in schema["properties"]:
            lines += [f"### `{part}`\n", "| field | type | default | |", "|---|---|---|---|"]
            lines += [_row(path, node) for path, node in _fields("", schema["properties"][part])]
            lines.append("")
    rules = [*_rules("", schema), *(rule for path, node in _fields("", schema) for rule in _rules(path, node))]
    if rules:
        lines += ["### Rules\n", "What is refused, and what the API server answers:\n", *rules, ""]
    return "\n".join(lines)


def _fields(path: str, node: Schema) -> Iterator[tuple[str, Schema]]:
    """Every field below a node, parents first."""
    for name, child in node.get("properties", {}).items():
        if not path and name in {"apiVersion", "kind", "metadata"}:
            continue
        where = f"{path}.{name}".lstrip(".")
        yield where, child
        yield from _fields(where, child)
        items = child.get("items", {})
        yield from _fields(f"{where}[]", items)


def _rules(path: str, node: Schema) -> Iterator[str]:
    for rule in node.get("x-kubernetes-validations", []):
        yield f"- {f'`{path}`: ' if path else ''}{rule['message']}"
    if "items" in node:
        yield from _rules(f"{path}[]", node["items"])


def _row(path: str, node: Schema) -> str:
    default = node.get("default")
    shown = "" if default is None or default == {} else f"`{msgspec.json.encode(default).decode()}`"
    said = node.get("description", "").replace("|", "or")
    return f"| `{path}` | {_type(node)} | {shown} | {said} |"


def _type(node: Schema) -> str:
    """Type and bounds in words."""
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type", "object")
    if kind == "integer":
        low, high = node.get("minimum"), node.get("maximum")
        return f"{low} to {high}" if high is not None else f"integer, {low} or more"
    if kind == "array":
        return f"list, at most {node['maxItems']}"
    if kind == "string" and "maxLength" in node:
        return f"string, at most {node['maxLength']}"
    if "additionalProperties" in node:
        return f"map, at most {node['maxProperties']}"
    return str(kind)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())
