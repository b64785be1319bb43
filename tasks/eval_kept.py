"""What an evaluation keeps as it comes: answers, losses, verdicts. One that was killed goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.config import Environment
from cookbook.deployment_request import ServedModel, served_model
from cookbook.evaluation.answers import AnswerFile, ReferenceLoss
from cookbook.evaluation.kept import check_identity
from cookbook.evaluation.rows import EvaluationData
from cookbook.evaluation.win_rate import VerdictFile
from cookbook.evaluation_config import EvaluationConfig
from cookbook.files import read_json, write_json
from cookbook.models.fingerprint import served_fingerprint
from cookbook.run import RunDirectory

__all__ = ["KeptEvaluation"]


class KeptEvaluation:
    """The files of an open evaluation, each with what it follows from. Another evaluation's are refused, not mixed."""

    def __init__(self, config: EvaluationConfig, directory: RunDirectory, env: Environment) -> None:
        self.config = config
        self.directory = directory
        self.env = env
        self._data: EvaluationData | None = None
        self._models: dict[str, ServedModel] = {}
        self._weights: dict[str, str] = {}

    @property
    def data(self) -> EvaluationData:
        """Rows, reward and judge; preflight_evaluation reads them."""
        assert self._data is not None, "preflight_evaluation comes first"
        return self._data

    @data.setter
    def data(self, data: EvaluationData) -> None:
        self._data = data

    def served(self, role: str) -> ServedModel:
        """The model in `role` as it is asked for; looked up once, so that it stays one model throughout."""
        if role not in self._models:
            models_dir = self.env.home / "models"
            self._models[role] = served_model(self.config.models[role], self.config.backend, models_dir)
        return self._models[role]

    def answer_file(self, role: str) -> AnswerFile:
        """The answers of the model in `role`, those of an earlier start included. To be closed.

        Raises:
            ConfigError: they are answers of another model, or were asked for in another way.
        """
        config = self.config
        asked = {
            "temperature": config.sampling_temperature,
            "max_completion_tokens": config.max_completion_tokens,
            "stop": config.stop or [],
            "seed": config.seed,
            "reward": config.reward,
        }
        return AnswerFile(
            self.directory.path / f"answers-{role}.jsonl", self._measured(role) | asked, self.directory.guard
        )

    def verdict_file(self) -> VerdictFile:
        """What the judge has said, in earlier starts too. To be closed.

        Raises:
            ConfigError: they are the verdicts of another judge.
        """
        assert self.data.judge is not None
        return VerdictFile(self.directory.path / "verdicts.jsonl", self.data.judge, self.directory.guard)

    def losses(self, role: str) -> list[ReferenceLoss] | None:
        """What the model in `role` makes of the reference answers; None while it was not measured on all of them.

        Raises:
            ConfigError: what is there was measured of another model, or on other rows.
        """
        kept = self._kept_losses(role)
        if kept is None:
            return None
        losses = [ReferenceLoss(**loss) for loss in kept["losses"]]
        is_whole = [loss.index for loss in losses] == [row.index for row in self.data.references(role)]
        return losses if is_whole else None

    def keep_losses(self, role: str, losses: list[ReferenceLoss], version: str) -> None:
        """Write down what was measured, and of which snapshot."""
        told = [{"index": loss.index, "nats": loss.nats, "num_tokens": loss.num_tokens} for loss in losses]
        kept = {"identity": self._measured(role), "version": version, "losses": told}
        with self.directory.guard():
            write_json(self._losses_file(role), kept)

    def wanted_answers(self, role: str) -> list[tuple[int, int]]:
        """(row, sample) of every answer that the model in `role` is to give."""
        samples = range(self.config.samples_per_row if self.config.wants_answers else 0)
        return [(row.index, sample) for row in self.data.rows[role] for sample in samples]

    def is_measured(self, role: str) -> bool:
        """Whether nothing is left to ask the model in `role`."""
        if self.losses(role) is None:
            return False
        with self.answer_file(role) as file:
            return all(which in file.answers for which in self.wanted_answers(role))

    def check_kept(self) -> None:
        """Check that what earlier starts have left is of this evaluation, before anything is deployed.

        Raises:
            ConfigError: it is not. It stays as it is.
        """
        for role in self.config.models:
            self.answer_file(role).close()
            self.losses(role)
        if self.data.judge is not None:
            self.verdict_file().close()

    def _losses_file(self, role: str) -> Path:
        return self.directory.path / f"losses-{role}.json"

    def _kept_losses(self, role: str) -> dict[str, Any] | None:
        path = self._losses_file(role)
        kept = read_json(path)
        if kept is not None:
            check_identity(path, kept.get("identity") or {}, self._measured(role))
        return kept

    def versions(self, role: str) -> set[str]:
        """The snapshots that what is kept of the model in `role` came from."""
        with self.answer_file(role) as file:
            found = {answer.version for answer in file.answers.values()}
        kept = self._kept_losses(role)
        return found | ({kept["version"]} if kept is not None and kept["losses"] else set())

    def _measured(self, role: str) -> dict[str, Any]:
        """All that the loss of the model in `role` follows from: its weights, how it is run, and its tokens."""
        return {
            "backend": self.config.backend,
            "weights": self.weights(role),
            "dataset": self.data.fingerprint,
            "tokenizer": self.data.tokenizers[role],
            **self.config.served(role),
        }

    def weights(self, role: str) -> str:
        """Fingerprint of the model in `role`.

        Raises:
            ModelError: it is not on this machine.
        """
        if role not in self._weights:
            models_dir = self.env.home / "models"
            self._weights[role] = served_fingerprint(self.config.backend, self.served(role).name, models_dir)
        return self._weights[role]
