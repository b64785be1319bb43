"""All that an SFT run reads: training rows, held-out rows, the order of the batches, and the report about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cookbook.config import SFTConfig
from cookbook.data.context import context_limit
from cookbook.data.dataset import Batch, SFTDataset
from cookbook.data.epochs import EpochPlan, Position
from cookbook.data.preflight import PreflightReport, preflight_report
from cookbook.data.rendering import RenderedRow, Renderer
from cookbook.errors import ConfigError, DataError, ModelError, Problem
from cookbook.models import load_tokenizer

__all__ = ["SFTData", "load_sft_data"]


@dataclass(frozen=True, eq=False)
class SFTData:
    """The data of one SFT run. Made by `load_sft_data`."""

    train: SFTDataset = field(repr=False)
    held_out: SFTDataset | None = field(repr=False)
    plan: EpochPlan
    report: PreflightReport = field(repr=False)

    def batches(self, start: Position) -> Iterator[Batch]:
        """Batches from `start` to the end of the last epoch."""
        return self.train.batches(self.plan, start)

    def held_out_rows(self) -> Iterator[RenderedRow]:
        """Held-out rows in file order; none without a held-out data set."""
        return self.held_out.rows() if self.held_out is not None else iter(())


def load_sft_data(
    config: SFTConfig,
    models_dir: Path,
    cache_dir: Path,
    *,
    shape_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SFTData:
    """Read, check and count all rows that `config` names.

    Args:
        models_dir: folder of the models known by name.
        cache_dir: folder for the counts, so that a resumed run does not count again.
        shape_context: context length of the training shape in tokens, None on a manual launch.
        progress: gets (rows done, rows) now and then.

    Raises:
        ConfigError: the problems of the model, the training rows and the held-out rows, together.
    """
    renderer, limit = _renderer_and_limit(config, models_dir, shape_context)
    problems: list[Problem] = []

    def prepare(where: str, path: str, max_examples: int | None) -> SFTDataset | None:
        try:
            return SFTDataset.prepare(
                path, renderer, cache_dir=cache_dir, max_seq_len=limit, max_examples=max_examples, progress=progress
            )
        except DataError as error:
            problems.append(Problem(where, str(error), ""))
            return None

    train = prepare("dataset", config.dataset, config.max_examples)
    evaluation, held_out = config.evaluation, None
    if evaluation.dataset is not None:
        held_out = prepare("evaluation.dataset", evaluation.dataset, evaluation.max_examples)
    if problems or train is None:
        raise ConfigError(problems)
    plan = train.plan(batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    report = preflight_report(train, plan, dcp_save_interval=config.weight_sync.dcp_save_interval, evaluation=held_out)
    return SFTData(train, held_out, plan, report)


def _renderer_and_limit(config: SFTConfig, models_dir: Path, shape_context: int | None) -> tuple[Renderer, int]:
    """The renderer, and the most tokens that a row may have."""
    try:
        tokenizer = load_tokenizer(config.tokenizer_model or config.base_model, models_dir)
        renderer = Renderer(tokenizer, config.train_on_what, config.renderer_name)
        return renderer, context_limit(config, models_dir, shape_context)
    except ModelError as error:
        raise ConfigError([Problem("tokenizer_model or base_model", str(error), "")]) from error
    except DataError as error:
        raise ConfigError([Problem("renderer_name or train_on_what", str(error), "")]) from error
