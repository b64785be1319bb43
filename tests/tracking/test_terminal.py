"""What people see: lines where there is no terminal, a bar on a real pseudo-terminal."""

import io
import os
import pty
import subprocess
import sys

import pytest

from cookbook.tracking import Start
from cookbook.tracking.terminal import TerminalProgress, duration_text, terminal_progress

NUMBERS = {"train/loss": 0.43211, "train/learning_rate": 1e-4, "perf/tokens_per_s": 1234.5}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream():
    return io.StringIO()


def test_a_line_names_run_step_loss_rate_speed_and_time_left(clock, stream):
    progress = TerminalProgress("sft-1a2b3c4d", stream, clock)
    progress.start(Start(0, 100, {}))
    clock.now = 20.0
    progress.log_step(1, NUMBERS)
    clock.now = 40.0
    progress.log_step(11, NUMBERS)
    first, later = stream.getvalue().splitlines()
    assert first == "sft-1a2b3c4d  step 1 of 100: loss 0.4321, lr 1.0e-04, 1,234 tok/s"
    assert later == "sft-1a2b3c4d  step 11 of 100: loss 0.4321, lr 1.0e-04, 1,234 tok/s, eta 2 min 58 s"


def test_there_is_at_most_one_line_in_ten_seconds_and_the_last_step_always_has_one(clock, stream):
    progress = TerminalProgress("r", stream, clock)
    progress.start(Start(0, 100, {}))
    for step in range(1, 101):
        clock.now += 0.3
        progress.log_step(step, NUMBERS)
    steps = [line.split()[2] for line in stream.getvalue().splitlines()]
    assert steps == ["1", "35", "69", "100"]


def test_a_resumed_run_says_where_it_goes_on_and_counts_its_own_speed(clock, stream):
    progress = TerminalProgress("r", stream, clock)
    progress.start(Start(50, 60, {}))
    progress.log_step(51, NUMBERS)
    clock.now = 10.0
    progress.log_step(52, NUMBERS)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "r  goes on after step 50 of 60"
    assert lines[2].endswith("step 52 of 60: loss 0.4321, lr 1.0e-04, 1,234 tok/s, eta 1 min 20 s")


def test_an_evaluation_is_a_line_of_its_own(clock, stream):
    progress = TerminalProgress("r", stream, clock)
    progress.start(Start(0, 2, {}))
    progress.log_step(0, {"evaluation/loss": 0.25, "evaluation/exact_match": 0.5})
    assert stream.getvalue() == "r  step 0: evaluation/loss 0.25, evaluation/exact_match 0.5\n"


def test_reading_rows_is_shown(clock, stream):
    progress = TerminalProgress("r", stream, clock)
    for done in (10_000, 20_000, 30_000):
        progress.rows_read(done, 30_000)
    assert stream.getvalue() == "r  read 10,000 of 30,000 rows\nr  read 30,000 of 30,000 rows\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (7565, "2 h 6 min")]
)
def test_durations_are_written_as_people_say_them(seconds, text):
    assert duration_text(seconds) == text


def test_a_stream_that_is_no_terminal_gets_no_control_codes(stream):
    progress = terminal_progress("r", stream)
    progress.start(Start(0, 2, {}))
    progress.log_step(1, NUMBERS)
    progress.finish(KeyboardInterrupt())
    assert "\x1b" not in stream.getvalue()


ON_A_TERMINAL = """
import logging, sys, time
from cookbook.tracking import Start
from cookbook.tracking.terminal import terminal_progress

logging.basicConfig(stream=sys.stderr, format="LOG %(message)s")
progress = terminal_progress("sft-1a2b3c4d")
progress.start(Start(0, 4, {}))
for step in range(1, 5):
    progress.log_step(step, {"train/loss": 1 / step, "train/learning_rate": 1e-4})
    time.sleep(0.3)
    logging.warning("line %d", step)
progress.event("saved step-4")
progress.finish(KeyboardInterrupt())
logging.warning("after the end")
"""


def on_a_terminal(script):
    """What the script writes to a pseudo-terminal of 100 columns."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=other, stderr=other, env=environment)
    os.close(other)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # the other side is closed
        pass
    os.close(main)
    assert process.wait(30) == 0, output.decode()
    return output.decode()


def screen(output):
    """The lines that stay on a terminal. Knows the codes that a one-line bar uses: carriage return, erase, up."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(output):
        if output.startswith("\x1b[", position):
            end = next(i for i in range(position + 2, len(output)) if output[i].isalpha())
            code, position = output[position + 2 : end + 1], end + 1
            if code == "2K":
                lines[row] = ""
            elif code.endswith("A"):
                row -= int(code[:-1] or 1)
            continue
        character = output[position]
        position += 1
        if character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif character == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_log_lines_stay_whole_above_the_bar_and_the_bar_goes_at_the_end():
    output = on_a_terminal(ON_A_TERMINAL)
    assert "2/4  loss 0.5000, lr 1.0e-04" in output
    logged = [f"LOG line {step}" for step in range(1, 5)]
    assert screen(output) == [*logged, "sft-1a2b3c4d  saved step-4", "LOG after the end"]
