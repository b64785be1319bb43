"""Pre-flight: read, check and count all data, and show what the run will do before anything is provisioned."""

from __future__ import annotations

from cookbook.config import SFTConfig
from cookbook.data.jsonl import JsonlFile
from cookbook.data.preference_preflight import PreferencePreflightReport
from cookbook.data.preferences import PreferenceData, load_preference_data
from cookbook.data.preflight import PreflightReport
from cookbook.data.rl import RLData, load_rl_data
from cookbook.data.rl_preflight import RLPreflightReport
from cookbook.data.sft import SFTData, load_sft_data
from cookbook.errors import ConfigError, Problem
from cookbook.rollouts.environment import load_environment
from cookbook.rollouts.filters import load_group_filter
from cookbook.validation import check_inputs, with_row_problems
from tasks.page import show_report
from tasks.preference_run import DPORun, PreferenceRun
from tasks.record import recorded
from tasks.rl_run import RLRun
from tasks.run import Run

__all__ = ["preflight", "preflight_pairs", "preflight_rl"]


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def preflight(run: Run) -> SFTData:
    """Check every input of the run, load its data, publish the report, and pin the data to the run.

    Raises:
        ConfigError: all problems of the config and its data, together.
        CheckpointError: the run began with other data.
    """
    assert isinstance(run.config, SFTConfig)
    _check(run)
    data = load_sft_data(
        run.config,
        run.env.home / "models",
        run.directory.path / "data",
        shape_context=run.shape_context(),
        progress=run.tracker.rows_read,
    )
    _accept(run, data.train.fingerprint, data.train.file, data.report)
    return data


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def preflight_rl(run: RLRun) -> RLData:
    """The same for an RL run, whose reward is tried too: one that is broken shows here.

    Raises:
        ConfigError, CheckpointError: as `preflight`.
    """
    _check(run)
    load_group_filter(run.config.group_filter)
    load_environment(run.config.environment)
    run.data = load_rl_data(
        run.config,
        run.env.home / "models",
        run.directory.path / "data",
        shape_context=run.shape_context(),
        progress=run.tracker.rows_read,
    )
    _accept(run, run.data.fingerprint, run.data.train.file, run.data.report)
    return run.data


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def preflight_pairs(run: PreferenceRun) -> PreferenceData:
    """The same for a run on pairs; DPO also finds which reference logprobs are known already.

    Raises:
        ConfigError, CheckpointError: as `preflight`.
        DataError: the reference cache is damaged, or was made with another model.
    """
    _check(run)
    run.data = load_preference_data(
        run.config,
        run.env.home / "models",
        run.directory.path / "data",
        shape_context=run.shape_context(),
        progress=run.tracker.rows_read,
    )
    _accept(run, run.data.fingerprint, run.data.train.file, run.data.report)
    if isinstance(run, DPORun):
        run.open_cache()
    return run.data


def _check(run: Run) -> None:
    problems = check_inputs(run.config, run.env)
    if not problems and (conflict := run.upkeep.mirror_conflict()) is not None:
        problems = [Problem("storage.mirror_url", conflict, "")]
    if problems:
        raise ConfigError(with_row_problems(problems, run.config, run.env))


def _accept(
    run: Run,
    fingerprint: str,
    file: JsonlFile,
    report: PreflightReport | RLPreflightReport | PreferencePreflightReport,
) -> None:
    """Pin the data to the run, and publish the report."""
    run.directory.pin_data(fingerprint, sha256=file.fingerprint, num_rows=len(file))
    run.upkeep.copy()
    run.say(report.to_text())
    show_report(report.to_markdown(), key=f"preflight-{run.directory.run_id}", description="Pre-flight")
