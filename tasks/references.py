"""Logprobs of DPO's reference: computed once, in the background, ahead of training, and kept on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cookbook.data import Position
from cookbook.data.pairs import RenderedPair
from cookbook.data.preferences import PairBatch
from cookbook.losses.preference import PairReference
from cookbook.provisioning import release_reference as release
from cookbook.reference import open_reference
from cookbook.reference_cache import check_reference_cache
from cookbook.reference_filler import ReferenceFiller
from cookbook.run import Progress
from tasks.preference_run import DPORun
from tasks.record import recorded

__all__ = ["fill_references", "pair_references", "reference_logprobs", "release_reference"]


def fill_references(run: DPORun, progress: Progress) -> None:
    """Begin to compute what the cache lacks: held-out pairs first, then the others in the order of training.

    A policy that was not trained yet is the reference: what the cache has of an earlier run is checked against it.

    Raises:
        DataError: the cache was made with another model.
    """
    assert run.cache is not None, "preflight_pairs comes first"
    assert run.trainer is not None, "provision_dpo comes first"
    if progress.step == 0 and run.config.init_from_checkpoint is None:
        check_cache(run)
    if run.cache_is_complete:
        return
    reference = open_reference(
        run.control.jobs, run.config, run.trainer, run.reference_trainer, user_metadata=run.directory.user_metadata()
    )
    run.reference = run.closed_at_end(reference)
    run.filler = run.closed_at_end(
        ReferenceFiller(
            run.cache,
            run.reference,
            run.pairs.reference_pairs(Position(progress.epoch, progress.position)),
            concurrency=run.config.ref_cache_concurrency,
            batch_size=run.config.ref_cache_batch_size,
            timeout_s=run.config.step_timeout_s,
        )
    )


@recorded(deadline=lambda config: config.step_timeout_s, retried=False)
def check_cache(run: DPORun) -> None:
    """Compare a cached pair with the untrained policy, which is the reference."""
    assert run.cache is not None
    check_reference_cache(run.cache, run.client, run.pairs.reference_pairs())


@recorded(deadline=lambda config: config.step_timeout_s, retried=False)
def reference_logprobs(run: DPORun, batch: PairBatch) -> Sequence[PairReference]:
    """Summed reference logprobs of the answers of each pair, in nats; waits for those that are not there yet.

    Raises:
        TrainerLost: the reference is gone, or late.
    """
    started = time.perf_counter()
    found = pair_references(run, batch.pairs, run.config.step_timeout_s)
    run.note({"reference/wait_s": time.perf_counter() - started})
    return found


def pair_references(run: DPORun, pairs: Sequence[RenderedPair], timeout_s: float) -> Sequence[PairReference]:
    """Reference logprobs out of the cache, waiting for what is under way."""
    if run.filler is not None:
        return run.filler.references(pairs, timeout_s)
    assert run.cache is not None, "preflight_pairs comes first"
    return [run.cache[pair.digest] for pair in pairs]


def release_reference(run: DPORun) -> None:
    """Free the reference, its trainer too, as soon as all its logprobs are known."""
    if run.filler is None or run.reference is None or not run.filler.is_complete:
        return
    run.filler.close()
    run.reference.close()
    run.filler = run.reference = None
    run.say(f"the reference logprobs of all {len(run.cache or ()):,} pairs are known")
    if run.reference_trainer is not None:
        release(run.control, run.ledger)
        run.reference_trainer = None
