"""Reference logprobs of pairs on disk: computed once, and used by every run on the same model and data.

How they are computed ahead of training is in cookbook/reference_filler.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cookbook.data.pair_datums import pair_datums, response_logprobs
from cookbook.errors import CheckpointError, DataError
from cookbook.files import file_lock
from cookbook.losses.preference import PairReference

if TYPE_CHECKING:
    from torch import Tensor

    from cookbook.client import ReconnectableClient
    from cookbook.data.pairs import RenderedPair

__all__ = ["CACHE_FOLDER", "ReferenceCache", "check_reference_cache", "pair_references"]

CACHE_FOLDER = "reference_logprobs"
VERSION = 1

_LOCK_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


class ReferenceCache:
    """Summed reference logprobs by the digest of a pair, in `pairs.jsonl`. Any number of threads and processes may use
    one file: what was written first is what all of them use, so that what a run used is what is on the disk.

    >>> cache = ReferenceCache.open(home, model_fingerprint=model, data_fingerprint=data)  # doctest: +SKIP
    >>> cache.get(pair.digest)  # doctest: +SKIP
    PairReference(chosen=-12.5, rejected=-14.25)
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = dict(header)
        self._found: dict[str, PairReference] = {}
        self._offset = 0  # bytes of the file that are in `_found`
        self._num_lines = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, home: Path, *, model_fingerprint: str, data_fingerprint: str, base_model: str = "") -> Self:
        """Open the cache of a model and a data set; make it when there is none.

        Args:
            home: COOKBOOK_HOME.
            model_fingerprint: of all that changes the reference's numbers:
                `cookbook.models.fingerprint.reference_fingerprint`.
            data_fingerprint: of the rendered pairs.
            base_model: for whoever reads the file.

        Raises:
            DataError: the file is damaged, or is that of another model or of other data; names file and line.
            CheckpointError: the file cannot be read or written.
        """
        identity = {"version": VERSION, "model_fingerprint": model_fingerprint, "data_fingerprint": data_fingerprint}
        key = hashlib.sha256(f"{model_fingerprint}\n{data_fingerprint}".encode()).hexdigest()[:16]
        cache = cls(home / CACHE_FOLDER / key / "pairs.jsonl", {**identity, "base_model": base_model})
        cache.put({})
        return cache

    def __len__(self) -> int:
        with self._lock:
            return len(self._found)

    def __contains__(self, digest: str) -> bool:
        return self.get(digest) is not None

    def __getitem__(self, digest: str) -> PairReference:
        """The reference logprobs of a pair.

        Raises:
            DataError: they were not computed yet.
        """
        found = self.get(digest)
        if found is None:
            raise DataError(f"{self.path} has no reference logprobs of pair {digest}. Compute them first.")
        return found

    def get(self, digest: str) -> PairReference | None:
        """The reference logprobs of a pair, or None when they were not computed yet."""
        with self._lock:
            return self._found.get(digest)

    def put(self, references: Mapping[str, PairReference]) -> None:
        """Add pairs, and wait until they are on the disk. One that is there already, also since a moment ago from
        another process, stays as it is.

        Raises:
            DataError: the file is damaged, or a logprob is not a finite number.
            CheckpointError: the file cannot be read or written; what was there is kept.
        """
        broken = {digest: pair for digest, pair in references.items() if not pair.is_finite}
        if broken:
            raise DataError(
                f"the reference has logprobs that are not finite numbers: {broken}. Look at base_model and at the rows "
                "of these pairs; nothing of them was kept."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, file_lock(self.path.with_name(".lock"), _LOCK_TIMEOUT_S):
                self._catch_up()
                new = [(digest, pair) for digest, pair in references.items() if digest not in self._found]
                lines = [{"pair": digest, "chosen": pair.chosen, "rejected": pair.rejected} for digest, pair in new]
                self._append(lines if self._num_lines else [self._header, *lines])
                self._found.update(new)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be used: {error.strerror or error}. Free space or fix the permissions; "
                "what was there is kept."
            ) from error

    def _catch_up(self) -> None:
        """Read what others have appended, and cut a line that was not written to its end. Under the lock."""
        if not self.path.exists() and self._num_lines == 0:
            return
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                raise self._damaged("has become shorter while it was in use")
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if torn := len(content) - len(whole):
            logger.warning("%s: cut a torn last line of %d bytes", self.path, torn)
            os.truncate(self.path, self._offset + len(whole))
        for line in whole.splitlines():
            self._num_lines += 1
            if self._num_lines == 1:
                self._check_header(line)
            else:
                digest, pair = self._entry(line)
                self._found.setdefault(digest, pair)
        self._offset += len(whole)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        """Under the lock, and only after `_catch_up`: `_offset` is the end of the file."""
        if not rows:
            return
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], self._offset + written)
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self._offset)
            raise
        finally:
            os.close(descriptor)
        self._offset += len(content)
        self._num_lines += len(rows)

    def _check_header(self, line: bytes) -> None:
        found = _object(line)
        if found is None or "version" not in found:
            raise self._damaged(f"does not begin with a header: {line[:80]!r}", line=1)
        for name in ("version", "model_fingerprint", "data_fingerprint"):
            if found.get(name) != self._header[name]:
                raise DataError(
                    f"{self.path}, line 1 is stale: it was made with {name} {found.get(name)!r}, this run has "
                    f"{self._header[name]!r}. Delete the file; its numbers are computed again."
                )

    def _entry(self, line: bytes) -> tuple[str, PairReference]:
        row = _object(line) or {}
        digest, chosen, rejected = (row.get(name) for name in ("pair", "chosen", "rejected"))
        if isinstance(digest, str) and isinstance(chosen, float) and isinstance(rejected, float):
            pair = PairReference(chosen, rejected)
            if pair.is_finite:
                return digest, pair
        raise self._damaged(f"is damaged: {line[:80]!r}", line=self._num_lines)

    def _damaged(self, what: str, *, line: int | None = None) -> DataError:
        where = f"{self.path}" if line is None else f"{self.path}, line {line}"
        return DataError(f"{where} {what}. Delete the file; its numbers are computed again.")


def pair_references(pairs: Sequence[RenderedPair], logprobs: Sequence[Tensor]) -> list[PairReference]:
    """What the reference answered to `pair_datums(pairs)`, summed over the response tokens in float64.

    Args:
        logprobs: float32 (N-1,) a datum, of all targets in nats, as `Reference.logprobs` gives them.

    Raises:
        ShapeError: as for `response_logprobs`.
    """
    return [PairReference(_sum(chosen), _sum(rejected)) for chosen, rejected in response_logprobs(pairs, logprobs)]


def check_reference_cache(
    cache: ReferenceCache,
    client: ReconnectableClient,
    pairs: Iterable[RenderedPair],
    tolerance: float = 0.1,
    *,
    timeout_s: float | None = None,
) -> float | None:
    """Compute one cached pair again with a policy that was not trained yet, which is the reference.

    Args:
        client: of a policy whose weights are those of the base model.
        pairs: read lazily, up to the first one that is in the cache.
        tolerance: nats a token, in the mean over an answer: far above what another precision does.
        timeout_s: seconds for the answer; None = the client's default.

    Returns:
        The larger difference of the two answers, in nats a token; None when no pair is in the cache.

    Raises:
        DataError: it is larger than `tolerance`: the cache is of another model. Names the file and both values.
        RequestRejected, TrainerLost: as for `ReconnectableClient.forward`.
    """
    pair = next((pair for pair in pairs if pair.digest in cache), None) if len(cache) else None
    if pair is None:
        return None
    cached = cache[pair.digest]
    outputs = client.forward(pair_datums([pair]), "cross_entropy", timeout_s=timeout_s).loss_fn_outputs
    (found,) = pair_references([pair], [output["logprobs"].to_torch() for output in outputs])
    difference = max(
        abs(found.chosen - cached.chosen) / pair.chosen.num_trained,
        abs(found.rejected - cached.rejected) / pair.rejected.num_trained,
    )
    if not difference <= tolerance:
        raise DataError(
            f"{cache.path} is stale: it has chosen {cached.chosen:.4f} and rejected {cached.rejected:.4f} for pair "
            f"{pair.digest}, the untrained model of this run gives {found.chosen:.4f} and {found.rejected:.4f} nats, "
            f"{difference:.3g} nats a token apart (at most {tolerance:g}). Delete the file; its numbers are computed "
            "again."
        )
    return difference


def _sum(logprobs: Tensor) -> float:
    return math.fsum(logprobs.detach().double().tolist())


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
