"""A trainer that misbehaves on demand: just enough of the wire protocol for the real SDK, over real sockets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any]]
Behaviour = Callable[[dict[str, Any]], Answer]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up: nothing to print."""


class HostileTrainer:
    """Serves one trainer job. `behave[name] = function(body) -> (status, answer)` replaces an endpoint; names are the
    last part of the path. `hang` is a behaviour: the request stays open until `released` is set. Status 0 closes the
    connection without an answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.behave: dict[str, Behaviour] = {}
        self.released = threading.Event()
        self.results: dict[str, dict[str, Any]] = {}
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def names(self) -> list[str]:
        """The endpoints that were asked for, in order."""
        return [name for name, _ in self.requests]

    def hang(self, body: dict[str, Any]) -> Answer:
        self.released.wait()
        return 503, {"detail": "released"}

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _default(self, name: str, body: dict[str, Any]) -> Answer:
        if name == "accounts":
            return 200, {"accounts": [{"name": "accounts/local"}]}
        if name == "create_session":
            return 200, {"type": "create_session", "session_id": "session-1"}
        if name == "retrieve_future":
            return 200, self.results[body["request_id"]]
        request_id = f"{name}-{body.get('seq_id', 0)}"
        self.results.setdefault(request_id, self._result(name))
        return 200, {"request_id": request_id}

    def _result(self, name: str) -> dict[str, Any]:
        if name == "create_model":
            return {"model_id": "model-1", "type": "create_model"}
        if name in ("forward", "forward_backward"):
            return {"loss_fn_output_type": "TorchLossReturn", "loss_fn_outputs": [], "metrics": {"loss:sum": 1.0}}
        return {"metrics": {}, "path": "saved", "type": name}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        trainer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                name = self.path.partition("?")[0].rsplit("/", 1)[-1]
                trainer.requests.append((name, body))
                behaviour = trainer.behave.get(name)
                status, answer = behaviour(body) if behaviour else trainer._default(name, body)
                if status == 0:
                    self.close_connection = True
                    return
                content = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("x-request-id", "req-7")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = do_PATCH = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class HeldSaves:
    """Holds the hostile trainer's answers to saves of state back until `answer` is set; then they are `result`, except
    those to the request ids in `never`."""

    def __init__(self, hostile: HostileTrainer) -> None:
        self.answer = threading.Event()
        self.asked = threading.Event()
        self.result: dict[str, Any] = {"path": "saved", "type": "save_weights"}
        self.never: set[str] = set()
        self._hostile = hostile
        hostile.behave["retrieve_future"] = self._retrieve

    def _retrieve(self, body: dict[str, Any]) -> Answer:
        if not body["request_id"].startswith("save_weights-"):
            return self._hostile._default("retrieve_future", body)
        self.asked.set()
        while not self.answer.wait(0.05) or body["request_id"] in self.never:
            time.sleep(0.02)
            if self._hostile.released.is_set():
                return 410, {"detail": "the test is over"}
        return 200, self.result
