"""What people read: docstrings, descriptions, help. And what must not be in the code."""

import ast
import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel
from typer.main import get_command

from cookbook import config as config_module
from cookbook.cli import app
from cookbook.config import RECIPE_CONFIGS
from tests.house.source import ROOT, modules

FOLDERS = ("cookbook", "flows", "tasks", "tests", "benchmarks")


def config_classes():
    found = vars(config_module).values()
    return [cls for cls in found if isinstance(cls, type) and issubclass(cls, BaseModel) and cls is not BaseModel]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_config_block_and_field_is_described(cls):
    assert cls.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name} has no description"
        assert field.description[-1] in ".)", f"{cls.__name__}.{name}: end the description with a full stop"


def commands(command, path="cookbook"):
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


ALL_COMMANDS = list(commands(get_command(app)))


@pytest.mark.parametrize(("path", "command"), ALL_COMMANDS, ids=[path for path, _ in ALL_COMMANDS])
def test_every_command_and_option_has_help(path, command):
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"


def test_the_help_of_run_names_every_recipe():
    (run,) = [command for path, command in ALL_COMMANDS if path == "cookbook run"]
    (recipe,) = [parameter for parameter in run.params if parameter.name == "recipe"]
    assert all(name in recipe.help for name in RECIPE_CONFIGS)


def test_every_recipe_has_a_config_and_an_entry_point():
    assert {point.name for point in metadata.entry_points(group="cookbook.recipes")} == set(RECIPE_CONFIGS)


def test_every_file_says_what_it_holds():
    for module in modules(*FOLDERS):
        if module.source.strip():
            assert ast.get_docstring(module.tree), f"{module.name} has no docstring"


def test_the_code_is_ascii_and_leaves_nothing_for_later():
    unfinished = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]) + r")\b")
    for module in modules(*FOLDERS):
        for number, line in enumerate(module.source.splitlines(), start=1):
            assert line.isascii(), f"{module.name}, line {number}: not ASCII: {line!r}"
            assert not unfinished.search(line), f"{module.name}, line {number}: {line.strip()!r}"


def test_texts_for_people_are_there():
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"):
        assert (ROOT / name).stat().st_size > 0, f"{name} is empty"


def test_constraints_hold_every_requirement_at_one_exact_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator, f"constraints.txt: {line!r} is not name==version"
        assert "+" not in version, f"constraints.txt: {line!r} is a build for one kind of machine"
        pinned[normal(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pinned.get(normal(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version} of constraints.txt"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
