"""A job's spec is read whole or refused with the field or argument that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cookbook.backend.decoder import pick_compute_dtype
from cookbook.backend.trainer.job import read_spec
from cookbook.errors import BackendError
from tests.wire.trainer_process import write_spec


def test_extra_arguments_choose_dtype_and_threads(tmp_path: Path) -> None:
    write_spec(tmp_path, Path("/model"), extra_args=["--compute-dtype=bfloat16", "--threads=3"])
    assert (read_spec(tmp_path).compute_dtype, read_spec(tmp_path).threads) == ("bfloat16", 3)


@pytest.mark.parametrize("extra_args", [[], None, ["--compute-dtype=auto"]])
def test_dtype_follows_the_cpu_when_nothing_is_chosen(tmp_path: Path, extra_args: list[str] | None) -> None:
    write_spec(tmp_path, Path("/model"), extra_args=extra_args)
    assert (read_spec(tmp_path).compute_dtype, read_spec(tmp_path).threads) == (pick_compute_dtype(), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_args": ["--fast"]}, "unrecognized arguments: --fast"),
        ({"extra_args": ["--comp=float32"]}, "unrecognized arguments: --comp=float32"),
        ({"extra_args": ["--compute-dtype=float16"]}, "invalid choice: 'float16'"),
        ({"extra_args": ["--threads=0"]}, "must be at least 1, got 0"),
        ({"max_context_length": "many"}, "is not a job spec"),
        ({"base_model": None, "checkpoints_dir": None}, "is not a job spec"),
    ],
)
def test_bad_spec_is_refused_with_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_spec(tmp_path, Path("/model"), **changes)
    with pytest.raises(BackendError, match=message):
        read_spec(tmp_path)


def test_missing_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"spec\.json is missing or not a JSON object"):
        read_spec(tmp_path)
