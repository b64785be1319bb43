"""The docs keep up with the code: every config field, every recipe and every command is in them."""

import re
import runpy
import tomllib

from typer.main import get_command

from cookbook.cli import app
from cookbook.config import RECIPE_CONFIGS
from tests.house.source import ROOT


def test_the_config_reference_is_that_of_the_config_classes():
    made = runpy.run_path(str(ROOT / "docs" / "make_config_reference.py"))["reference"]()
    assert (ROOT / "docs" / "config.md").read_text() == made, "docs/config.md is out of date: run `make docs`"


def test_every_recipe_is_in_the_config_reference():
    text = (ROOT / "docs" / "config.md").read_text()
    assert all(f"## {config.__name__}" in text for config in RECIPE_CONFIGS.values())


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for name, command in get_command(app).commands.items():
        assert f"`cookbook {name}" in text, f"README.md does not name `cookbook {name}`"
        for sub in getattr(command, "commands", {}):
            assert f"`{sub}`" in text or f"`cookbook {name} {sub}`" in text, f"README.md lacks `cookbook {name} {sub}`"


def test_every_dependency_has_a_reason_in_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = (ROOT / "README.md").read_text().split("## Dependencies")[1].split("##")[0]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert name in table, f"README.md has no reason for the dependency {name}"
