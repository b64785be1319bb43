"""An open run on pairs of answers (DPO, ORPO): its data, its objective, and what DPO has of a reference."""

from __future__ import annotations

from functools import cached_property

from cookbook.config import DPOConfig, Environment, ORPOConfig
from cookbook.data.preferences import PreferenceData
from cookbook.losses.preference import PreferenceObjective, objective_of
from cookbook.models.fingerprint import reference_fingerprint
from cookbook.provisioning import TrainerHandle
from cookbook.reference_cache import ReferenceCache
from cookbook.reference_filler import ReferenceFiller
from cookbook.run import RunDirectory
from tasks.run import Run

__all__ = ["DPORun", "PreferenceRun"]


class PreferenceRun(Run):
    """What the tasks of one run on pairs share."""

    config: DPOConfig | ORPOConfig

    def __init__(self, config: DPOConfig | ORPOConfig, directory: RunDirectory, env: Environment) -> None:
        super().__init__(config, directory, env)
        self.data: PreferenceData | None = None

    @property
    def pairs(self) -> PreferenceData:
        """The data of the run; preflight_pairs reads it."""
        assert self.data is not None, "preflight_pairs comes first"
        return self.data

    @cached_property
    def objective(self) -> PreferenceObjective:
        """The loss of one pair."""
        return objective_of(self.config)


class DPORun(PreferenceRun):
    """What the tasks of one DPO run share: also the reference, as long as its logprobs are not all known."""

    config: DPOConfig

    def __init__(self, config: DPOConfig, directory: RunDirectory, env: Environment) -> None:
        super().__init__(config, directory, env)
        self.cache: ReferenceCache | None = None
        self.cache_is_complete = False
        """Whether all reference logprobs were known before training: then no reference is provisioned."""
        self.reference_trainer: TrainerHandle | None = None
        self.filler: ReferenceFiller | None = None
        """Computes what the cache lacks, in the background; None before and after that."""

    def open_cache(self) -> None:
        """Find which reference logprobs are known already, by this run or by another on the same data and model.

        Raises:
            DataError: the cache is damaged, or was made with another model or data.
        """
        fingerprint = reference_fingerprint(self.config, self.env.home / "models")
        self.cache = ReferenceCache.open(
            self.env.home,
            model_fingerprint=fingerprint,
            data_fingerprint=self.pairs.fingerprint,
            base_model=self.config.base_model,
        )
        digests = set(self.pairs.digests())
        known = sum(digest in self.cache for digest in digests)
        self.cache_is_complete = known == len(digests)
        self.say(f"reference logprobs: {known:,} of {len(digests):,} pairs are known from before")
        if self.config.init_from_checkpoint is not None:
            self.say(
                "warning: the reference is base_model, not init_from_checkpoint. To hold the policy to that "
                "checkpoint, promote it and use the model as base_model."
            )
