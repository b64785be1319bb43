"""A deployment's app on a port of this process, with its engine within reach: to hold it up, and to look inside."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from cookbook.backend.deployment.app import DeploymentApp
from cookbook.backend.deployment.engine import Engine, GenerationRequest, Ticket
from cookbook.backend.deployment.spec import read_spec
from cookbook.backend.deployment.tokenizer import TextModel
from cookbook.backend.deployment.weights import HotLoader, base_weights
from tests.wire.deployment_process import write_spec
from tests.wire.trainer_process import TOKEN


@dataclass(frozen=True)
class Served:
    """A running app and what is behind it."""

    engine: Engine
    app: DeploymentApp
    base_url: str
    checkpoints: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, headers={"X-Api-Key": TOKEN}, timeout=60, trust_env=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    @contextlib.contextmanager
    def held(self) -> Iterator[Ticket]:
        """The compute thread stands still in a sequence of its own until the block ends."""
        release, reached = threading.Event(), threading.Event()

        def wait(_tokens: object) -> bool:
            reached.set()
            return release.wait(60)

        ticket = self.engine.submit(GenerationRequest((1, 2, 3), 2, is_complete=wait))
        try:
            assert reached.wait(20)
            yield ticket
        finally:
            release.set()
        ticket.result(20)

    @contextlib.contextmanager
    def slowed(self) -> Iterator[None]:
        """Each token of anybody takes 20 ms while the block runs."""
        ended = threading.Event()
        request = GenerationRequest((1, 2, 3), 500, is_complete=lambda _: ended.wait(0.02))
        ticket = self.engine.submit(request)
        try:
            yield
        finally:
            ended.set()
        ticket.result(20)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Look every 10 ms until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def served(folder: Path, model_dir: Path, /, *, load_hold_s: float = 10.0, **spec: Any) -> Iterator[Served]:
    """The app of a deployment in `folder`, its engine closed at the end."""
    write_spec(folder, model_dir, **spec)
    described = read_spec(folder)
    engine = Engine(
        lambda: base_weights(described),
        "",
        max_batch=described.max_batch,
        max_context=described.max_context_length,
        max_waiting=described.max_waiting,
    )
    text = TextModel(described.base_dir)
    app = DeploymentApp(described, engine, HotLoader(described, engine), text, TOKEN, load_hold_s=load_hold_s)
    config = uvicorn.Config(app.asgi, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(engine, app, f"http://127.0.0.1:{port}", described.checkpoints_dir)
    finally:
        server.should_exit = True
        thread.join(10)
        engine.close()
