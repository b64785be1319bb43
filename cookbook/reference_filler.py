"""Reference logprobs computed in the background, ahead of training, and kept in a ReferenceCache."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cookbook.data.pair_datums import pair_datums
from cookbook.errors import DataError, TrainerLost
from cookbook.reference_cache import ReferenceCache, pair_references

if TYPE_CHECKING:
    from fireworks.training.sdk import Datum

    from cookbook.data.pairs import RenderedPair
    from cookbook.losses.preference import PairReference
    from cookbook.reference import Reference

__all__ = ["ReferenceFiller"]

_CLOSE_TIMEOUT_S = 10.0


class ReferenceFiller:
    """Computes in a thread of its own what a cache lacks, in the order of `pairs`.

    A request holds the next `batch_size` pairs that are missing, whatever the concurrency and the timing, and the
    trainer's numbers depend on the request alone. With batch_size 1 they so depend on the pair alone; with more, on its
    neighbours too, in the last bits.

    The reference belongs to the filler, whose thread alone uses it; it is closed with it.

    >>> with ReferenceFiller(cache, reference, pairs, concurrency=16, batch_size=1, timeout_s=600) as filler:
    ...     filler.references(batch.pairs, timeout_s=600)  # doctest: +SKIP
    [PairReference(chosen=-12.5, rejected=-14.25)]
    """

    def __init__(
        self,
        cache: ReferenceCache,
        reference: Reference,
        pairs: Iterable[RenderedPair],
        *,
        concurrency: int,
        batch_size: int,
        timeout_s: float,
    ) -> None:
        """Start.

        Args:
            cache: those in it are not computed again.
            pairs: read lazily in the thread, each when there is room for its request. The same pair may come again.
            concurrency: at most so many requests in flight.
            batch_size: pairs in one request.
            timeout_s: seconds for one answer.
        """
        self.num_computed = 0
        """Pairs computed so far; the others were in the cache."""
        self._cache = cache
        self._reference = reference
        self._source = iter(pairs)
        self._concurrency = concurrency
        self._batch_size = batch_size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._wanted: set[str] = set()
        self._known: set[str] = set()  # taken out of `pairs`, and not in the cache yet
        self._ahead: deque[list[RenderedPair]] = deque()  # taken while looking for a wanted pair, to be sent later
        self._in_flight: deque[list[RenderedPair]] = deque()
        self._is_exhausted = False
        self._is_closed = False
        self._is_complete = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cookbook-references", daemon=True)
        self._thread.start()

    @property
    def is_complete(self) -> bool:
        """Whether all pairs are in the cache: the reference is not needed any more."""
        return self._is_complete

    def references(self, pairs: Sequence[RenderedPair], timeout_s: float) -> list[PairReference]:
        """The reference logprobs of these pairs; waits for those that are missing, and has them computed next.

        Raises:
            DataError: a pair that is neither in the cache nor among the filler's pairs; also one of those below.
            TrainerLost: not within `timeout_s`, or the filler was closed.
            RequestRejected, TrainerLost, ShapeError, DataError, CheckpointError: what ended the work in the background.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            while missing := [pair.digest for pair in pairs if pair.digest not in self._cache]:
                self._check(missing)
                self._wanted = set(missing)
                if not self._changed.wait(end - time.monotonic()) and time.monotonic() >= end:
                    raise TrainerLost(
                        f"the reference logprobs of {len(missing)} of {len(pairs)} pairs were not there within "
                        f"{timeout_s:g} s ({self.num_computed} computed so far). Raise step_timeout, or give the "
                        "reference a faster trainer."
                    )
            self._wanted = set()
        return [self._cache[pair.digest] for pair in pairs]

    def join(self, timeout_s: float) -> bool:
        """Wait until all pairs are in the cache; False when they are not within `timeout_s`.

        Raises:
            RequestRejected, TrainerLost, ShapeError, DataError, CheckpointError: what ended the work in the background.
        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._is_complete

    def close(self) -> None:
        """Stop, and close the reference. What was computed is kept; requests in flight are given up."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._reference.close()  # ends the wait for an answer
        self._thread.join(_CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, missing: list[str]) -> None:
        """Raise what makes waiting pointless. Under the lock."""
        if self._error is not None:
            raise self._error
        if self._is_closed:
            raise TrainerLost(f"the reference was closed while pairs were missing: {missing}. Open it again.")
        if self._is_exhausted and (strangers := [digest for digest in missing if digest not in self._known]):
            raise DataError(f"the reference was not given the pairs {strangers}: the data has changed during the run.")

    def _work(self) -> None:
        try:
            for logprobs in self._reference.stream(self._requests(), max_in_flight=self._concurrency):
                pairs = self._in_flight.popleft()
                sums = pair_references(pairs, logprobs)
                found = {pair.digest: reference for pair, reference in zip(pairs, sums, strict=True)}
                self._cache.put(found)
                with self._changed:
                    self.num_computed += len(found)
                    self._known -= found.keys()
                    self._changed.notify_all()
                if self._is_closed:
                    return
            with self._changed:
                self._is_complete = not self._is_closed
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _requests(self) -> Iterator[list[Datum]]:
        while not self._is_closed and (pairs := self._next()):
            self._in_flight.append(pairs)
            yield pair_datums(pairs)

    def _next(self) -> list[RenderedPair]:
        """The next request: one with a pair that is waited for, else in the order of `pairs`. [] = there is none."""
        with self._changed:
            flying = {pair.digest for pairs in self._in_flight for pair in pairs}
            wanted = {digest for digest in self._wanted - flying if digest not in self._cache}
        for place, pairs in enumerate(self._ahead):
            if any(pair.digest in wanted for pair in pairs):
                del self._ahead[place]
                return pairs
        if not wanted and self._ahead:
            return self._ahead.popleft()
        while pairs := self._pull():
            if not wanted or any(pair.digest in wanted for pair in pairs):
                return pairs
            self._ahead.append(pairs)
        return self._ahead.popleft() if self._ahead else []

    def _pull(self) -> list[RenderedPair]:
        """Up to `batch_size` pairs that are neither in the cache nor on their way; [] at the end of `pairs`."""
        taken: list[RenderedPair] = []
        while len(taken) < self._batch_size and not self._is_exhausted and not self._is_closed:
            pair = next(self._source, None)
            with self._changed:
                if pair is None:
                    self._is_exhausted = True
                    self._changed.notify_all()
                elif pair.digest not in self._known and pair.digest not in self._cache:
                    self._known.add(pair.digest)
                    taken.append(pair)
        return taken
