"""A mirror at its URL: objects named by their content, and pointers that say which objects a run directory consists of.

    URL/objects/<sha256>                        a file's content; written once, never changed
    URL/pointers/<epoch>-<sequence>.json        run id, lease epoch, time, and each file's size and sha256

A pointer is written under a name of its own and last, so the newest whole one always describes a whole run directory,
on any file system: a half-written one is not whole and does not count. Who writes what, and when: cookbook/mirror.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from cookbook.errors import CheckpointError, CookbookError
from cookbook.mirror_url import OBJECT_STORES, refuse_credentials, without_credentials

__all__ = ["CHUNK_BYTES", "MirrorStore", "MirroredFile", "Pointer"]

CHUNK_BYTES = 2**20

_FORMAT = 1
_POINTER_NAME = re.compile(r"(\d{8})-(\d{8})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class MirroredFile:
    """One file of a run directory."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Pointer:
    """One whole state of a run directory."""

    run_id: str
    recipe: str
    epoch: int
    """Lease epoch of the process that wrote it."""
    sequence: int
    """Above that of every pointer written before."""
    time: str
    """UTC, ISO 8601."""
    host: str
    path: str
    """The run directory that it was made of, on `host`."""
    commit: str | None
    """The checkpoint that this state goes on from; None = nothing was committed."""
    step: int | None
    """Of that checkpoint."""
    files: Mapping[str, MirroredFile] = field(default_factory=dict)
    """Path in the run directory, with forward slashes -> its content."""

    @property
    def name(self) -> str:
        """Name of its file; the newest pointer has the last one."""
        return f"{self.epoch:08d}-{self.sequence:08d}.json"

    @property
    def digest(self) -> str:
        """sha256 of all that it says."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """Its file: JSON, with its own digest."""
        return json.dumps({"format": _FORMAT, "sha256": self.digest, "pointer": json.loads(self._text())}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read its file back.

        Raises:
            ValueError: the file is torn or damaged, or another version of the code wrote it.
        """
        try:
            whole = json.loads(content)
            values = whole["pointer"]
            files = {_checked_path(path): MirroredFile(**entry) for path, entry in values["files"].items()}
            pointer = cls(**{**values, "files": files})
            if whole["format"] != _FORMAT or pointer.digest != whole["sha256"]:
                raise ValueError("its digest is not that of its content")
            if not all(_SHA256.fullmatch(entry.sha256) for entry in files.values()):
                raise ValueError("it names an object that is none")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks {error}") from None
        return pointer

    def _text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class MirrorStore:
    """The objects and pointers at one URL. Every error is a CheckpointError without the URL's credentials."""

    def __init__(self, url: str) -> None:
        """Open the file system; some look for credentials then, over the network.

        Raises:
            CredentialsError: there are credentials in the URL.
            CheckpointError: the file system cannot be opened.
        """
        refuse_credentials(url)
        self.url = url
        with self._errors("opening it"):
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(url, skip_instance_cache=True)
        self._root = str(root).rstrip("/")
        self._has_folders = urlsplit(url).scheme.lower() not in OBJECT_STORES

    def newest(self) -> tuple[Pointer | None, list[str]]:
        """The newest whole pointer, and the files of those after it that are not whole."""
        torn: list[str] = []
        for name in reversed(self._pointer_names()):
            try:
                return Pointer.from_bytes(self._read(f"pointers/{name}")), torn
            except FileNotFoundError:  # dropped this moment, by the writer of a newer one
                continue
            except ValueError:
                torn.append(f"pointers/{name}")
        return None, torn

    def next_sequence(self) -> int:
        """A sequence number that no pointer has, whole or not."""
        return max((int(name[9:17]) for name in self._pointer_names()), default=0) + 1

    def write_pointer(self, pointer: Pointer) -> None:
        """Write a pointer, and read it back.

        Raises:
            CheckpointError: it cannot be written, or comes back otherwise.
        """
        path = f"pointers/{pointer.name}"
        self._write(path, [pointer.to_bytes()])
        try:
            is_same = Pointer.from_bytes(self._read(path)) == pointer
        except (FileNotFoundError, ValueError):
            is_same = False
        if not is_same:
            raise CheckpointError(f"{path} of the mirror {self.url} was written, but comes back otherwise.")

    def write_object(self, entry: MirroredFile, chunks: Iterable[bytes]) -> None:
        """Write an object, and look at its size."""
        path = f"objects/{entry.sha256}"
        self._write(path, chunks)
        with self._errors(f"looking at {path}", may_be_missing=False):
            self._fs.invalidate_cache()
            size = self._fs.info(self._at(path))["size"]
        if size != entry.size:
            raise CheckpointError(f"{path} of the mirror {self.url} has {size} bytes instead of {entry.size}.")

    def object_sizes(self) -> dict[str, int | None]:
        """sha256 -> bytes, of every object."""
        return {name: size for name, size in self._listed("objects").items() if _SHA256.fullmatch(name)}

    def read_object(self, sha256: str, write: Callable[[bytes], object]) -> None:
        """Give an object to `write`, in pieces.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be read.
        """
        path = f"objects/{sha256}"
        with self._errors(f"reading {path}"), self._fs.open(self._at(path), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                write(chunk)

    def drop_all_but(self, pointer: Pointer, objects: Iterable[str]) -> None:
        """Delete every older pointer, and then those of `objects` that this one does not name.

        Nothing goes once a newer pointer is there, be it half-written: another process has taken over meanwhile.

        Args:
            objects: those that were there before this copy began; what came since may be a newer owner's.
        """
        if self.newest() != (pointer, []):
            return
        older = [name for name in self._pointer_names() if name < pointer.name]
        for name in older:
            self._remove(f"pointers/{name}")
        named = {entry.sha256 for entry in pointer.files.values()}
        for name in objects:
            if name not in named:
                self._remove(f"objects/{name}")

    def _pointer_names(self) -> list[str]:
        return sorted(name for name in self._listed("pointers") if _POINTER_NAME.fullmatch(name))

    def _listed(self, folder: str) -> dict[str, int | None]:
        """Name -> bytes."""
        with self._errors(f"listing {folder}"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
        return {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry.get("size") for entry in found}

    def _read(self, path: str) -> bytes:
        with self._errors(f"reading {path}"):
            return bytes(self._fs.cat_file(self._at(path)))

    def _write(self, path: str, chunks: Iterable[bytes]) -> None:
        with self._errors(f"writing {path}", may_be_missing=False):
            if self._has_folders:
                self._fs.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
            with self._fs.open(self._at(path), "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                with suppress(io.UnsupportedOperation):  # a local disk can, others need not
                    os.fsync(file.fileno())

    def _remove(self, path: str) -> None:
        with self._errors(f"deleting {path}"), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    @contextmanager
    def _errors(self, doing: str, *, may_be_missing: bool = True) -> Iterator[None]:
        """Name the mirror and what was done. Our own errors pass, and FileNotFoundError where that is an answer."""
        try:
            yield
        except CookbookError:
            raise
        except Exception as error:  # a file system may raise anything
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            words = without_credentials(f"{type(error).__name__}: {error}")[:500]
        else:
            return
        raise CheckpointError(f"the mirror {self.url} failed while {doing}: {words}")


def _checked_path(path: Any) -> str:
    """A path of a run directory. ValueError when it would lead out of it."""
    parts = str(path).split("/")
    if not isinstance(path, str) or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(f"it names a file that cannot be in a run directory: {path!r}")
    return path
