"""A run that has stopped, with commits whose snapshots are real files in the home of a running backend."""

from cookbook.backend.snapshots import Manifest, snapshot_dir, write_snapshot
from cookbook.checkpoints import read_checkpoints
from cookbook.files import append_jsonl
from cookbook.ledger import ResourceLedger
from cookbook.run import RunDirectory
from tests.running_backend import MODEL

SIZE = 1000


class StoppedRun:
    """A stopped run with snapshots of its own on the backend, each of SIZE bytes."""

    def __init__(self, path, running, **config):
        self.path, self.home = path, running.home
        config = {"backend": "embedded", "base_model": "tiny", "init_from_checkpoint": None, **config}
        with RunDirectory.open(path, recipe="sft", config=config, home=self.home) as run:
            self.job = ResourceLedger(run).intend("trainer", "policy", 1).resource_id

    def write(self, kind, name, *, job=None, checkpoint_type="base"):
        job = job or self.job
        folder = snapshot_dir(self.home / "checkpoints", job, kind, name)
        is_state = kind == "state"
        manifest = Manifest(
            *(kind, name, job, MODEL, 0, None if is_state else checkpoint_type),
            promotable=not is_state and checkpoint_type != "delta",
            created=float(len(list(folder.parent.parent.glob("*/*")))),
            step=0,
        )
        write_snapshot(folder, manifest, lambda target: (target / "weights").write_bytes(bytes(SIZE)) and None)
        return folder

    def commit(self, step, kind="state", *, job=None):
        job = job or self.job
        row = {"name": f"step-{step}", "step": step, "data_consumed": 4 * step, "source_job_id": job, "extra": [step]}
        if kind in ("state", "both"):
            self.write("state", f"step-{step}", job=job)
            row["state_path"] = f"cross_job://{job}/step-{step}"
        if kind in ("sampler", "both"):
            row["sampler_path"] = f"step-{step}-0a1b2c3d"
            self.write("sampler", row["sampler_path"], job=job)
        append_jsonl(self.path / "checkpoints.jsonl", row)

    def there(self, job=None):
        folder = self.home / "checkpoints" / (job or self.job)
        return sorted(str(found.relative_to(folder)) for found in folder.glob("*/*"))

    def rows(self):
        return [row.name for row in read_checkpoints(self.path)]
