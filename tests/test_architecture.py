"""The house: imports run one way, no field knows another, and what is not needed is not loaded."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchmetrics
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI

ROOT = Path(__file__).parent.parent / "amortized"

# Each floor imports from those below it alone, and from its own part of the floor.
FLOORS = [
    ["contract", "disk"],
    ["checkpoint", "npz"],
    ["rebuild"],
    ["solvers", "networks", "contexts", "posteriors"],
    ["certificates"],
    ["losses", "lightning_private", "finite"],
    ["launched", "update", "first_batch", "strategies"],
    ["module"],
    ["evaluation"],
    ["testing", "report", "loggers"],
    ["callbacks", "problems"],
    ["shipping"],
    ["cli"],
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
TORCH_ONLY = ("contract", "solvers")


def part_of(module):
    """The part of the house that a module ``amortized.PART...`` is in; the package itself is above all."""
    return module.split(".")[1] if "." in module else "cli"


def imports(path):
    """The modules that a file imports when it is imported or run; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "amortized" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
PARTS = [name for name in FILES if part_of(name) not in ("__init__", "__main__")]


@pytest.mark.parametrize("name", PARTS)
def test_imports_run_one_way(name):
    part, floor = part_of(name), FLOOR[part_of(name)]
    for found in imports(FILES[name]):
        if found.split(".")[0] != "amortized":
            assert part not in TORCH_ONLY or found.split(".")[0] not in (
                "lightning",
                "torchmetrics",
                "matplotlib",
                "sklearn",
            )
            continue
        other = part_of(found)
        assert other == part or FLOOR[other] < floor, f"{name} imports {found}, which is on the same floor or above"


def field_of(name):
    """The field of ``amortized.problems.FIELD...``."""
    return name.split(".")[2] if name.startswith("amortized.problems.") else None


@pytest.mark.parametrize("name", [name for name in PARTS if field_of(name) not in (None, "__init__")])
def test_no_field_imports_another(name):
    others = {field_of(found) for found in imports(FILES[name])} - {None, field_of(name)}
    assert not others, f"{name} imports {others}: what two fields share moves down into the core"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {found for found in imports(path) if found in FILES} for name, path in FILES.items()}
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            for found in graph[name]:
                visit(found, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def loaded_by(statement):
    """The modules loaded after a statement, and the seconds that it took beyond importing torch, in a fresh interpreter."""
    code = (
        f"import torch, time, sys; t = time.perf_counter(); {statement}; print(time.perf_counter() - t, *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), set(out[1:])


def test_importing_the_package_costs_nothing():
    seconds, modules = loaded_by("import amortized")
    assert seconds < 0.3
    assert not modules & {"lightning", "torchmetrics", "matplotlib", "sklearn", "torch._dynamo", "wandb"}


def test_solvers_need_torch_alone():
    seconds, modules = loaded_by("import amortized.solvers")
    assert not modules & {
        "lightning",
        "torchmetrics",
        "matplotlib",
        "sklearn",
        "scipy",
        "torch._dynamo",
        "torch._inductor",
    }


@pytest.mark.parametrize("name", [name for name in PARTS if part_of(name) in ("problems", "contexts", "networks")])
def test_what_only_pictures_and_data_need_is_imported_where_it_is_used(name):
    top = [node for node in ast.parse(FILES[name].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {part.split(".")[0] for node in top for part in [getattr(node, "module", None) or node.names[0].name]}
    assert not found & {"matplotlib", "sklearn", "scipy", "zuko", "wandb"}


def test_help_and_a_recipe_that_there_is_not_load_nothing_heavy():
    for args in (["--help"], ["fit", "-c", "vae_digit"]):
        code = f"import sys; from amortized.cli import main\ntry: main({args})\nfinally: print(*sys.modules, file=sys.stderr)"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert told.returncode == (2 if "-c" in args else 0)
        assert not set(told.stderr.split()) & {"torch", "lightning", "matplotlib"}
        assert "did you mean vae_digits" in told.stderr or "usage: amortized" in told.stdout


def test_a_misspelt_name_is_answered_with_the_one_meant():
    import amortized

    with pytest.raises(AttributeError, match="did you mean AmortizedModule"):
        amortized.AmortisedModule  # noqa: B018
    assert set(amortized.__all__) <= set(dir(amortized))
    for name in amortized.__all__:
        assert getattr(amortized, name).__name__ == name


def test_private_names_of_lightning_are_in_one_file():
    """And of no other package, but for some of the compiler's that PyTorch itself tells users to call."""
    trees = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    ours |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    allowed = {"_fields", "_asdict", "_exit"}  # of a NamedTuple; of os
    used = {(name, node.attr) for name, node in nodes if isinstance(node, ast.Attribute) and node.attr not in ours}
    used |= {
        (name, part)
        for name, node in nodes
        if isinstance(node, ast.ImportFrom) and not node.module.startswith(("amortized", "__future__"))
        for part in (*node.module.split("."), *(alias.name for alias in node.names))
    }
    private = {(name, x) for name, x in used if x.startswith("_") and not x.startswith("__")}
    private = {(name, x) for name, x in private if name != "amortized.lightning_private" and x not in allowed}
    counters = {("amortized.solvers.feasible.linear", "_version")}  # how often a tensor was changed in place
    assert private == {(f"amortized.{file}", "_dynamo") for file in ("solvers.engine.compiled", "update")} | counters
    overridden = {name for name in vars(torchmetrics.Metric) | vars(LightningCLI) if re.match("_[a-z]", name)}
    overridden |= {name for name in vars(LightningModule) if re.match("_[a-z]", name)}
    methods = {(n, x.name) for n, x in nodes if isinstance(x, ast.FunctionDef) and x.name in overridden}
    mine = {"_run"}  # of a Metric of no kind
    assert {name for name, method in methods if method not in mine} <= {"amortized.lightning_private"}
