"""A child's log stays short, and what people should see of it is shown once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleetlm_cli import childlog
from fleetlm_cli.childlog import ChildLog


@pytest.fixture
def log(tmp_path: Path) -> ChildLog:
    return ChildLog(tmp_path / "shard-0.log")


def write(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())


@pytest.fixture
def child(log: ChildLog) -> int:
    """The descriptor that a child writes to."""
    return log.open()


def test_each_complaint_is_news_once(log: ChildLog, child: int) -> None:
    """Warnings, errors and lines that are no events; a line that is half there waits for its end."""
    write(
        child,
        '{"at":"t","level":"error","component":"c","event":"broke","why":"so"}\n{"level":"info","event":"x"}\nTrace',
    )
    assert log.news() == ["error broke why=so"]
    write(child, "back\n\n")
    assert log.news() == ["Traceback"]
    assert log.news() == []


def test_a_flood_is_counted(log: ChildLog, child: int) -> None:
    """The terminal gets some lines, the file has all."""
    write(child, "".join(f"line {number}\n" for number in range(100)))
    news = log.news()
    assert news[: childlog.NEWS_LINES_MAX][-1] == f"line {childlog.NEWS_LINES_MAX - 1}"
    assert news[-1] == f"… {100 - childlog.NEWS_LINES_MAX} lines more in {log.path}"


def test_what_earlier_runs_wrote_is_no_news(log: ChildLog, child: int) -> None:
    """Only this `up`'s children are shown."""
    write(child, "old\n")
    log.skip_old()
    write(child, "new\n")
    assert log.news() == ["new"]


def test_last_words_are_those_of_the_last_start(log: ChildLog, child: int) -> None:
    """Not those of the process before."""
    write(child, "first life\n")
    write(log.open(), "".join(f"{number}\n" for number in range(30)))
    assert log.last_lines() == [str(number) for number in range(30 - childlog.LAST_LINES, 30)]


def test_a_long_log_is_cut_while_its_child_goes_on(log: ChildLog, child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old part is kept once beside it; the child's next line is the new file's first, and news."""
    monkeypatch.setattr(childlog, "LOG_BYTES_MAX", 100)
    write(child, "x" * 100 + "\n")
    log.news()
    log.bound()
    write(child, "after\n")
    assert log.path.read_text() == "after\n"
    assert log.path.with_name("shard-0.log.1").read_text() == "x" * 100 + "\n"
    assert log.news() == ["after"]
    assert log.last_lines() == ["after"]
