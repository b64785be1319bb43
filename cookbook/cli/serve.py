"""`cookbook serve`: models behind an OpenAI-compatible address on this machine."""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import HomeOption, JsonOption, note, print_json
from cookbook.cli.sessions import BackendOption, ShapeOption, deploy_config, session_on
from cookbook.errors import ConfigError, LeaseLost, Problem

if TYPE_CHECKING:
    from cookbook.config import DeployConfig
    from cookbook.sessions import Session

__all__ = ["serve"]

HOST = "127.0.0.1"
KEY_VARIABLE = "COOKBOOK_SERVE_API_KEY"

KEEP_ALIVE_S = 60.0
_STOP_WAIT_S = 5.0
_GRACE_S = 3  # for answers that are being sent when the server is told to end


def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="Names of `cookbook models list`, folders, or model resources.", metavar="MODEL..."),
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1. 0 = any that is free.", min=0, max=65535)] = 8000,
    backend: BackendOption = "embedded",
    shape: ShapeOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve models to OpenAI clients on this machine, until Ctrl-C.

    Clients send the key of COOKBOOK_SERVE_API_KEY, which is never shown; without that variable one is made up and shown
    once (--json: api_key, else null). The deployments are kept alive while this runs, and freed at the end.
    """
    from cookbook.config import environment

    if len(set(models)) < len(models):
        raise ConfigError([Problem("MODEL", f"{', '.join(models)}: one is named twice.", "Name each once.")])
    given_key = environment().serve_api_key
    key = given_key or secrets.token_urlsafe(24)
    note(f"loading {', '.join(models)} on the {backend} backend; the first time after a while takes longest ...")
    with _bound(port) as listener, session_on(backend, "serve", home) as session:
        keeper = _Keeper(session, models, deploy_config(shape))
        keeper.deploy_all()
        listener.listen(128)
        url = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        if as_json:
            print_json({"base_url": url, "api_key": None if given_key else key, "models": models})
        else:
            typer.echo(_how_to_use(url, models[0], None if given_key else key))
        sys.stdout.flush()
        with keeper:
            _serve(session, keeper, listener, key)


def _bound(port: int) -> socket.socket:
    """A socket on the port, so that a port that is taken is known before any model is loaded."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        what = f"{HOST}:{port} cannot be had: {error.strerror}."
        raise ConfigError([Problem("--port", what, "Choose another one; 0 takes any that is free.")]) from error
    return listener


def _serve(session: Session, keeper: _Keeper, listener: socket.socket, key: str) -> None:
    """Serve until SIGINT or SIGTERM, which are raised again when the server has ended."""
    import asyncio

    import uvicorn

    from cookbook.serve import ServeApp

    async def run() -> None:
        async with session.control.async_completions_client() as client:
            app = ServeApp(keeper.served, client=client, api_key=key, on_gone=keeper.look_now)
            config = uvicorn.Config(
                app.asgi, log_level="warning", lifespan="off", access_log=False, timeout_graceful_shutdown=_GRACE_S
            )
            await uvicorn.Server(config).serve(sockets=[listener])

    asyncio.run(run())


class _Keeper:
    """Deploys the models, and has each answer a token now and then: one that is gone is made anew.

    A context manager: while it is entered, a thread does so. `served` has the deployments' names as models.
    """

    def __init__(self, session: Session, models: list[str], deployment: DeployConfig) -> None:
        self.served: dict[str, str] = {}
        self._session = session
        self._models = models
        self._deployment = deployment
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cookbook-keep-alive", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(_STOP_WAIT_S)

    def look_now(self, model: str) -> None:
        """Look after the deployments at once, as this model's does not answer."""
        self._wake.set()

    def deploy_all(self) -> None:
        """Have all models ready, telling how long each took.

        Raises:
            ProvisioningError, ModelError, ConfigError, LeaseLost: as for `deploy_model`.
        """
        for model in self._models:
            started = time.monotonic()
            self._deploy(model)
            note(f"{model} is ready ({time.monotonic() - started:.1f} s)")

    def _deploy(self, model: str) -> None:
        role = f"model-{self._models.index(model) + 1}"
        name = self._session.deploy(model, self._deployment, role=role).model
        if self.served.get(model) not in (None, name):
            note(f"{model} was gone, and is back")
        self.served[model] = name

    def _work(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(KEEP_ALIVE_S)
            self._wake.clear()
            for model in self._models:
                if self._ended.is_set():
                    return
                try:
                    self._deploy(model)
                except LeaseLost:
                    return
                except Exception as error:  # whatever it is, the next look may do better
                    if self._ended.is_set():
                        return  # the connections were closed under it
                    note(f"{model} does not answer: {error}")


def _how_to_use(url: str, model: str, key: str | None) -> str:
    """What to paste into a shell and into Python. `key`: the one that was made up; None = the variable has it."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return "\n".join(
        [
            f"Serving at {url} until Ctrl-C.",
            "",
            f"# {KEY_VARIABLE} has the key" if key is None else f"export {KEY_VARIABLE}={key}",
            f'curl {url}/chat/completions -H "Authorization: Bearer ${KEY_VARIABLE}" \\',
            f"  -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
            "import os",
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{url}", api_key=os.environ["{KEY_VARIABLE}"])',
            'messages = [{"role": "user", "content": "Hello"}]',
            f"answer = client.chat.completions.create(model={json.dumps(model)}, messages=messages)",
            "print(answer.choices[0].message.content)",
        ]
    )
