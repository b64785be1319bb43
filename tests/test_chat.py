"""`cookbook chat` on the real backend: a conversation, its commands and its ends."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from cookbook.cli import chat as cli
from cookbook.cli.sessions import deploy_config
from cookbook.completions import SamplingOptions
from cookbook.control_plane import ControlPlane
from cookbook.errors import RequestRejected
from cookbook.run import list_runs
from cookbook.sessions import open_session
from tests.tiny_model import make_tiny_model

GREEDY = SamplingOptions(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def control(backend):
    make_tiny_model(backend.home / "models" / "long", max_position_embeddings=32768)
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture(scope="module")
def session(control, backend):
    with open_session("chat", control, backend.home) as session:
        yield session


@pytest.fixture
def talk(session, capsys):
    talk = cli._Talk(session, "tiny", deploy_config(None), GREEDY, None)
    capsys.readouterr()
    with talk.client:
        yield talk


def test_an_answer_depends_on_what_was_said_before_until_it_is_forgotten(talk, capsys):
    def ask(line):
        assert talk.take(line)
        return capsys.readouterr().out

    first, second = ask("Hello"), ask("Hello")
    assert first != second
    ask("/reset")
    assert [ask("Hello"), ask("Hello")] == [first, second]
    ask("/reset")
    ask("/system Be brief.")
    assert ask("Hello") != first
    assert talk.take("/exit") is False


def test_commands_explain_themselves_and_are_no_questions(talk, capsys):
    for line in ("/help", "/nonsense", "/system", "  "):
        assert talk.take(line)
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no command /nonsense\n/system TEXT" in err
    assert "system: none" in err


def test_a_conversation_that_no_longer_fits_is_refused_and_nothing_of_it_is_dropped(talk, capsys):
    talk.take("Hello")
    for _ in range(2):
        with pytest.raises(
            RequestRejected, match=r"too long for the model, and nothing of it was dropped.*512.*/reset"
        ):
            talk.take("x" * 500)
    assert [turn["content"] for turn in talk._turns if turn["role"] == "user"] == ["Hello"]
    talk.take("and on")


def test_an_answer_that_was_cut_says_why(session, capsys):
    talk = cli._Talk(session, "tiny", deploy_config(None), SamplingOptions(temperature=0, max_tokens=3), None)
    with talk.client:
        talk.take("Hello")
    assert "(cut at --max-tokens 3)" in capsys.readouterr().err


def test_a_model_that_was_freed_meanwhile_is_loaded_again(talk, session, control, capsys):
    talk.take("Hello")
    before = capsys.readouterr().out
    (record,) = [record for record in session.ledger.all() if record.state == "confirmed"]
    os.kill(control.deployment(record.resource_id)["metadata"]["workerPid"], signal.SIGKILL)
    talk.take("/reset")
    talk.take("Hello")
    out, err = capsys.readouterr()
    assert out == before
    assert "tiny is not there any more: loading it again" in err


def test_what_steers_a_terminal_is_not_printed():
    assert cli._printable("a\x1b[2Jb\n\tc\x07\x9b") == "a\ufffd[2Jb\n\tc\ufffd\ufffd"
    assert cli._printable("\u202e\u2067\u200f\ue000\ud800") == 5 * "\ufffd"


def test_ordinary_text_of_any_language_is_printed_as_it_is():
    text = "10\u00a0000\u202f\u20ac \u3000 \U0001f469\u200d\U0001f4bb \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert cli._printable(text) == text


# -- as a process ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "cookbook.cli", "chat", *arguments]


def left_of(control, home):
    """Sessions and deployments of chats, less that of this module."""
    runs = [run.run_id for run in list_runs(home) if run.recipe == "chat"]
    names = [d["name"] for d in control.list_deployments() if "-chat-" in d["name"]]
    return len(runs), len(names)


def test_through_a_pipe_a_line_is_a_question_and_stdout_has_the_answers(backend, control):
    before = left_of(control, backend.home)
    lines = "Hello\n/reset\n\nHello\n" + "x" * 600 + "\nnever asked\n"
    result = subprocess.run(
        command("tiny", "--temperature", "0", "--max-tokens", "8", "--home", str(backend.home)),
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    half = len(result.stdout) // 2
    assert result.stdout[:half] == result.stdout[half:] != ""
    assert "loading tiny" in result.stderr
    assert "error: the conversation is too long for the model" in result.stderr
    assert left_of(control, backend.home) == before


def test_a_model_that_there_is_not_leaves_nothing(backend, control):
    before = left_of(control, backend.home)
    result = subprocess.run(
        command("nonsense", "--home", str(backend.home)), input="", capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "no model 'nonsense'" in result.stderr
    assert left_of(control, backend.home) == before


@contextmanager
def in_a_terminal(home, *arguments):
    """A chat on a pseudo terminal: (process, function that waits for a text, function that types)."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        command(*arguments, "--home", str(home)), stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    seen = bytearray()

    def expect(text, seconds=30):
        deadline = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < deadline, bytes(seen)
            seen.extend(os.read(main, 4096))
        del seen[: seen.index(text) + len(text)]

    try:
        yield process, expect, lambda text: os.write(main, text)
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(backend, control):
    before = left_of(control, backend.home)
    with in_a_terminal(backend.home, "long", "--temperature", "0") as (process, expect, write):
        expect(b"> ")
        write(b"Hello\n")
        expect(b"Hello\r\n")
        expect(b"\xef\xbf\xbd")  # the answer has begun
        process.send_signal(signal.SIGINT)
        expect(b"(stopped)")
        write(b"/help\n")
        expect(b"Ctrl-C stops the answer")
        write(b"/exit\n")
        assert process.wait(30) == 0
    assert left_of(control, backend.home) == before


def test_ctrl_c_twice_at_the_prompt_leaves(backend, control):
    before = left_of(control, backend.home)
    with in_a_terminal(backend.home, "tiny") as (process, expect, _):
        for text in (b"> ", b"Ctrl-C once more leaves"):
            expect(text)
            time.sleep(0.3)  # until it waits for input: readline shows its prompt first, and misses a signal in between
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert left_of(control, backend.home) == before


def test_told_to_end_in_an_answer_it_frees_the_deployment(backend, control):
    before = left_of(control, backend.home)
    with in_a_terminal(backend.home, "long", "--temperature", "0") as (process, expect, write):
        expect(b"> ")
        write(b"Hello\n")
        expect(b"\xef\xbf\xbd")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert left_of(control, backend.home) == before
