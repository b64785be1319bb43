"""`cookbook doctor`: what a run needs on this machine, one line each, with what to do where something is missing.

Keys are looked for, and never shown.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cookbook.cli.output import EXIT_FAILED, HomeOption, JsonOption, home_folder, print_json
from cookbook.errors import CookbookError

if TYPE_CHECKING:
    from cookbook.config import Environment

__all__ = ["Check", "doctor"]

DISTRIBUTION = "cookbook-flows"
MIN_FREE_GIB = 5.0
PREFECT_TIMEOUT_S = 60

KNOWN_BAD = {
    "fastapi": "with fastapi 0.151 and later Prefect's server does not start",
    "sqlalchemy": "with SQLAlchemy 2.1 and later Prefect's schedules create no runs",
    "prefect": "other versions were not tried with this set",
}
"""Why a package is bounded, where it is not obvious."""

API_URL_SCRIPT = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value() or '')"
"""Run in a process of its own: Prefect knows profiles as well as variables, and takes a second to import."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    state: str
    """"ok", "note" (works, but worth knowing) or "fail"."""
    found: str
    remedy: str = ""


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check what a run needs on this machine: packages, torch, disk, backend, models, Prefect, keys.

    Exits with 1 when a check fails.
    """
    from cookbook.config import environment

    env, folder = environment(), home_folder(home)
    checks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _packages,
        _torch,
        lambda: _home(folder),
        lambda: _backend(folder),
        lambda: _models(folder),
        _prefect,
        lambda: _keys(env),
    ]
    done = []
    for check in checks:
        for result in check():
            done.append(result)
            if not as_json:
                _show(result)
    if as_json:
        print_json([asdict(result) for result in done])
    if any(result.state == "fail" for result in done):
        raise typer.Exit(EXIT_FAILED)


def _show(check: Check) -> None:
    colors = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "fail": typer.colors.RED}
    typer.secho(f"{check.state:<5}", fg=colors[check.state], nl=False)
    typer.echo(f" {check.name:<16} {check.found}" + (f". {check.remedy}" if check.remedy else ""))


def _python() -> Iterator[Check]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "fail", version, "" if good else "Use Python 3.11 or later.")


def _packages() -> Iterator[Check]:
    """Installed versions against what the project itself requires."""
    from importlib import metadata

    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    bad = []
    for requirement in needed:
        check = _package(requirement.name, str(requirement.specifier))
        if check is not None:
            bad.append(check)
    yield from bad
    pinned = ", ".join(f"{name} {metadata.version(name)}" for name in ("prefect", "fireworks-ai", "torch"))
    if not bad:
        yield Check("packages", "ok", f"{len(needed)} as required ({pinned})")


def _package(name: str, specifier: str) -> Check | None:
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    remedy = "Run `pip install -c constraints.txt -e .` in the project's folder."
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", remedy)
    if SpecifierSet(specifier).contains(version, prereleases=True):
        return None
    why = KNOWN_BAD.get(name.lower())
    return Check(name, "fail", f"{version}, needed is {specifier}" + (f": {why}" if why else ""), remedy)


def _torch() -> Iterator[Check]:
    import torch

    kinds = torch.cpu.get_capabilities()
    if kinds.get("amx_tile"):
        bf16 = "bfloat16 in hardware (AMX)"
    elif kinds.get("avx512_bf16"):
        bf16 = "bfloat16 in hardware (AVX-512)"
    else:
        bf16 = "no bfloat16 in hardware, so the embedded trainer computes in float32"
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {bf16}")


def _home(folder: Path) -> Iterator[Check]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Check("home", "fail", f"{folder} cannot be written", "Set COOKBOOK_HOME to another folder.")
        return
    free = shutil.disk_usage(existing).free / 2**30
    low = free < MIN_FREE_GIB
    remedy = f"Checkpoints need space: free {MIN_FREE_GIB:.0f} GiB or more." if low else ""
    yield Check("home", "note" if low else "ok", f"{folder}, {free:,.1f} GiB free", remedy)


def _backend(folder: Path) -> Iterator[Check]:
    from cookbook import embedded

    version = embedded.code_version()
    try:
        state = embedded.status(folder)
    except CookbookError as error:
        yield Check("backend", "fail", f"{error}")
        return
    where = f"running at {state.base_url}" if state is not None else "not running; a run starts it"
    yield Check("backend", "ok", f"{where} (version {version})")


def _models(folder: Path) -> Iterator[Check]:
    from cookbook.models.folders import list_models

    try:
        names = [model.name for model in list_models(folder / "models")]
    except CookbookError as error:
        yield Check("models", "fail", f"{error}")
        return
    remedy = "" if names else "Get one with `cookbook models pull smollm2-135m-instruct`."
    yield Check("models", "ok" if names else "note", ", ".join(names) or "none on this machine", remedy)


def _prefect() -> Iterator[Check]:
    import httpx

    command = [sys.executable, "-c", API_URL_SCRIPT]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PREFECT_TIMEOUT_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        stderr = error.stderr if isinstance(error.stderr, str) else ""
        reason = (stderr.strip().splitlines() or [type(error).__name__])[-1]
        yield Check("prefect", "fail", f"cannot be imported: {reason}", "See the packages above.")
        return
    url = asked.stdout.strip()
    if not url:
        yield Check("prefect", "ok", "no server is set: each run has a temporary one (about 10 s more)")
        return
    try:
        answer = str(httpx.get(f"{url}/health", timeout=5).status_code)
    except httpx.HTTPError as error:
        answer = type(error).__name__
    remedy = "Start it with `prefect server start`, or unset PREFECT_API_URL for a temporary server."
    yield (
        Check("prefect", "ok", url) if answer == "200" else Check("prefect", "fail", f"{url} answers {answer}", remedy)
    )


def _keys(env: Environment) -> Iterator[Check]:
    found = "key set" if env.fireworks_api_key else "no key in FIREWORKS_API_KEY; only needed for backend: fireworks"
    yield Check("fireworks", "ok", f"{found} ({env.fireworks_base_url})")
    key = "key found" if env.wandb_key_present else "no key"
    yield Check("wandb", "ok", f"mode {env.wandb_mode}, {key}; off unless wandb.project is set")
