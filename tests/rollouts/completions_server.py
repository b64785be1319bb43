"""A completions server in a thread: the wire of sampling, and answers that follow from prompt and seed."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

__all__ = ["END_OF_TURN", "MODEL", "CompletionsServer", "random_answer"]

MODEL = "accounts/local/deployments/dep"
END_OF_TURN = 259
"""<|im_end|> of the tiny model's tokenizer, whose other tokens are bytes."""

Body = dict[str, Any]


def random_answer(body: Body) -> str:
    """Some letters that follow from prompt and seed."""
    generator = random.Random(f"{body['prompt']}/{body['seed']}")
    return "".join(generator.choice("abcdef") for _ in range(generator.randint(1, 8)))


class CompletionsServer:
    """Answers POST /inference/v1/completions. The public attributes change what it does, at any time."""

    def __init__(self) -> None:
        self.answer: Callable[[Body], str] = random_answer
        self.version: str | None = ""
        """Snapshot that is served; None = the answers do not say."""
        self.intercept: Callable[[Body], Response | None] = lambda body: None
        """Gives another answer instead."""
        self.edit: Callable[[Body], None] = lambda choice: None
        """Changes the choice of an answer before it is sent."""
        self.delay_s: Callable[[Body], float] = lambda body: 0.0
        self.hold: Callable[[Body], bool] = lambda body: False
        """Which requests are not answered until `resume`."""
        self.bodies: list[Body] = []
        self.in_flight = self.most_in_flight = self.hung_up = 0
        self._resumed = asyncio.Event()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        app = Starlette(routes=[Route("/inference/v1/completions", self._completions, methods=["POST"])])
        config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])
        await asyncio.sleep(0.05)  # closed transports give up their sockets

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def prompts(self) -> list[str]:
        """Prompts as text, in the order in which requests came in."""
        return [bytes(token for token in body["prompt"] if token < 256).decode() for body in self.bodies]

    def resume(self) -> None:
        """Answer what is held, and hold nothing more."""
        self.hold = lambda body: False
        self._loop.call_soon_threadsafe(self._resumed.set)

    def __enter__(self) -> Self:
        while not self._server.started:
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if not await self._generated(request, body):
                self.hung_up += 1
                return Response(status_code=499)
            return self.intercept(body) or self._sse(body)
        except Exception as error:  # to be seen in the test, not lost in the server
            return JSONResponse({"error": {"message": repr(error)}}, 400)
        finally:
            self.in_flight -= 1

    async def _generated(self, request: Request, body: Body) -> bool:
        """Wait as long as an answer takes; False when the client hangs up before."""

        async def generate() -> None:
            await asyncio.sleep(self.delay_s(body))
            if self.hold(body):
                await self._resumed.wait()

        async def hang_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        generation, end = asyncio.create_task(generate()), asyncio.create_task(hang_up())
        await asyncio.wait({generation, end}, return_when=asyncio.FIRST_COMPLETED)
        is_done = generation.done()
        for task in (generation, end):
            task.cancel()
        await asyncio.gather(generation, end, return_exceptions=True)
        return is_done

    def _sse(self, body: Body) -> Response:
        text = self.answer(body)
        tokens = [*text.encode(), END_OF_TURN]
        is_cut = len(tokens) > body["max_tokens"]
        tokens = tokens[: body["max_tokens"]]
        generator = random.Random(f"{body['prompt']}/{body['seed']}/logprobs")
        raw = [-generator.random() for _ in tokens]
        content = [
            {"token": "", "token_id": token, "logprob": value, "sampling_logprob": value / body["temperature"]}
            for token, value in zip(tokens, raw, strict=True)
        ]
        choice = {
            "index": 0,
            "text": bytes(token for token in tokens if token < 256).decode(),
            "finish_reason": "length" if is_cut else "stop",
            "raw_output": {"completion_token_ids": tokens, "prompt_token_ids": body["prompt"]},
            "logprobs": {"content": content},
        }
        self.edit(choice)
        chunk = {
            "id": "chat-1" if self.version is None else f"cmpl-{len(self.bodies):x}.{self.version}",
            "choices": [choice],
            "perf_metrics": {"prefill-queue-duration": "0.01"},
        }
        return Response(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")
