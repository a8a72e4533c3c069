"""The parts of `make e2e-moves` that need no cluster: what counts as a broken promise, and the table."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e import trial
from tests.support.history import Violation
from tests.support.load import LoadPlan, Report, append_ms


def test_an_orderly_run_has_no_broken_promise() -> None:
    """TRY_AGAIN is what clients repeat, and a CONFLICT is the answer to `expected_seq`."""
    report = Report(LoadPlan(seed=1))
    report.told("TRY_AGAIN")
    report.told("CONFLICT", asked_for=True)
    assert trial.broken_promises(report) == []


def test_every_other_answer_violation_and_gap_is_told() -> None:
    """Each with what there is to say."""
    report = Report(LoadPlan(seed=1), gaps=3, violations=[Violation("lost", "s", "acknowledged at 7")])
    for code in ("CONFLICT", "NOT_SENT", "INTERNAL", "INTERNAL"):
        report.told(code)
    assert trial.broken_promises(report) == [
        "lost s: acknowledged at 7",
        "clients were told CONFLICT 1 times",
        "clients were told NOT_SENT 1 times",
        "clients were told INTERNAL 2 times",
        "readers were told 3 gaps",
    ]


def test_the_table_adds_up_runs() -> None:
    """A row for each operation, with and without kills; promises, kills and appends are added, times are spread out."""

    def run(name: str, longest: float, *broken: str, **killed: int) -> dict[str, Any]:
        append = {"p50": 1.0, "p99": longest / 2, "max": longest}
        rest = {"acked": 1_000, "operation_s": 30.0, "append_ms": append, "broken": list(broken)}
        return {"operation": name, "kills": bool(killed), "killed": killed, **rest}

    title = "upgrade of 3 shards and 2 gateways, in place, with kills (1 source, 2 target)"
    rows = trial.table(
        [
            run("scale", 300.0),
            run("scale", 100.0, "lost"),
            run("scale", 2_200.0),
            run("upgrade", 10.0, source=1, target=2),
        ]
    ).splitlines()
    assert rows[2:] == [
        "| scale 3 → 5 → 2 → 3 | 3 | 3,000 | 1 | 100, 300, 2,200 ms | 150 ms | 30 |",
        f"| {title} | 1 | 1,000 | 0 | 10, 10, 10 ms | 5 ms | 30 |",
    ]


def test_times_of_appends() -> None:
    """Half, 99 of 100, and the longest one, in milliseconds."""
    assert append_ms([0.001 * number for number in range(1, 101)]) == {"p50": 51.0, "p99": 100.0, "max": 100.0}
    assert append_ms([0.5]) == {"p50": 500.0, "p99": 500.0, "max": 500.0}


def test_an_operation_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made."""
    with pytest.raises(SystemExit):
        trial.main(["--only", "scale,explode"])
    assert "no operation explode" in capsys.readouterr().err
