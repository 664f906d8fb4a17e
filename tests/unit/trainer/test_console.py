"""What a person sees of a run."""

import io
import json
import logging

import pytest
from rich.console import Console

from opd.errors import ConfigError
from opd.logs import configure_logging, give_up
from services.trainer.console import RunConsole, step_line

METRICS = {"loss/reverse_kl": 0.12345, "distill/overlap_ratio": 0.5, "timing/step": 1.5, "optim/lr": 1e-3}


def test_a_step_is_one_line_without_what_was_not_measured() -> None:
    assert step_line(3, 120, METRICS) == "step   3/120  reverse_kl 0.1235  overlap 50.0%  step_s 1.50"
    line = step_line(3, 9, METRICS | {"outcome/accuracy": 0.25, "timing/tokens_per_second": 1234.5})
    assert line == "step 3/9  reverse_kl 0.1235  overlap 50.0%  accuracy 25.0%  tokens/s 1234  step_s 1.50"


def test_without_a_terminal_lines_are_plain_and_whole() -> None:
    stream = io.StringIO()
    with RunConsole(Console(file=stream, width=20)) as console:
        console.begin(0, 2)
        console.finish_step(1, 2, METRICS)
        console.say("[bold] is no markup here")
    expected = "step 1/2  reverse_kl 0.1235  overlap 50.0%  step_s 1.50\n[bold] is no markup here\n"
    assert stream.getvalue() == expected


def test_on_a_terminal_there_is_a_bar_and_it_is_taken_away() -> None:
    stream = io.StringIO()
    with RunConsole(Console(file=stream, force_terminal=True, width=100)) as console:
        console.begin(0, 2)
        console.finish_step(1, 2, METRICS)
        console.finish_step(2, 2, METRICS)
    shown = stream.getvalue()
    assert "2/2" in shown and "step 2/2" in shown
    # The cursor is shown again, whatever came before.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_where_logs_are_json_lines_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        configure_logging("info", as_json=True)
        with RunConsole(Console(file=stream, force_terminal=True, width=100)) as console:
            console.finish_step(1, 2, METRICS)
        give_up("opd train", ConfigError('seed="x": is no number'))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert stream.getvalue() == ""
    step, last = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert step["message"].startswith("step 1/2") and step["level"] == "info"
    assert (last["message"], last["code"], last["level"]) == ('seed="x": is no number', "config", "error")
