"""Logprobs of DPO's reference: computed once, in the background, ahead of training, and kept on disk."""

from __future__ import annotations

import logging
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
from tasks.run import Run

__all__ = ["fill_references", "is_untrained", "known_references", "reference_logprobs", "release_reference"]

RELEASE_TIMEOUT_S = 120.0

logger = logging.getLogger(__name__)


def is_untrained(run: Run, progress: Progress) -> bool:
    """Whether the policy still is the base model."""
    return progress.step == 0 and run.config.init_from_checkpoint is None


def fill_references(run: DPORun, progress: Progress) -> None:
    """Begin to compute what the cache lacks; what training waits for comes first.

    A policy that was not trained yet is the reference: what the cache has of an earlier run is checked against it.

    Raises:
        DataError: the cache was made with another model.
    """
    assert run.cache is not None, "preflight_pairs comes first"
    assert run.trainer is not None, "provision_dpo comes first"
    if is_untrained(run, progress) and len(run.cache) > 0:
        check_cache(run)
    if run.cache_is_complete:
        return
    reference = open_reference(
        run.control.jobs, run.config, run.trainer, run.reference_trainer, user_metadata=run.directory.user_metadata()
    )
    run.filler = run.closed_at_end(
        ReferenceFiller(
            run.cache,
            reference,
            run.pairs.reference_pairs(Position(progress.epoch, progress.position)),
            concurrency=run.config.ref_cache_concurrency,
            batch_size=run.config.ref_cache_batch_size,
            timeout_s=run.config.step_timeout_s,
        )
    )


@recorded(deadline=lambda config: config.step_timeout_s, retried=False)
def check_cache(run: DPORun) -> None:
    """Compare a cached pair with the untrained policy, which is the reference."""
    assert run.cache is not None, "preflight_pairs comes first"
    check_reference_cache(run.cache, run.client, run.pairs.reference_pairs(), timeout_s=run.config.step_timeout_s)


@recorded(deadline=lambda config: config.step_timeout_s, retried=False)
def reference_logprobs(run: DPORun, batch: PairBatch) -> Sequence[PairReference]:
    """Summed reference logprobs of the answers of each pair, in nats; waits for those that are not there yet.

    Raises:
        TrainerLost: the reference is gone, or late.
    """
    started = time.perf_counter()
    found = known_references(run, batch.pairs, run.config.step_timeout_s)
    run.note({"reference/wait_s": time.perf_counter() - started})
    return found


def known_references(
    run: DPORun, pairs: Sequence[RenderedPair], timeout_s: float | None = None
) -> Sequence[PairReference]:
    """Reference logprobs out of the cache, waiting for what is under way."""
    if run.filler is not None:
        return run.filler.references(pairs, run.config.step_timeout_s if timeout_s is None else timeout_s)
    assert run.cache is not None, "preflight_pairs comes first"
    return [run.cache[pair.digest] for pair in pairs]


def release_reference(run: DPORun) -> None:
    """Free the reference, its trainer too, as soon as all its logprobs are known.

    What cannot be freed now is freed at the end of the run: training goes on.
    """
    if run.filler is None or not run.filler.is_complete:
        return
    run.filler.close()
    run.filler = None
    run.say("all reference logprobs are known")
    if run.reference_trainer is None:
        return
    run.reference_trainer = None
    try:
        free_reference_trainer(run)
    except Exception as error:
        logger.warning("the reference trainer could not be freed, that comes at the end of the run: %s", error)


@recorded(deadline=lambda config: RELEASE_TIMEOUT_S, retried=True)
def free_reference_trainer(run: DPORun) -> None:
    """Delete the trainer of the reference.

    Raises:
        ProvisioningError: the backend refused.
    """
    release(run.control, run.ledger)
