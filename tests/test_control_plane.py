"""The connection to a control plane, against a server that loses answers and does not do a thing twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from cookbook.control_plane import ControlPlane, insist, is_refused
from cookbook.deadlines import Deadline
from cookbook.errors import ProvisioningError

Answer = tuple[int, dict[str, Any]] | None
"""Status and body; None = the connection ends without an answer."""


class Server:
    """Answers as `answer(method, path)` says; keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answer: Callable[[str, str], Answer] = lambda method, path: (404, {})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                path = self.path.partition("?")[0]
                server.asked.append((self.command, path))
                account = (200, {"accounts": [{"name": "accounts/local"}]})
                answer = account if path == "/v1/accounts" else server.answer(self.command, path)
                if answer is None:
                    self.close_connection = True
                    return
                content = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def control(server, tmp_path):
    with ControlPlane("fireworks", server.url, "secret-key", tmp_path) as control:
        yield control


def losing_the_first(done: dict[str, str], verb: str, state: str) -> Callable[[str, str], Answer]:
    """Does what is asked once, and loses that answer; refuses it from then on, as it is done."""

    def answer(method: str, path: str) -> Answer:
        if method == "GET":
            return (200, {"name": "j", "state": done["state"]})
        if done["state"] == state:
            return (409, {"error": {"message": f"cannot {verb} a job that is {state}"}})
        done["state"] = state
        return None

    return answer


def test_a_resume_whose_answer_was_lost_has_happened_although_the_next_one_is_refused(server, control):
    server.answer = losing_the_first({"state": "JOB_STATE_CANCELLED"}, "resume", "JOB_STATE_RUNNING")
    job = control.resume("j", 10.0)
    assert job is not None
    assert job["state"] == "JOB_STATE_RUNNING"


def test_a_job_that_cannot_be_resumed_is_none(server, control):
    server.answer = losing_the_first({"state": "JOB_STATE_FAILED"}, "resume", "JOB_STATE_FAILED")
    assert control.resume("j", 10.0) is None


def test_a_cancel_whose_answer_was_lost_has_happened(server, control):
    server.answer = losing_the_first({"state": "JOB_STATE_RUNNING"}, "cancel", "JOB_STATE_CANCELLED")
    control.cancel("j", 10.0)
    assert [path.rpartition(":")[2] for method, path in server.asked if method == "POST"] == ["cancel"] * 2


def test_a_refused_cancel_of_a_job_that_goes_on_is_an_error(server, control):
    server.answer = lambda method, path: (200, {"state": "JOB_STATE_RUNNING"}) if method == "GET" else (400, {})
    with pytest.raises(ProvisioningError, match=r"cancelling trainer j failed.*JOB_STATE_RUNNING"):
        control.cancel("j", 10.0)


def test_a_job_is_looked_at_again_when_the_connection_breaks_which_the_sdk_does_not_do(server, control):
    answers: list[Answer] = [None, None, (200, {"name": "j", "state": "JOB_STATE_RUNNING"})]
    server.answer = lambda method, path: answers.pop(0)
    assert control.job("j", 10.0) == {"name": "j", "state": "JOB_STATE_RUNNING"}


def test_asking_again_ends_with_the_deadline_and_says_what_was_wrong(server, control):
    control.account_id()
    server.answer = lambda method, path: None
    with pytest.raises(ProvisioningError, match=r"looking at trainer j failed.*(disconnected|no answer within 1 s)"):
        control.job("j", 1.0)


def test_only_a_broken_connection_is_asked_again():
    errors: list[Exception] = [httpx.ReadError("gone"), ValueError("two accounts"), httpx.ReadError("gone")]

    def fail() -> None:
        raise errors.pop(0)

    with pytest.raises(ValueError, match="two accounts"):
        insist(fail, Deadline(10.0))
    assert len(errors) == 1


@pytest.mark.parametrize(("status", "refused"), [(400, True), (404, True), (409, True), (401, False), (429, False)])
def test_a_refusal_is_about_what_was_asked_and_for_good(server, control, status, refused):
    server.answer = lambda method, path: (status, {"error": {"message": "no"}})
    with pytest.raises(ProvisioningError) as raised:
        control.delete_checkpoint("j", "c", "state", 0.5) if status != 404 else control.list_jobs(0.5)
    assert is_refused(raised.value) is refused
