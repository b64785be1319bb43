"""Pre-flight: read, check and count all data, and show what the run will do before anything is provisioned."""

from __future__ import annotations

from prefect.artifacts import create_markdown_artifact

from cookbook.config import SFTConfig
from cookbook.data.sft import SFTData, load_sft_data
from cookbook.errors import ConfigError
from cookbook.validation import check_inputs, with_row_problems
from tasks.record import recorded
from tasks.run import Run

__all__ = ["preflight"]


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def preflight(run: Run) -> SFTData:
    """Check every input of the run, load its data, publish the report, and pin the data to the run.

    Raises:
        ConfigError: all problems of the config and its data, together.
        CheckpointError: the run began with other data.
    """
    assert isinstance(run.config, SFTConfig)
    problems = check_inputs(run.config, run.env)
    if problems:
        raise ConfigError(with_row_problems(problems, run.config, run.env))
    data = load_sft_data(
        run.config,
        run.env.home / "models",
        run.directory.path / "data",
        shape_context=run.shape_context(),
        progress=run.tracker.rows_read,
    )
    run.directory.pin_data(data.train.fingerprint)
    run.say(data.report.to_text())
    create_markdown_artifact(
        data.report.to_markdown(), key=f"preflight-{run.directory.run_id}", description="Pre-flight"
    )
    return data
