"""House rules that a program can check: layout, sizes, docstrings, time and randomness passed in, no sleeps.

An exception to a rule stands here by name, with its reason; nothing is excepted anywhere else.
"""

from __future__ import annotations

import ast
import operator
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
MEMBERS: Final = ("common", "shard", "gateway", "operator", "client", "cli")
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70

BORDERS: Final = {
    "__main__.py": "where a process begins: the world's clock and randomness are handed to the parts here",
    "clock.py": "the clock itself",
    "filecontrol.py": "waits for another process's lock file, in a thread, in the world's time",
    "lanes.py": "paces real threads; simulations use InlineLane, which does not pause",
    "client.py": "the SDK's front door: makes the source that its insides are passed",
}
"""Module names that may ask the machine for time and randomness, each with its reason."""

REAL_PAUSES: Final = {
    "tests/e2e/test_operators.py": "kills operators at random moments: the moments are the test",
    "tests/integration/test_faults_network.py": "a network is bad for so long: the length is the fault",
    "tests/integration/test_faults_processes.py": "a process is frozen for longer than every heartbeat: the same",
    "tests/integration/test_gateway_inner.py": "kills processes at random moments under load: the moments are the test",
}
"""Test modules that may pause in real time, each with its reason."""

CLOCK_CALLS: Final = frozenset(
    {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"}
)
MADE_HERE: Final = frozenset({"uuid1", "uuid4", "now", "utcnow", "today", "urandom", "token_bytes", "token_hex"})


def sources() -> list[Path]:
    """Every module of the product."""
    return [path for member in MEMBERS for path in sorted((ROOT / member / "src").rglob("*.py"))]


def suite() -> list[Path]:
    """Every module under tests/."""
    return sorted((ROOT / "tests").rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """The parsed module."""
    return ast.parse(path.read_text(), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """For messages: file and line."""
    return f"{path.relative_to(ROOT)}" + (f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else "")


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    """Every function of a module, nested ones too."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def none_of(found: list[str], rule: str) -> None:
    """Fail with every offender at once."""
    assert not found, f"{rule}:\n  " + "\n  ".join(found)


def test_operator_is_pythons_own_module() -> None:
    """The folder `operator/` shadows nothing: no package file in it, none in tests/operator."""
    assert operator.__file__ is not None
    assert Path(operator.__file__).is_relative_to(sysconfig.get_path("stdlib"))
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert not (ROOT / "tests" / "operator").exists()
    assert (ROOT / "tests" / "__init__.py").exists()


def test_every_test_folder_is_a_package() -> None:
    """Without `__init__.py` two test modules of one name would be one module."""
    folders = {path.parent for path in suite()}
    none_of([place(each) for each in sorted(folders) if not (each / "__init__.py").exists()], "no __init__.py")


def test_every_module_has_a_docstring() -> None:
    """Place, promise, what must not be done here: no module without one."""
    none_of([place(path) for path in sources() + suite() if not ast.get_docstring(tree(path))], "no module docstring")


def test_files_and_functions_stay_small() -> None:
    """At most 600 lines a file, 70 a function."""
    files = [path for path in sources() + suite() if len(path.read_text().splitlines()) > FILE_LINES_MAX]
    none_of([place(path) for path in files], f"more than {FILE_LINES_MAX} lines")
    long = [
        f"{place(path, node)} {node.name}"
        for path in sources() + suite()
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    none_of(long, f"more than {FUNCTION_LINES_MAX} lines")


def asks_the_machine(node: ast.Call) -> bool:
    """A call that makes time or randomness out of nothing."""
    called = node.func
    if not isinstance(called, ast.Attribute):
        return isinstance(called, ast.Name) and called.id in MADE_HERE - {"now", "today"}
    owner = called.value.id if isinstance(called.value, ast.Name) else ""
    if owner == "random":  # a seeded source is made of what was passed in
        return called.attr != "Random" or not node.args
    return (owner == "time" and called.attr in CLOCK_CALLS) or (
        owner in {"uuid", "datetime", "os", "secrets", "date"} and called.attr in MADE_HERE
    )


def test_time_and_randomness_are_passed_in() -> None:
    """Logic never asks the machine for time or chance; the simulator could not own them otherwise."""
    found = [
        f"{place(path, node)} {ast.unparse(node.func)}"
        for path in sources()
        if path.name not in BORDERS and "fleetlm_cli" not in path.parts
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and asks_the_machine(node)
    ]
    none_of(found, "time or randomness made inside logic")


def test_every_test_states_its_promise() -> None:
    """A test function's docstring says what holds."""
    found = [
        f"{place(path, node)} {node.name}"
        for path in suite()
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    none_of(found, "a test without docstring")


def test_no_module_is_a_drawer() -> None:
    """`utils`, `helpers`, `core` say nothing about what is in them."""
    drawers = {"utils.py", "util.py", "helpers.py", "core.py", "misc.py", "common.py"}
    folders = {"utils", "util", "helpers", "core", "misc"}
    found = [path for path in sources() + suite() if path.name in drawers or folders & set(path.parts)]
    none_of([place(path) for path in found], "a name that says nothing")


def test_nothing_is_ignored_without_a_code() -> None:
    """`# type: ignore` and its like name what they ignore (ruff sees to `noqa`)."""
    bare = re.compile(r"#\s*(?:type|pyright):\s*ignore(?!\[)")
    found = [
        f"{place(path)}:{number}"
        for path in sources() + suite()
        if path.name != "test_tidy.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    none_of(found, "ignored without a code")


def sleeps(node: ast.AST) -> Iterator[ast.Call]:
    """Calls of a sleep under `node`, but for those in a `while`: a poll ends by its condition or its deadline."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.While):
            continue
        if isinstance(child, ast.Call) and ast.unparse(child.func) == "asyncio.sleep":
            yield child
        yield from sleeps(child)


def in_faster_time(path: Path) -> bool:
    """The module's loops are simulated ones (tests/support/fastloop.py): a sleep there is a time on their clock."""
    return "fastloop" in path.read_text()


def test_tests_do_not_sleep() -> None:
    """Events, polls and deadlines, no guesses: `time.sleep` nowhere, `asyncio.sleep` only to let the loop turn."""
    blocking = [
        f"{place(path, node)} {ast.unparse(node)}"
        for path in suite()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
    none_of(blocking, "a test that blocks the loop")
    guessed = [
        f"{place(path, node)} {ast.unparse(node)}"
        for path in suite()
        if path.name.startswith("test_") and place(path) not in REAL_PAUSES and not in_faster_time(path)
        for node in sleeps(tree(path))
        if ast.unparse(node.args[0]) != "0"
    ]
    none_of(guessed, "a sleep in a test")


def test_no_test_skips() -> None:
    """What cannot run here says why and fails; only `root` and `long`, announced by `make test`, leave tests out."""
    skipping = re.compile(r"\b(skip|skipif|importorskip|SkipTest|xfail)\b(?!\s*=)")
    found = [
        f"{place(path, node)} {ast.unparse(node)}"
        for path in suite()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute | ast.Name) and skipping.search(ast.unparse(node))
    ]
    none_of(found, "a test that may skip")


@pytest.mark.parametrize("page", ["testing.md", "operations/failures.md"])
def test_the_tables_of_docs_name_real_tests(page: str) -> None:
    """Each test that a page names exists, and each command of the track record selects one."""
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if name not in names_in(ROOT / file)]
    commands = re.findall(r"`pytest (tests/\S+?\.py) -k (\w+)`", text)
    missing += [
        f"{file} -k {word}" for file, word in commands if not any(word in name for name in names_in(ROOT / file))
    ]
    assert named
    none_of(missing, f"docs/{page} names what is not there")


def names_in(path: Path) -> set[str]:
    """Functions of a module."""
    return {function.name for function in functions(path)}


def top_folders() -> list[str]:
    """What a visitor sees."""
    return sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


@pytest.mark.parametrize("folder", top_folders())
def test_the_readme_names_every_top_level_folder(folder: str) -> None:
    """The tree in the README is the tree."""
    assert f"[{folder}/]({folder})" in (ROOT / "README.md").read_text()
