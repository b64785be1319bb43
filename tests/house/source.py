"""The project's own Python files as syntax trees, and what they import. Nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "Import", "Module", "imports", "modules", "parse"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("cookbook", "flows", "tasks")


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, and its source."""

    name: str
    is_package: bool
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


@dataclass(frozen=True)
class Import:
    """`from target import name` (name None: `import target`), absolute, at a line."""

    target: str
    name: str | None
    line: int

    @property
    def reaches(self) -> tuple[str, ...]:
        """Dotted names that the import may load: a name of a package may be a module of it."""
        return (self.target,) if self.name is None else (self.target, f"{self.target}.{self.name}")


def parse(name: str, source: str, *, is_package: bool = False) -> Module:
    """A module out of text."""
    return Module(name, is_package, source)


def modules(*packages: str) -> list[Module]:
    """All modules of these folders."""
    found = []
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(parse(name, path.read_text(encoding="utf-8"), is_package=is_package))
    return found


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, wherever it stands: at the top, in a function, under TYPE_CHECKING, by importlib."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = _absolute(module, node)
            yield from (Import(target, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func) and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, None, node.lineno)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    above = node.level - 1 if module.is_package else node.level
    base = parts[: len(parts) - above]
    return ".".join([*base, node.module] if node.module else base)


def _is_dynamic_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")
