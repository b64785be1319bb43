"""Who may import whom: flows -> tasks -> cookbook, and nobody the backend, which is a process of its own."""

import ast
from collections.abc import Callable

import pytest

from tests.house.source import Import, Module, imports, modules, parse


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def broken_rule(module: Module, target: str) -> str | None:
    """Why `module` may not import `target`; None when it may."""
    if within(module.name, "cookbook.backend"):
        allowed = within(target, "cookbook.backend", "cookbook.losses", "cookbook.errors") or target == "cookbook"
        own = within(target, "cookbook", "flows", "tasks", "prefect", "fireworks")
        return None if allowed or not own else "the backend uses only cookbook.losses, cookbook.errors and itself"
    if within(target, "cookbook.backend"):
        return "nobody imports the backend: it is a process"
    if within(module.name, "cookbook") and within(target, "prefect", "flows", "tasks"):
        return "cookbook imports neither prefect nor flows nor tasks"
    if within(module.name, "tasks") and within(target, "flows"):
        return "tasks never import flows"
    if within(target, "tests", "benchmarks"):
        return "the product imports neither its tests nor its benchmarks"
    return None


def violations(found: list[Module]) -> list[str]:
    return [
        f"{module.name}, line {imported.line}: imports {target}: {rule}"
        for module in found
        for imported in imports(module)
        for target in imported.reaches
        if (rule := broken_rule(module, target)) is not None
    ]


def test_arrows_point_downward_only():
    found = modules("cookbook", "flows", "tasks")
    assert len(found) > 30
    assert violations(found) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cookbook.run", "import prefect"),
        ("cookbook.run", "def f():\n    from prefect import flow"),
        ("cookbook.cli.run", "import importlib\nimportlib.import_module('flows.sft')"),
        ("cookbook.run", "from .backend import snapshots"),
        ("cookbook.data.sft", "from ..backend.snapshots import verify"),
        ("cookbook.data.sft", "from .. import backend"),
        ("cookbook.backend.supervisor", "from cookbook.config import environment"),
        ("cookbook.backend.trainer.worker", "from ...run import Progress"),
        ("tasks.run", "from flows.sft import sft"),
        ("flows.sft", "import cookbook.backend.supervisor as s"),
        ("flows.sft", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cookbook.backend import app"),
        ("tasks.run", "from tests.tiny_model import make_tiny_model"),
    ],
)
def test_a_forbidden_import_is_seen_however_it_is_written(name, source):
    assert violations([parse(name, source)]) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flows.sft", "from tasks.run import open_run\nfrom prefect import flow"),
        ("tasks.run", "from cookbook.run import Progress"),
        ("cookbook.backend.trainer.worker", "from ..snapshots import verify\nfrom cookbook.losses import kernels"),
        ("cookbook.backend.trainer.worker", "from cookbook.errors import BackendError\nimport torch"),
    ],
)
def test_an_allowed_import_is_left_alone(name, source):
    assert violations([parse(name, source)]) == []


HEAVY = ("torch", "transformers", "wandb", "fireworks", "peft", "numpy", "httpx")
LIGHT_MODULES = ("cookbook.cli", "cookbook.config", "cookbook.errors", "cookbook.run", "cookbook.files")
LIGHT_MODULES += ("cookbook.validation", "cookbook.embedded", "cookbook.backend.supervisor", "cookbook.tracking")


def test_light_modules_import_nothing_heavy_at_their_top():
    for module in modules("cookbook"):
        if within(module.name, *LIGHT_MODULES):
            tops = {line_imports.target.partition(".")[0] for line_imports in imports(top_of(module))}
            assert tops.isdisjoint(HEAVY), f"{module.name} imports {tops & set(HEAVY)} at its top"


def top_of(module: Module) -> Module:
    """The module less its functions and its TYPE_CHECKING blocks."""
    kept = [node for node in module.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return parse(module.name, ast.unparse(ast.Module(kept, [])), is_package=module.is_package)


def public_names(found: list[Module]) -> Callable[[Import], bool]:
    """Whether an import takes a name that its module declares public, or a module."""
    declared = {module.name: declared_public(module) for module in found}
    packages = set(declared)

    def is_public(imported: Import) -> bool:
        if imported.name is None or imported.target not in declared or f"{imported.target}.{imported.name}" in packages:
            return True
        return imported.name in declared[imported.target]

    return is_public


def declared_public(module: Module) -> set[str]:
    """The names in `__all__`, which may be added to with `+=`."""
    names: set[str] = set()
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign | ast.AugAssign)
            names |= set(ast.literal_eval(node.value))
    return names


def test_only_public_names_cross_between_packages():
    """A package may share constants among its own modules; what others import is in `__all__`."""
    found = modules("cookbook", "flows", "tasks")
    is_public = public_names(found)
    crossing = [
        f"{module.name}, line {imported.line}: {imported.name} is not in __all__ of {imported.target}"
        for module in found
        for imported in imports(module)
        if not is_public(imported) and room(module.name) != room(imported.target)
    ]
    assert crossing == []


def room(name: str) -> str:
    """The package below cookbook that a module is in; modules directly in cookbook are one room each."""
    return ".".join(name.split(".")[:2])


def test_what_is_declared_public_exists():
    for module in modules("cookbook", "flows", "tasks"):
        bound = {
            alias.asname or alias.name
            for node in ast.walk(module.tree)
            for alias in getattr(node, "names", [])
            if isinstance(alias, ast.alias)
        }
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
        assert declared_public(module) <= bound, f"{module.name}: {declared_public(module) - bound} do not exist"


def test_every_module_with_public_definitions_declares_them():
    for module in modules("cookbook", "flows", "tasks"):
        public = [
            node.name
            for node in module.tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        if public and not module.name.endswith(".__main__"):
            assert declared_public(module), f"{module.name} defines {public}, but has no __all__"


def environment_reads(module: Module) -> list[int]:
    """Lines that read the environment. Setting a default for a library, `os.environ.setdefault(...)`, is none."""
    nodes = list(ast.walk(module.tree))
    set_only = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "setdefault"}
    names = ("environ", "environb", "getenv")
    return [n.lineno for n in nodes if isinstance(n, ast.Attribute) and n.attr in names and id(n) not in set_only]


def test_the_environment_is_read_in_the_config_only():
    """The backend is a process: it gets everything when it starts."""
    for module in modules("cookbook", "flows", "tasks"):
        if not within(module.name, "cookbook.config", "cookbook.backend"):
            lines = environment_reads(module)
            assert lines == [], f"{module.name}, lines {lines}: reads the environment; use cookbook.config"


def test_a_read_of_the_environment_is_seen():
    assert environment_reads(parse("m", "import os\nhome = os.environ['HOME']")) == [2]
    assert environment_reads(parse("m", "import os\nhome = os.getenv('HOME')")) == [2]
    assert environment_reads(parse("m", "import os\nos.environ.setdefault('A', '1')")) == []
