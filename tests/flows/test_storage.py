"""Retention and mirror in a real run: it keeps what it should, loses its directory, and goes on elsewhere."""

import json
import shutil
import signal
from pathlib import Path

from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.mirror_store import MirrorStore
from tests.flows.helpers import finish, losses, start, wait_for


def kept(parameters):
    path = Path(parameters["log_path"]) / "checkpoints.jsonl"
    return [json.loads(line)["name"] for line in path.read_text().splitlines()]


def test_a_run_that_lost_its_directory_goes_on_from_its_mirror_to_the_same_losses(
    undisturbed, environment, backend_home, tmp_path
):
    url = f"file://{tmp_path}/mirror"
    storage = {"keep_last": 1, "keep_every": 6, "mirror_url": url}
    parameters = {
        **undisturbed[0],
        "log_path": str(tmp_path / "run"),
        "output_model_id": None,
        "storage": storage,
        "weight_sync": {"dcp_save_interval": 1},
        "save_on_sigterm": False,
    }
    process = start(parameters, environment)

    def is_mirrored():
        newest = MirrorStore(url).newest()[0]
        return newest is not None and (newest.step or 0) >= 4

    wait_for(is_mirrored, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    mirrored = MirrorStore(url).newest()[0]
    shutil.rmtree(parameters["log_path"])

    moved = {**parameters, "log_path": str(tmp_path / "moved")}
    pulled = CliRunner().invoke(app, ["runs", "pull", url, moved["log_path"], "--home", str(backend_home), "--json"])
    assert pulled.exit_code == 0, pulled.output
    assert json.loads(pulled.stdout)["commit"] == mirrored.commit
    summary = finish(start(moved, environment))
    assert (summary["run_id"], summary["resumed_from_step"]) == (mirrored.run_id, mirrored.step)
    assert losses(moved) == losses(undisturbed[0])

    steps = [name.split("-")[1] for name in kept(moved)]
    assert steps in (["6", "12"], ["6", "11", "12"])  # the mirror may still go on from the one before the last
    states = {path.name for path in backend_home.glob(f"checkpoints/{mirrored.run_id}-policy-g*/state/*")}
    assert states == set(kept(moved))
    last = MirrorStore(url).newest()[0]
    assert (last.step, "summary.json" in last.files) == (12, True)
    (row,) = json.loads((Path(moved["log_path"]) / "upkeep.json").read_text())["mirror"]["pointers"]
    assert row == last.digest
