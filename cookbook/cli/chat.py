"""`cookbook chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
import unicodedata
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import HomeOption, note
from cookbook.cli.sessions import BackendOption, ShapeOption, deploy_config, session_on
from cookbook.errors import CookbookError, RequestRejected

if TYPE_CHECKING:
    import httpx

    from cookbook.completions import Answer, SamplingOptions
    from cookbook.config import DeployConfig
    from cookbook.sessions import Session

__all__ = ["chat"]

PROMPT = "> "
HELP = """\
/system TEXT  set the system message, from the next question on; /system alone shows it
/reset        forget the conversation; the system message stays
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops the answer; once more, it leaves."""
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def chat(
    model: Annotated[str, typer.Argument(help="A name of `cookbook models list`, a folder, or a model resource.")],
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=10, help="Sampling temperature; 0 = always the likeliest token.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: up to the context.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling: the same answer every time.")] = None,
    backend: BackendOption = "embedded",
    shape: ShapeOption = None,
    home: HomeOption = None,
) -> None:
    """Chat with a model: base, promoted, or an adapter. It is deployed for the chat and freed at the end.

    Through a pipe, each line is a question as if typed, and stdout has the answers alone.
    """
    from cookbook.completions import SamplingOptions

    note(f"loading {model} on the {backend} backend; the first time after a while takes longest ...")
    with session_on(backend, "chat", home) as session:
        options = SamplingOptions(temperature=temperature, max_tokens=max_tokens, seed=seed)
        talk = _Talk(session, model, deploy_config(shape), options, system)
        with talk.client:
            _interactive(talk) if sys.stdin.isatty() else _piped(talk)


def _interactive(talk: _Talk) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())

    note("Ask something. /help lists the commands, Ctrl-D leaves.")
    interrupted = False
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            if interrupted:
                raise KeyboardInterrupt("") from None
            note("\nCtrl-C once more leaves; so does Ctrl-D.")
            interrupted = True
            continue
        interrupted = False
        try:
            if not talk.take(line):
                return
        except KeyboardInterrupt:
            interrupted = True
            note("\n(stopped)")
        except CookbookError as error:
            note(f"error: {error}")


def _piped(talk: _Talk) -> None:
    """One question a line; the first that has no answer ends it."""
    for line in sys.stdin:
        if not talk.take(line):
            return


class _Talk:
    """A conversation with a deployed model: what was said so far, and the commands."""

    def __init__(
        self, session: Session, model: str, deployment: DeployConfig, options: SamplingOptions, system: str | None
    ) -> None:
        self._session = session
        self._model = model
        self._deployment = deployment
        self._options = options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._name = self._deploy()
        self.client: httpx.Client = session.control.completions_client()

    def take(self, line: str) -> bool:
        """Do what a line says. False when it says to leave.

        Raises:
            RequestRejected, SamplingError: there is no answer; the conversation is as it was before the question.
            KeyboardInterrupt: the answer was stopped; what there is of it stays in the conversation.
        """
        text = line.strip()
        command, _, rest = text.partition(" ")
        if not text.startswith("/"):
            if text:
                self._ask(text)
        elif command == "/exit":
            return False
        elif command == "/reset":
            self._turns = []
            note("The conversation is forgotten.")
        elif command == "/system":
            self._system = rest.strip() or self._system
            note(f"system: {self._system or 'none'}")
        else:
            note(HELP if command == "/help" else f"there is no command {command}\n{HELP}")
        return True

    def _ask(self, question: str) -> None:
        turns = [*self._turns, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer = self._answer([*system, *turns])
        if answer.finish_reason == "length":
            note(_why_cut(answer, self._options.max_tokens))
        self._turns = [*turns, {"role": "assistant", "content": answer.text}]

    def _answer(self, messages: list[dict[str, str]]) -> Answer:
        """Show an answer as it comes. A deployment that was freed while nobody asked is brought back once."""
        from cookbook.completions import Answer
        from cookbook.errors import DeploymentLost

        for is_last in (False, True):
            answer = Answer(self.client, self._name, messages, self._options)
            try:
                self._show(answer, messages)
                return answer
            except RequestRejected as error:
                raise RequestRejected(_advice(error)) from error
            except DeploymentLost:
                if is_last or answer.text:
                    raise
                note(f"{self._model} is not there any more: loading it again ...")
                self._name = self._deploy()
        raise AssertionError("unreachable")

    def _show(self, answer: Answer, messages: list[dict[str, str]]) -> None:
        pieces = iter(answer)
        try:
            for piece in pieces:
                sys.stdout.write(_printable(piece) if sys.stdout.isatty() else piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pieces.close()
            if answer.text:
                turns = [message for message in messages if message["role"] != "system"]
                self._turns = [*turns, {"role": "assistant", "content": answer.text}]
            raise
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _deploy(self) -> str:
        started = time.monotonic()
        handle = self._session.deploy(self._model, self._deployment)
        note(f"{self._model} is ready ({time.monotonic() - started:.1f} s)")
        return handle.model


def _why_cut(answer: Answer, max_tokens: int | None) -> str:
    if max_tokens is not None and (answer.num_tokens or 0) >= max_tokens:
        return f"(cut at --max-tokens {max_tokens})"
    return "(cut: the model's context is full. /reset starts a new conversation.)"


def _advice(error: RequestRejected) -> str:
    """What the deployment said, and what can be done. Nothing was dropped from the conversation."""
    if "context" not in str(error):
        return str(error)
    return (
        f"the conversation is too long for the model, and nothing of it was dropped: {error} /reset starts a new one."
    )


def _printable(text: str) -> str:
    """Text without what could steer a terminal or turn the order of what it shows: a model may say anything."""
    return "".join("\ufffd" if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs", "Co") or character in BIDI_CONTROLS
