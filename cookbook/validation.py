"""From a YAML file, `--set` and keyword overrides to a config, or to one error that names every problem at once.

Also the cheap checks of what a config points at: data files, model folders, the run directory. Rules of single fields
and between fields are in cookbook/config.py; the rows themselves are checked in cookbook/data.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cookbook.config import (
    Config,
    Environment,
    PreferenceConfig,
    RecipeConfig,
    RLConfig,
    SFTConfig,
    WandBConfig,
    environment,
)
from cookbook.errors import ConfigError, DataError, ModelError, Problem
from cookbook.mirror_url import url_problem
from cookbook.models.folders import HUB_NAME, check_model_folder, find_folder
from cookbook.rewards.load import spec_problem
from cookbook.rewards.reasoning import PREFIX, parse_spec

__all__ = [
    "check_data_file",
    "check_folder",
    "check_inputs",
    "check_wandb",
    "load_config",
    "read_config",
    "with_row_problems",
]

B = TypeVar("B", bound=Config)
C = TypeVar("C", bound=RecipeConfig)

ConfigWithData = SFTConfig | RLConfig | PreferenceConfig

PLACEHOLDER = "placeholder"
"""Stands for a required field that is missing or wrong, so that the rules between the other fields still run."""

MAX_SHOWN = 120
"""Characters of a value that a problem shows."""


def load_config(
    cls: type[C],
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> C:
    """Make a `cls` out of a YAML file, then `sets`, then `overrides`; what comes later wins.

    Args:
        cls: config class of the recipe.
        file: YAML file with a mapping of fields. None = none.
        sets: "key=value" each, dots for fields of blocks, the value in YAML: `infra.extra_args=[--threads=2]`.
            An empty value is null.
        overrides: dotted field name -> value, as from options of a command line.

    Raises:
        ConfigError: every problem of the sources, the fields, the rules between fields and the files that the config
            names, together.
    """
    config, problems, stand_ins = read_config(cls, file=file, sets=sets, overrides=overrides)
    if "backend" in stand_ins:  # which models there are depends on it
        stand_ins |= {"base_model", "tokenizer_model"}
    env = environment()
    problems += [p for p in check_inputs(config, env) if p.where not in stand_ins]
    if problems:
        raise ConfigError(with_row_problems(problems, config, env, stand_ins))
    return config


def read_config(
    cls: type[B],
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[B, list[Problem], set[str]]:
    """As `load_config`, without a look at what the config names.

    Returns:
        The config, all problems of its sources, fields and rules, and the top-level fields whose value is a stand-in,
        as the user's was wrong.
    """
    problems: list[Problem] = []
    values = _read_file(file, problems) if file is not None else {}
    for item in sets:
        _apply_set(values, item, problems)
    for key, value in (overrides or {}).items():
        _put(values, key, value, f"override {key}", problems)

    config, field_problems, stand_ins = _build(cls, values)
    return config, [*problems, *field_problems], stand_ins


# Sources ------------------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error; PyYAML silently takes the last one."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        if isinstance(key.value, str) and key.value != "<<":
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _read_file(file: Path, problems: list[Problem]) -> dict[str, Any]:
    where = str(file)
    try:
        # _UniqueKeyLoader is a SafeLoader: it builds plain values only.
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        problems.append(Problem(where, "there is no such file.", "Check the path given with --config."))
    except OSError as error:
        problems.append(Problem(where, f"cannot be read: {error.strerror}.", "Check the path given with --config."))
    except UnicodeDecodeError as error:
        problems.append(Problem(where, f"is not UTF-8 text (byte {error.start}).", "Save it as UTF-8."))
    except yaml.YAMLError as error:
        problems.append(Problem(f"{where}{_line(error)}", f"is not valid YAML: {_reason(error)}.", "Correct the line."))
    else:
        if content is None:
            return {}
        if isinstance(content, dict):
            return content
        problems.append(
            Problem(where, f"holds {_shown(content)}, not a mapping.", "Write one `field: value` on each line.")
        )
    return {}


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _apply_set(values: dict[str, Any], item: str, problems: list[Problem]) -> None:
    where = f"--set {item}"
    key, separator, text = item.partition("=")
    key = key.strip()
    if not separator or not key or not all(key.split(".")):
        problems.append(
            Problem(where, "is not KEY=VALUE.", "Write, for example, --set weight_sync.dcp_save_interval=10.")
        )
        return
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        problems.append(
            Problem(
                where, f"the value is not valid YAML: {_reason(error)}.", "Put text with special characters in quotes."
            )
        )
        return
    _put(values, key, value, where, problems)


def _put(values: dict[str, Any], key: str, value: Any, where: str, problems: list[Problem]) -> None:
    *blocks, last = key.split(".")
    target = values
    for depth, block in enumerate(blocks):
        inner = target.get(block)
        if inner is None:
            inner = target[block] = {}
        if not isinstance(inner, dict):
            name = ".".join(blocks[: depth + 1])
            problems.append(
                Problem(
                    where, f"{name} is {_shown(inner)}, not a block of fields.", f"Remove {name} or write it as one."
                )
            )
            return
        target = inner
    target[last] = value


# Fields and rules ---------------------------------------------------------------------------------------------------


def _build(cls: type[B], values: dict[str, Any]) -> tuple[B, list[Problem], set[str]]:
    """The config, its problems, and the top-level fields whose value is a stand-in because the user's was wrong.

    Pydantic runs the rules between fields only when every single field is right. So wrong values are taken out, or
    replaced where the field is required, and the rest is checked again; each round takes out at least one.
    """
    problems: list[Problem] = []
    stand_ins: set[str] = set()
    values = _copy(values)
    while True:
        try:
            return cls.model_validate(values), problems, stand_ins
        except ValidationError as error:
            details = error.errors(include_url=False)
        rules = details[0].get("ctx", {}).get("error") if not details[0]["loc"] else None
        if rules is not None:
            broken = rules.problems if isinstance(rules, ConfigError) else [Problem(cls.__name__, str(rules), "")]
            return _without_rules(cls, values), problems + [p for p in broken if p.where not in stand_ins], stand_ins
        for detail in details:
            problems.append(_field_problem(cls, detail["loc"], detail))
            stand_ins.add(str(detail["loc"][0]))
            _take_out(cls, values, detail["loc"])


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _copy(v) for k, v in value.items()}
    return value


def _without_rules(cls: type[B], values: dict[str, Any]) -> B:
    """The config of `values`, each of which is right by itself, although they break a rule together."""
    blocks = {name: field.annotation for name, field in cls.model_fields.items() if _is_model(field.annotation)}
    built = {name: block.model_validate(values[name]) for name, block in blocks.items() if block and name in values}
    return cast(B, cls.model_construct(**{**values, **built}))


def _take_out(cls: type[BaseModel], values: dict[str, Any], path: tuple[str | int, ...]) -> None:
    field = cls.model_fields.get(str(path[0]))
    if field is not None and field.is_required():
        values[str(path[0])] = PLACEHOLDER
    else:
        _drop(values, path)


def _drop(values: dict[str, Any], path: tuple[str | int, ...]) -> None:
    """Remove what `path` leads to, or the nearest dictionary entry above it: a bad list item takes its list along."""
    target = values
    for key in path[:-1]:
        inner = target.get(str(key))
        if not isinstance(inner, dict):
            target.pop(str(key), None)
            return
        target = inner
    target.pop(str(path[-1]), None)


def _field_problem(cls: type[BaseModel], path: tuple[str | int, ...], detail: Any) -> Problem:
    where, value, field = _dotted(path), _shown(detail["input"]), _field(cls, path)
    meaning = (field.description or "") if field is not None else ""
    if detail["type"] == "value_error" and field is not None and _is_model(field.annotation):
        return Problem(where, str(detail["ctx"]["error"]), "")
    if detail["type"] == "extra_forbidden":
        return Problem(where, f"is not a field, got {value}.", _closest(cls, path))
    if detail["type"] == "missing":
        return Problem(where, "is required, but not set.", meaning)
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(where, f"must be a block of fields, got {value}.", meaning)
    reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return Problem(where, f"{reason}, got {value}.", meaning)


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _shown(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = MAX_SHOWN
    return shortener.repr(value)


def _field(cls: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """The field that `path` leads to, or of its nearest part when it goes on into a list or dictionary."""
    field: FieldInfo | None = None
    block: type[BaseModel] | None = cls
    for part in path:
        if block is None or part not in block.model_fields:
            break
        field = block.model_fields[str(part)]
        block = field.annotation if _is_model(field.annotation) else None
    return field


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _closest(cls: type[BaseModel], path: tuple[str | int, ...]) -> str:
    """What the unknown field probably was: a name of the same block, else one of the whole config."""
    *blocks, name = (str(part) for part in path)
    prefix = "".join(f"{block}." for block in blocks)
    everywhere = list(_field_names(cls))
    beside = [known for known in everywhere if known.startswith(prefix) and "." not in known[len(prefix) :]]
    for candidates in (beside, everywhere):
        leaves = {known.rpartition(".")[2]: known for known in reversed(candidates)}
        match = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
        if match:
            return f"Did you mean {leaves[match[0]]}?"
    return f"Known here: {', '.join(sorted(beside))}."


def _field_names(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}"
        annotation: Any = field.annotation
        if _is_model(annotation):
            yield from _field_names(annotation, f"{prefix}{name}.")


# What the config points at ------------------------------------------------------------------------------------------


def check_inputs(config: RecipeConfig, env: Environment) -> list[Problem]:
    """Problems of the files and models that `config` names. Cheap: nothing is loaded, rendered or downloaded.

    A model name of the form `organization/model` that is no folder is left to the hub, and a model resource of the
    fireworks backend to that backend.
    """
    problems = [*check_folder("log_path", config.log_path), *_check_data("dataset", config.dataset, config)]
    if isinstance(config, ConfigWithData) and config.evaluation.dataset is not None:
        problems += _check_data("evaluation.dataset", config.evaluation.dataset, config)
    if isinstance(config, RLConfig):
        problems += _check_reward(config)
        if config.trajectory_dir is not None:
            problems += check_folder("trajectory_dir", config.trajectory_dir)
    problems += _check_mirror(config)
    return problems + _check_models(config, env.home / "models") + check_wandb(config.wandb, env)


def with_row_problems(
    problems: Sequence[Problem], config: RecipeConfig, env: Environment, stand_ins: Collection[str] = ()
) -> list[Problem]:
    """`problems`, and those of the data rows where they can be read all the same, so that one error names everything.

    Rows are rendered for it, which takes a while on much data: only a config that is refused anyway pays for that. One
    without problems has its rows checked when the run loads them.
    """
    known = {p.where.split(":")[0] for p in problems} | set(stand_ins)
    needed = {"dataset", "base_model", "tokenizer_model", "train_on_what", "renderer_name"}
    needed |= {"reward", "max_completion_tokens", "deployment", "deployment.tokenizer_model"}
    if not isinstance(config, ConfigWithData) or known & needed:
        return list(dict.fromkeys(problems))
    try:
        with tempfile.TemporaryDirectory() as cache_dir:
            _load_rows(config, env.home / "models", Path(cache_dir))
    except ConfigError as error:
        return list(dict.fromkeys([*problems, *(p for p in error.problems if p.where not in known)]))
    return list(dict.fromkeys(problems))


def _load_rows(config: SFTConfig | RLConfig | PreferenceConfig, models_dir: Path, cache_dir: Path) -> None:
    # A tokenizer takes seconds to import.
    if isinstance(config, RLConfig):
        from cookbook.data.rl import load_rl_data

        load_rl_data(config, models_dir, cache_dir)
    elif isinstance(config, PreferenceConfig):
        from cookbook.data.preferences import load_preference_data

        load_preference_data(config, models_dir, cache_dir)
    else:
        from cookbook.data.sft import load_sft_data

        load_sft_data(config, models_dir, cache_dir)


def check_folder(where: str, name: str) -> list[Problem]:
    """Whether `name` is, or can become, a folder that can be written."""
    path = Path(name)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        return [Problem(where, f"{existing} is a file, got {name!r}.", "Give a folder.")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Problem(where, f"{existing} cannot be written, got {name!r}.", "Give another folder.")]
    return []


def _check_mirror(config: RecipeConfig) -> list[Problem]:
    if config.storage.mirror_url is None:
        return []
    problem = url_problem(config.storage.mirror_url, Path(config.log_path))
    return [] if problem is None else [Problem("storage.mirror_url", *problem)]


def _check_reward(config: RLConfig) -> list[Problem]:
    problem = spec_problem(config.reward)
    return [] if problem is None else [Problem("reward", problem, "")]


def _check_data(where: str, name: str, config: RecipeConfig) -> list[Problem]:
    if not isinstance(config, RLConfig) or not name.startswith(PREFIX):
        return check_data_file(where, name)
    try:
        parse_spec(name)
    except DataError as error:
        return [Problem(where, str(error), "")]
    return []


def check_data_file(where: str, name: str) -> list[Problem]:
    """Whether `name` is a file with at least one line."""
    path = Path(name)
    try:
        if path.is_dir():
            return [Problem(where, f"{name!r} is a folder.", "Give a JSONL file.")]
        with path.open("rb") as file:
            if any(line.strip() for line in file):
                return []
        return [Problem(where, f"{name!r} has no rows.", "Give a JSONL file with one row a line.")]
    except FileNotFoundError:
        return [
            Problem(where, f"there is no file {name!r} (looked in {Path.cwd()}).", "Give the path of a JSONL file.")
        ]
    except OSError as error:
        return [Problem(where, f"{name!r} cannot be read: {error.strerror}.", "Give a JSONL file that can be read.")]


def _check_models(config: RecipeConfig, models_dir: Path) -> list[Problem]:
    tokenizers = {"tokenizer_model": config.tokenizer_model}
    if isinstance(config, RLConfig):
        tokenizers["deployment.tokenizer_model"] = config.deployment.tokenizer_model
    if config.backend == "fireworks":
        if isinstance(config, RLConfig):  # a rule of its own asks for the tokenizer
            return []
        if config.tokenizer_model is None and config.base_model.startswith("accounts/"):
            what = f"is None, and base_model {config.base_model!r} is a model resource, which has no tokenizer here."
            return [Problem("tokenizer_model", what, "Set the model name or folder of its tokenizer.")]
        return []
    named = {"base_model": config.base_model, **tokenizers}
    problems = []
    for where, name in named.items():
        if name is None or (HUB_NAME.fullmatch(name) and not Path(name).is_dir()):
            continue
        try:
            folder = find_folder(name, models_dir, hub_patterns=())
            if where == "base_model":
                check_model_folder(folder)
        except ModelError as error:
            problems.append(Problem(where, f"{error}", ""))
    return problems


def check_wandb(wandb: WandBConfig, env: Environment) -> list[Problem]:
    """Whether W&B is wanted, and has no key."""
    if wandb.project is None or env.wandb_mode != "online" or env.wandb_key_present:
        return []
    what = f"{wandb.project!r} is set, but W&B has no key, and WANDB_MODE is {env.wandb_mode!r}."
    remedy = "Run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to keep W&B runs on disk."
    return [Problem("wandb.project", what, remedy)]
