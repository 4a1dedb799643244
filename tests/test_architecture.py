"""The package's own rules: imports go down, __all__ is literal, private names are in one file."""

import ast
import re
from pathlib import Path

import pytest

import bnstats

ROOT = Path(bnstats.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# A module may import from its own floor's package and from every floor below it.
FLOORS = [
    {"errors", "formatting", "hooks", "private"},
    {"arguments", "contexts", "reduction"},
    {"masked_reduction", "moments"},
    {"accumulators", "traversal", "distributed", "interrupts", "masks"},
    {"holding", "freezing"},
    {"layers"},
    {"conversion", "recomputation"},
    {"diagnosis", "integrations"},
    {""},
    {"cli", "integrations"},
    {"__main__"},
]


def part(module):
    return module.split(".")[1] if "." in module else ""


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def module_name(path):
    parts = ["bnstats", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnstats"):
            for alias in node.names:
                module = ROOT.joinpath(*node.module.split(".")[1:], alias.name)
                is_module = module.is_dir() or module.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "bnstats")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_strictly_down(path):
    mine = part(module_name(path))
    for imported in imports(path):
        theirs = part(imported)
        assert theirs == mine or floor(theirs) < floor(mine), f"{path} imports {imported}"
        assert (mine, theirs) != ("recomputation", "layers"), "recomputation serves any BatchNorm"


def test_no_module_of_recomputation_imports_itself_through_others():
    graph = {module_name(path): set(imports(path)) for path in MODULES}
    # A package's own __init__ collects what is in it.
    inside = {name: {x for x in found if x in graph} for name, found in graph.items()}

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for imported in inside[name]:
            if not name.startswith(f"{imported}."):
                visit(imported, [*above, name])

    for name in inside:
        if name.startswith("bnstats.recomputation."):
            visit(name, [])


def test_every_module_has_a_floor():
    for path in MODULES:
        floor(part(module_name(path)))


def test_the_surface_is_literal_sorted_and_there():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert names == sorted(set(names)) == bnstats.__all__
    for name in names:
        assert getattr(bnstats, name).__doc__, name


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_private_names_of_torch_are_used_in_one_place(path):
    if path.name != "private.py":
        text = (ROOT / path).read_text().replace('"torch._dynamo" not in', "")
        assert not re.search(r"\btorch(\.\w+)*\._|\._schema|hooks\[", text)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_stay_short(path):
    assert len((ROOT / path).read_text().splitlines()) <= 300


def test_each_error_is_a_builtin_error_too():
    builtin = (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError)
    for error in bnstats.BnstatsError.__subclasses__():
        assert issubclass(error, builtin), error
