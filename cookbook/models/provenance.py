"""Where a model comes from: one record a promoted model, with every model behind it, under <home>/provenance.

A record is written at promotion; evaluations are added later. For a model without one, what its folder and the runs of
this home still tell is put together. What nothing tells is None, which people read as "unknown". No torch; the card and
the export read this.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cookbook.errors import CheckpointError, ModelError
from cookbook.files import file_lock, read_json, read_jsonl, write_json
from cookbook.models.catalogue import CATALOGUE
from cookbook.models.fingerprint import model_fingerprint
from cookbook.models.folders import HUB_NAME, LOCAL_MODEL, MODEL_RECORD, find_folder

if TYPE_CHECKING:
    from cookbook.checkpoints import CheckpointRow
    from cookbook.promotion import PromotedModel
    from cookbook.snapshots import SnapshotRef

__all__ = [
    "PROVENANCE_FILE",
    "Provenance",
    "add_evaluation",
    "provenance_of",
    "read_provenance",
    "record_path",
    "record_provenance",
]

PROVENANCE_FILE = "provenance.json"
"""The record that lies in an exported folder, so that the chain goes on wherever the folder does."""

PACKAGES = ("cookbook-flows", "fireworks-ai", "peft", "safetensors", "tokenizers", "torch", "transformers")

_JOB_OF_RUN = re.compile(r"(?P<run>(?P<recipe>[a-z]+)-[0-9a-f]{8})-policy-g\d+")
_SNAPSHOT_SUFFIX = re.compile(r"-[0-9a-f]{8}$")  # the SDK appends it to the names of sampler snapshots
_LOCK_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """What is known of a model's making. None = unknown."""

    model: str
    """Name: a resource name (accounts/<account>/models/<id>), a hub name, or that of a folder."""
    origin: str
    """"trained" (by a run), "pulled" (`cookbook models pull`), "foreign" (made elsewhere), or "unknown": weights that a
    run began with, of which nothing else is known."""
    kind: str = "model"
    """"model" (whole) or "adapter" (LoRA)."""
    source: str | None = None
    """Trained: the promoted checkpoint. Pulled: requirement and file. Foreign: where it lies, or its hub revision."""
    licence: str | None = None
    """SPDX identifier; a trained model has that of the nearest model behind it that says. None is inherited past an
    unknown one."""
    created: str | None = None
    """UTC, ISO 8601."""
    base_model: str | None = None
    """As in the run's config."""
    base_fingerprint: str | None = None
    """sha256 (hex) over the base's config.json and weights, when the record was made."""
    recipe: str | None = None
    run_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's whole config; {} = unknown."""
    config_fingerprint: str | None = None
    seed: int | None = None
    dataset: str | None = None
    """As in the run's config."""
    dataset_sha256: str | None = None
    """Of the data file's bytes, when the run read it."""
    dataset_rows: int | None = None
    """Rows of the same file."""
    data_fingerprint: str | None = None
    """What the run pinned its data by."""
    rows_consumed: int | None = None
    """Rows taken up to the checkpoint, over all epochs."""
    checkpoint: str | None = None
    """Its name in the run."""
    step: int | None = None
    """Optimizer steps in the weights."""
    trainer_job: str | None = None
    init_from: str | None = None
    """init_from_checkpoint of the run: weights it began with instead of the base's."""
    evaluation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """"before" and "after" training, on held-out rows; what the run measured."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Those of `cookbook eval`, oldest first: run_id, date, dataset, data_fingerprint (sha256 of its bytes), num_rows,
    samples_per_row, temperature, reward, confidence, measures (name -> value, low, high)."""
    code_version: str | None = None
    """Of the cookbook, when the model was promoted."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version, when the model was promoted."""
    parents: tuple[Provenance, ...] = ()
    """The models behind this one, the nearest first; their own `parents` are empty."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that this version does not know are left out.

        Raises:
            ModelError: it is not such a record.
        """
        known = {entry.name for entry in dataclasses.fields(cls)} - {"parents"}
        parents = values.get("parents", [])
        if not isinstance(values.get("model"), str) or not isinstance(values.get("origin"), str):
            raise ModelError(f"a provenance record needs model and origin, got the keys {sorted(values)}.")
        return cls(
            **{key: value for key, value in values.items() if key in known - {"evaluations"}},
            evaluations=tuple(values.get("evaluations", [])),
            parents=tuple(Provenance.from_dict(parent) for parent in parents),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return dataclasses.asdict(self) | {"parents": [parent.to_dict() for parent in self.parents]}

    @property
    def chain(self) -> tuple[Provenance, ...]:
        """This model and all behind it, the nearest first."""
        return (dataclasses.replace(self, parents=()), *self.parents)

    def shared(self) -> Provenance:
        """The record for others: a folder is its last part, and of the config what changes the numbers is left."""
        from cookbook.run import fixed_fields

        return dataclasses.replace(
            self,
            source=_last_part(self.source),
            base_model=_last_part(self.base_model),
            dataset=_last_part(self.dataset),
            config={name: _last_part(value) for name, value in fixed_fields(self.config).items()},
            evaluations=tuple({**told, "dataset": _last_part(told.get("dataset"))} for told in self.evaluations),
            parents=tuple(parent.shared() for parent in self.parents),
        )


def record_path(home: Path, model: str) -> Path:
    """Where the record of the model with this resource name (or id, on this machine) lies."""
    parts = model.split("/")
    local = len(parts) < 4 or parts[1] == "local"
    return home / "provenance" / (f"{parts[-1]}.json" if local else f"{parts[1]}.{parts[-1]}.json")


def record_provenance(home: Path, provenance: Provenance) -> Path:
    """Write the record of a promoted model, in one piece; an older one of the same name is replaced. When that was of
    the same checkpoint, its evaluations stay.

    Raises:
        CheckpointError: it cannot be written, or the older one is damaged.
    """
    path = record_path(home, provenance.model)
    with _locked(path):
        older = read_json(path) or {}
        is_same = older.get("source") == provenance.source and not provenance.evaluations
        kept = {"evaluations": older.get("evaluations", [])} if is_same else {}
        write_json(path, provenance.to_dict() | kept)
    return path


def add_evaluation(home: Path, model: str, role: str, told: Mapping[str, Any]) -> bool:
    """Add the result of `cookbook eval` to the record of a model; one of the same run is replaced.

    Only models that were promoted from here or pulled have records: others can change under their name.

    Args:
        model: as for `read_provenance`.
        role: of the model in the evaluation.
        told: evaluation.json of the evaluation.

    Returns:
        Whether it was added. What prevents that is logged and never raised: the evaluation itself is whole.
    """
    try:
        known = read_provenance(home, model)
        path = record_path(home, known.model)
        if not _has_record(home, model, known, path):
            logger.info("%s has no record of its own: the evaluation %s is not added to any", model, told["run_id"])
            return False
        with _locked(path):
            known = read_provenance(home, model)
            others = (entry for entry in known.evaluations if entry.get("run_id") != told["run_id"])
            entries = (*others, _evaluation_of(role, told))
            write_json(path, dataclasses.replace(known, evaluations=entries).to_dict())
    except (CheckpointError, ModelError) as error:
        logger.warning("evaluation %s was not added to the record of %s: %s", told["run_id"], model, error)
        return False
    return True


def provenance_of(
    log_path: Path, model: PromotedModel, saved: CheckpointRow | SnapshotRef, *, home: Path
) -> Provenance:
    """The record of a model that was promoted just now.

    Args:
        log_path: directory of the run, whose run.json and metrics.jsonl are read. It need not be owned.
        saved: the promoted checkpoint: a row of the run's checkpoints.jsonl, or a snapshot that no row names (that of a
            weight sync).
        home: COOKBOOK_HOME, with the models and records behind this one.

    Raises:
        CheckpointError: a file of the run is missing or damaged.
        ModelError: the record of a model behind this one is damaged.
    """
    from cookbook.embedded import code_version

    about = _model_record(model.folder)
    told = _of_saved(log_path, saved, home, about.get("base_model"))
    return dataclasses.replace(
        told,
        model=model.name,
        kind="adapter" if model.kind == "HF_PEFT_ADDON" else "model",
        source=about.get("source") or told.source,
        created=about.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        base_fingerprint=_fingerprint(home, about.get("base_model") or told.base_model),
        code_version=code_version(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def read_provenance(home: Path, model: str) -> Provenance:
    """What is known of a model: its record, else what its folder and the runs of this home tell.

    Args:
        model: name below <home>/models, resource name, or folder. Nothing is downloaded.

    Raises:
        ModelError: there is no such model, or its record is damaged.
        CheckpointError: as ModelError, for a record under `home` that is no JSON.
    """
    local = LOCAL_MODEL.fullmatch(model)
    if model.startswith("accounts/") and not local:
        record = read_json(record_path(home, model))
        return Provenance.from_dict(record) if record is not None else Provenance(model, "foreign", source=model)
    if HUB_NAME.fullmatch(model) and not local and not Path(model).is_dir():
        return Provenance(model, "foreign", source="the Hugging Face hub")
    folder = find_folder(model, home / "models", hub_patterns=()).resolve()
    if folder.parent == (home / "models").resolve():
        return _of_local_model(home, folder)
    carried = read_json(folder / PROVENANCE_FILE)
    if carried is not None:
        return dataclasses.replace(Provenance.from_dict(carried), kind=_kind(folder))
    return Provenance(folder.name, "foreign", _kind(folder), source=str(folder), licence=_licence(folder))


def _of_local_model(home: Path, folder: Path) -> Provenance:
    """A model below <home>/models."""
    name = f"accounts/local/models/{folder.name}"
    found = read_json(record_path(home, folder.name))
    about = _model_record(folder)
    source = about.get("source") or None
    if found is not None and found.get("source") == source:  # else the id has been given to another model since
        return Provenance.from_dict(found)
    carried = read_json(folder / PROVENANCE_FILE)
    if carried is not None:
        return dataclasses.replace(Provenance.from_dict(carried), model=name, kind=_kind(folder))
    if source is not None and "/checkpoints/" in source:
        return _of_promoted(home, folder, source, about)
    origin = "pulled" if folder.name in CATALOGUE and source is not None else "foreign"
    source = source or str(folder)
    return Provenance(name, origin, _kind(folder), source, licence=_licence(folder), created=about.get("created"))


def _of_promoted(home: Path, folder: Path, source: str, about: Mapping[str, Any]) -> Provenance:
    """A model that was promoted without a record: what its run tells, if the run is still known."""
    job, _, snapshot = source.removeprefix("accounts/local/rlorTrainerJobs/").partition("/checkpoints/")
    base = about.get("base_model")
    rows = ((log_path, row) for log_path, row in _rows_of(home) if row.sampler_path == snapshot)
    of_run = next((_of_row(log_path, row, home, base) for log_path, row in rows if row.source_job_id == job), None)
    told = of_run or _of_job(job, snapshot, base, home)
    return dataclasses.replace(
        told,
        model=f"accounts/local/models/{folder.name}",
        kind=_kind(folder),
        source=source,
        created=about.get("created"),
        licence=_licence(folder) or _nearest_licence(told.parents),
    )


def _of_job(job: str, snapshot: str, base: str | None, home: Path) -> Provenance:
    """What the names of a trainer job and of a snapshot tell, when the run that they were of is not known any more."""
    owner = _JOB_OF_RUN.fullmatch(job)
    return Provenance(
        model=job,
        origin="trained",
        base_model=base,
        recipe=owner["recipe"] if owner else None,
        run_id=owner["run"] if owner else None,
        checkpoint=_SNAPSHOT_SUFFIX.sub("", snapshot),
        trainer_job=job,
        parents=_chain_of_base(home, base, None),
    )


def _of_saved(log_path: Path, saved: CheckpointRow | SnapshotRef, home: Path, wire: str | None) -> Provenance:
    """What is known of a checkpoint of a run. Of a snapshot without a row: nothing that changes from step to step, and
    not whose it is where other runs save in its trainer too."""
    from cookbook.checkpoints import CheckpointRow
    from cookbook.snapshots import StoredRun, adopted_by_others, own_trainers

    if isinstance(saved, CheckpointRow):
        return _of_row(log_path, saved, home, wire)
    run, name = StoredRun.read(log_path), _SNAPSHOT_SUFFIX.sub("", saved.name)
    if saved.job_id not in set(own_trainers(log_path)) - adopted_by_others(home, run.run_id):
        base = run.config.get("base_model")
        unknown = Provenance(f"weights of trainer {saved.job_id}", "unknown")
        return Provenance(
            model=saved.name,
            origin="trained",
            source=saved.name,
            base_model=base,
            checkpoint=name,
            trainer_job=saved.job_id,
            parents=(unknown, *_chain_of_base(home, base, wire)),
        )
    row = CheckpointRow(name, 0, 0, sampler_path=saved.name, source_job_id=saved.job_id)
    return dataclasses.replace(_of_row(log_path, row, home, wire), step=None, rows_consumed=None, evaluation={})


def _of_row(
    log_path: Path,
    row: CheckpointRow,
    home: Path,
    wire: str | None = None,
    after: frozenset[Path] = frozenset(),
) -> Provenance:
    """What a run's own files tell of one of its checkpoints.

    Args:
        wire: what the backend knew its base model by.
        after: directories of the runs that came later, which cannot be behind this one.
    """
    from cookbook.run import RUN_FILE

    record = read_json(log_path / RUN_FILE)
    if record is None:
        raise CheckpointError(f"{log_path} has no {RUN_FILE}, so it is not a run directory. Name the run's log_path.")
    config = record.get("config", {})
    base, init_from = config.get("base_model"), config.get("init_from_checkpoint")
    parents = _chain_of_base(home, base, wire)
    if init_from:
        unknown = Provenance(f"checkpoint {init_from}", "unknown")
        parents = _chain_of_checkpoint(home, log_path, after | {log_path.resolve()}) or (unknown, *parents)
    return Provenance(
        model=f"checkpoint {row.name} of run {record['run_id']}",
        origin="trained",
        kind="adapter" if config.get("lora_rank") else "model",
        source=row.sampler_path or row.state_path,
        licence=_nearest_licence(parents),
        base_model=base,
        recipe=record.get("recipe"),
        run_id=record["run_id"],
        config=config,
        config_fingerprint=record.get("config_fingerprint"),
        seed=config.get("seed"),
        dataset=config.get("dataset"),
        dataset_sha256=record.get("data_sha256"),
        dataset_rows=record.get("data_rows"),
        data_fingerprint=record.get("data_fingerprint"),
        rows_consumed=row.data_consumed,
        checkpoint=row.name,
        step=row.step,
        trainer_job=row.source_job_id,
        init_from=init_from,
        evaluation=_evaluation(log_path, row.step),
        parents=parents,
    )


def _chain_of_base(home: Path, given: str | None, wire: str | None) -> tuple[Provenance, ...]:
    """The base model and all behind it. `given` is its name in the config, `wire` the one the backend knew it by."""
    if given is None:
        return ()
    if HUB_NAME.fullmatch(given) and wire is not None and wire.startswith("/") and not Path(given).is_dir():
        return (_of_hub(given, Path(wire)),)
    try:
        return read_provenance(home, wire or given).chain
    except ModelError as error:  # it is not on this machine any more
        logger.info("the base model %s cannot be looked up: %s", given, error)
        return (Provenance(given, "foreign"),)


def _of_hub(name: str, folder: Path) -> Provenance:
    """A model of the hub, in its local cache: .../snapshots/<revision>."""
    source = "the Hugging Face hub"
    if folder.parent.name == "snapshots":
        source += f", revision {folder.name}"
    return Provenance(name, "foreign", source=source, licence=_licence(folder))


def _chain_of_checkpoint(home: Path, log_path: Path, after: frozenset[Path]) -> tuple[Provenance, ...]:
    """The run whose checkpoint a run began with, and all behind it; () when that is not known here."""
    from cookbook.snapshots import StoredRun, begins_from

    wanted = {(ref.job_id, ref.name) for ref in begins_from(StoredRun.read(log_path))}
    for path, other in _rows_of(home):
        if (other.source_job_id, other.name) in wanted and path not in after:
            return _of_row(path, other, home, after=after).chain
    return ()


def _rows_of(home: Path) -> Iterator[tuple[Path, CheckpointRow]]:
    """The checkpoints of every run of this home that can be read, as (run directory, row)."""
    from cookbook.checkpoints import read_checkpoints
    from cookbook.run import RUN_FILE, list_runs

    for run in list_runs(home):
        try:
            if (read_json(run.path / RUN_FILE) or {}).get("run_id") == run.run_id:
                yield from ((run.path, row) for row in read_checkpoints(run.path))
        except CheckpointError as error:
            logger.info("run %s cannot be looked at: %s", run.run_id, error)


def _evaluation(log_path: Path, step: int) -> dict[str, dict[str, float]]:
    """Held-out numbers before training and of the checkpoint, as far as the run measured them."""
    from cookbook.tracking.tracker import METRICS_FILE

    found: dict[int, dict[str, float]] = {}
    for row in read_jsonl(log_path / METRICS_FILE):
        values = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        if values:
            found[row["step"]] = values
    return {name: found[at] for name, at in (("before", 0), ("after", step)) if at in found}


def _fingerprint(home: Path, base_model: str | None) -> str | None:
    """Of the base model's content; None where it is not on this machine."""
    if base_model is None or (HUB_NAME.fullmatch(base_model) and not Path(base_model).is_dir()):
        return None
    try:
        return model_fingerprint("embedded", base_model, home / "models")
    except ModelError:
        return None


def _evaluation_of(role: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `Provenance.evaluations` out of evaluation.json."""
    copied = ("run_id", "dataset", "data_fingerprint", "num_rows", "samples_per_row", "temperature", "confidence")
    entry = {name: told.get(name) for name in copied}
    entry |= {"date": datetime.now(UTC).date().isoformat(), "reward": told.get("config", {}).get("reward")}
    measures = dict(told["measures"][role])
    if told.get("win_rate") and role != "against":
        measures[f"win rate against {Path(told['models']['against']).name}"] = told["win_rate"]
    return {**entry, "measures": measures}


def _has_record(home: Path, model: str, known: Provenance, path: Path) -> bool:
    """Whether a record under this path is what `read_provenance` answers for the model."""
    if not known.model.startswith("accounts/local/"):  # of another backend, of the hub, or a folder elsewhere
        return known.model.startswith("accounts/") and known.model == model and path.is_file()
    folder = home / "models" / known.model.rpartition("/")[2]
    is_there = find_folder(model, home / "models", hub_patterns=()).resolve() == folder.resolve()
    return is_there and known.source is not None and known.source == _model_record(folder).get("source")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with suppress(OSError):  # the lock says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock"), _LOCK_TIMEOUT_S):
        yield


def _model_record(folder: Path | None) -> dict[str, Any]:
    return {} if folder is None else read_json(folder / MODEL_RECORD) or {}


def _kind(folder: Path) -> str:
    return "model" if (folder / "config.json").is_file() else "adapter"


def _licence(folder: Path) -> str | None:
    """What model.json says, else the `license` of a model card's front matter."""
    if licence := _model_record(folder).get("licence"):
        return str(licence)
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head, separator, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not separator:
        return None
    import yaml

    try:
        front = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) and licence not in ("", "unknown") else None


def _last_part(value: Any) -> Any:
    """The name of a file or folder given by its whole path; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _nearest_licence(parents: tuple[Provenance, ...]) -> str | None:
    """Of the nearest model that says; nothing is inherited past one that is not known."""
    return next((parent.licence for parent in parents if parent.licence or parent.origin == "unknown"), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
