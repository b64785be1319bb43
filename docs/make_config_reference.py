"""Writes docs/config.md from the config classes, so that it names every field. Run: make docs"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

import cookbook.config as config
from cookbook.evaluation_config import EvaluationConfig
from cookbook.janitor_config import JanitorConfig

TARGET = Path(__file__).parent / "config.md"
RECIPES = [config.SFTConfig, config.RLConfig, config.DPOConfig, config.ORPOConfig, EvaluationConfig, JanitorConfig]
BLOCKS = [
    config.InfraConfig,
    config.WeightSyncConfig,
    config.AdamConfig,
    config.EvalConfig,
    config.PreferenceEvalConfig,
    config.RetryConfig,
    config.WandBConfig,
    config.RunnerConfig,
    config.DeployConfig,
    config.ConcurrencyConfig,
    config.RLEvalConfig,
    config.TISConfig,
    config.DAPOConfig,
    config.GSPOConfig,
    config.CISPOConfig,
    config.DROConfig,
]
HEAD = """# Configuration

Every field of every recipe and block, from the classes in `cookbook/config.py` (this page is made by
`docs/make_config_reference.py`). A YAML file (`--config`), `--set block.field=value` and the flow's `config` parameter
say the same thing. A value that is None or 0 means what the description says.
"""


def type_name(schema: dict[str, Any]) -> str:
    """Short name of a JSON-schema type, with its choices and bounds."""
    if "anyOf" in schema:
        return " or ".join(type_name(option) for option in schema["anyOf"])
    if "$ref" in schema or "allOf" in schema:
        return "block"
    name = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"}.get(
        schema.get("type", ""), schema.get("type", "")
    )
    if name == "array":
        name = f"list of {type_name(schema['items'])}"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")]
        if key in schema
    ]
    return f"{name} {', '.join(bounds)}".strip()


def field_row(name: str, schema: dict[str, Any], required: bool) -> str:
    default = "required" if required else f"`{schema['default']}`" if "default" in schema else "block"
    choices = f" One of: {', '.join(str(c) for c in schema['enum'])}." if "enum" in schema else ""
    return f"| `{name}` | {type_name(schema)} | {default} | {schema.get('description', '')}{choices} |"


def section(model: type[BaseModel]) -> str:
    """One class as a heading, its docstring and a table of its fields."""
    schema = model.model_json_schema()
    required = set(schema.get("required", []))
    rows = [field_row(name, field, name in required) for name, field in schema["properties"].items()]
    doc = " ".join((model.__doc__ or "").split())
    return "\n".join(
        [f"## {model.__name__}", "", doc, "", "| field | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def reference() -> str:
    """The whole page."""
    return HEAD + "\n" + "\n".join(section(model) for model in [*RECIPES, *BLOCKS])


if __name__ == "__main__":
    TARGET.write_text(reference())
