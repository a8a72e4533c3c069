"""The command as a whole: its words about itself, what it imports, the variables that it reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from fleetlm_cli import environment
from fleetlm_cli.main import COMMANDS, app


def leaves(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command that does something, and the words that call it."""
    if isinstance(command, TyperGroup):
        context = command.make_context("fleetlm", [], resilient_parsing=True)
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name), (*path, name))
    else:
        assert isinstance(command, TyperCommand), path
        yield path, command


RUN = """
import sys
from fleetlm_cli.main import main
sys.argv[0] = 'fleetlm'
try:
    main()
except SystemExit:
    print('imported', *sys.modules)
"""
LEAVES = list(leaves(get_command(app)))


def test_every_command_explains_itself() -> None:
    """`--help` of each, and of all in one; each argument and option has words."""
    listed = CliRunner().invoke(app, ["--help"]).output
    assert len(LEAVES) > len(COMMANDS)
    for path, command in LEAVES:
        assert path[0] in listed
        shown = CliRunner().invoke(app, [*path, "--help"])
        assert shown.exit_code == 0, path
        assert f" {' '.join(path)} [OPTIONS]" in " ".join(shown.output.split()), path
        assert command.help, path
        assert all(getattr(parameter, "help", None) for parameter in command.params), path


def test_a_version_and_usage() -> None:
    """Status 2 for what is no command or no option."""
    version = CliRunner().invoke(app, ["--version"])
    assert (version.exit_code, version.output.split()[0]) == (0, "fleetlm")
    assert CliRunner().invoke(app, ["tail", "s", "--nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["shards", "nonsense"]).exit_code == 2


def test_the_variables_of_the_options_are_known() -> None:
    """`environment.OPTIONS` is what the options say, no more and no less."""
    said: set[str] = set()
    for _, command in LEAVES:
        for parameter in command.params:
            names = parameter.envvar or ()
            said |= {names} if isinstance(names, str) else set(names)
    assert said == environment.OPTIONS


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (("--version",), {"aiohttp", "kubernetes", "asyncpg", "prometheus_client"}),
        (("append", "--help"), {"kubernetes", "asyncpg", "prometheus_client", "fleetlm_shard", "fleetlm_gateway"}),
        (("up", "--help"), {"kubernetes"}),
        (("drill", "--help"), {"kubernetes"}),
    ],
)
def test_a_command_does_not_wait_for_the_imports_of_others(arguments: tuple[str, ...], without: set[str]) -> None:
    """They were most of the second that `fleetlm append` took."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert not without & set(done.stdout.splitlines()[-1].split())
