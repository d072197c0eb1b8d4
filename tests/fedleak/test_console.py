"""What standard error shows: lines, bars, JSON events, or nothing."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
import typer

from fedleak import events
from fedleak.commands import console
from fedleak.commands.app import main


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    events.set_up()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fedleak", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def events_in(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_without_a_terminal_there_is_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    events.set_up()
    with console.resumable("attacking", "updates") as on_progress:
        for done in range(101):
            clock[0] = done  # a second each: a tenth takes ten
            on_progress(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "fedleak: attacking: 10/100 updates, about 90 s left"
    assert lines[-1] == "fedleak: attacking: 100/100 updates"


def test_fast_work_prints_its_end_alone(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    events.set_up()
    with console.resumable("attacking", "updates") as on_progress:
        for done in range(101):
            clock[0] = done / 1000
            on_progress(done, 100)
    assert capsys.readouterr().err == "fedleak: attacking: 100/100 updates\n"


def test_the_loops_within_are_told_where_they_are_all_there_is(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    events.set_up()
    for inner, wanted in ((False, 0), (True, 10)):
        clock[0] = 0.0
        with console.display("attacking", inner=inner):
            for n in events.steps(100, "matching"):
                clock[0] = 3.0 * n
        assert capsys.readouterr().err.count("matching") == wanted


def test_a_loop_costs_no_event_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    events.LOGGER.setLevel(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        assert list(events.steps(3, "matching")) == [0, 1, 2]
    assert not caplog.records


@pytest.mark.parametrize(("quiet", "as_json"), [(True, False), (True, True), (False, True)])
def test_neither_bars_nor_lines(
    quiet: bool, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    events.set_up(as_json, quiet)
    with console.resumable("attacking", "updates") as on_progress:
        on_progress(1, 1)
    events.warn("something is missing")
    found = capsys.readouterr().err
    if not as_json:
        assert found == "fedleak: something is missing\n"
        return
    listed = [e["event"] for e in events_in(found)]
    assert listed == (["warning"] if quiet else ["progress", "warning"])


def test_what_is_kept_is_said_when_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    events.set_up()

    def stop() -> None:
        with console.resumable("attacking", "updates") as tell:
            tell(3, 9)
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as caught:
        stop()
    assert caught.value.exit_code == 130
    assert "stopped; 3 of 9 updates are done and kept" in capsys.readouterr().err


def test_events_are_json_with_the_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    events.set_up(as_json=True)
    events.emit("round", round=1, psnr_db_median=float("inf"), accuracy=float("nan"))
    logging.getLogger("someone.else").warning("careful, %d", 3)
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second, *_ = events_in(capsys.readouterr().err)
    assert first["event"] == "round"
    assert str(first["time"]).endswith("+00:00")
    assert (first["round"], first["psnr_db_median"], first["accuracy"]) == (1, None, None)
    assert second["event"] == "log"
    assert second["reason"] == "careful, 3"


@pytest.mark.parametrize("by", ["option", "environment"])
def test_errors_are_events_and_exit_codes_stay(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--log-json"] if by == "option" else []
    if by == "environment":
        monkeypatch.setenv("FEDLEAK_LOG_JSON", "1")
    assert run([*options, "list", "atacks"], monkeypatch) == 2
    start, error, end = events_in(capsys.readouterr().err)
    assert (start["event"], start["command"]) == ("start", "list")
    assert (error["event"], error["level"], error["exit_code"]) == ("error", "error", 2)
    assert "did you mean 'attacks'" in str(error["reason"])
    assert (end["event"], end["exit_code"]) == ("end", 2)
    for wrong in (["nonsense"], ["simulate", "--nonsense"]):
        assert run([*options, *wrong], monkeypatch) == 2
        found = events_in(capsys.readouterr().err)
        assert [e["event"] for e in found][-2:] == ["error", "end"]


def test_an_error_of_ours_has_its_traceback_in_the_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(kind: str) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("fedleak.commands.listing.entries", broken)
    assert run(["--log-json", "list", "attacks"], monkeypatch) == 1
    error = events_in(capsys.readouterr().err)[1]
    assert error["reason"] == "ZeroDivisionError: oh"
    assert "Traceback" in str(error["traceback"])
    # A person is told in a sentence, and how to see more.
    assert run(["list", "attacks"], monkeypatch) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError: oh. Please report it, with what FEDLEAK_TRACEBACK=1 shows" in told
    assert "Traceback" not in told
    monkeypatch.setenv("FEDLEAK_TRACEBACK", "1")
    assert run(["list", "attacks"], monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_without_the_federation_its_commands_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr.app")

    monkeypatch.setattr("fedleak.commands.listing.entries", missing)
    assert run(["list", "attacks"], monkeypatch) == 2
    assert "pip install 'fedleak[federation]'" in capsys.readouterr().err
