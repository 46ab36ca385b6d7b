"""``amortized.load``: a trained solver from a run, a checkpoint, or a reference checkpoint's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_warn

import amortized.networks
import amortized.problems  # noqa: F401  (what recipes name is known by its short names too)
from amortized import checkpoint
from amortized.contexts.data_module import ContextDataModule
from amortized.evaluation.calibration import Calibration
from amortized.module import AmortizedModule
from amortized.rebuild import rebuild
from amortized.shipping.trained import TrainedSolver
from amortized.solvers import Solver, solver_for

REFERENCES = Path(__file__).parents[2] / "checkpoints"
"""The reference checkpoints of a clone."""


def load(source: str | Path, device: str = "cpu") -> TrainedSolver:
    """The trained solver that a checkpoint holds: module, data, the gap's solver, and what its answers were calibrated to.

    A checkpoint names its classes, which are imported: load only what you trust. A class of your own must be importable.

    Args:
        source: a run's folder (its newest good checkpoint), a checkpoint file, or the name of a reference checkpoint.
        device: of the module.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is not good; :class:`~amortized.checkpoint.MismatchError`, one of
            these, if it does not say which recipe it is of, or that cannot be built here.

    Example:
        >>> solver = load("sphere")
        >>> a = solver.data.batch("test", 0)
        >>> answer = solver.solve(a, tol=0.01)
        >>> answer.b.shape, set(answer.path) <= {"network", "refined", "solver", "none"}
        (torch.Size([256, 3]), True)
    """
    path = find(source)
    loaded = checkpoint.load(path)
    recipe = checkpoint.recipe_in(path, loaded)
    module = AmortizedModule.from_checkpoint(path, loaded)
    data = rebuild(recipe["data"], ContextDataModule, f"{path}, its data")
    held = loaded.get(checkpoint.CERTIFICATE)
    calibration = Calibration.of(held) if held else None
    precision = (recipe.get("trainer") or {}).get("precision")
    solver = _solver(path, loaded, module)
    return TrainedSolver(module, data, solver, calibration, _name(path), precision).to(device)


def untrained(recipe: dict[str, Any], name: str) -> TrainedSolver:
    """A recipe's problem, data and gap's solver, before any training: every context is solved from the cold start.

    Args:
        recipe: its settings, with full names of classes.
        name: of the recipe.

    Raises:
        MismatchError: if it cannot be built.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.get("seed_everything") or 0)
        module = rebuild(recipe["model"], AmortizedModule, f"{name}, its model")  # type: ignore[type-abstract]
    data = rebuild(recipe["data"], ContextDataModule, f"{name}, its data")
    held = (recipe.get("gap") or {}).get("solver")
    solver = solver_for(module) if held is None else rebuild(held, Solver, f"{name}, the gap's solver")  # type: ignore[type-abstract]
    precision = (recipe.get("trainer") or {}).get("precision")
    return TrainedSolver(module, data, solver, None, name, precision, trained=False)


def find(source: str | Path) -> Path:
    """The checkpoint file that ``source`` names; see :func:`load`."""
    path = Path(source)
    if path.is_dir():
        found = checkpoint.newest(path)
        if found.path is None:
            why = f": {found.faults[0]}" if found.faults else ""
            raise checkpoint.CheckpointError(f"there is no good checkpoint in {path}{why}")
        return found.path
    reference = REFERENCES / f"{path}.ckpt"
    if not path.exists() and path.suffix != ".ckpt" and reference.is_file():
        return reference
    if not path.exists() and path.name == str(path) and not path.suffix:
        names = (
            ", ".join(sorted(file.stem for file in REFERENCES.glob("*.ckpt"))) or f"none, as {REFERENCES} is missing"
        )
        raise checkpoint.CheckpointError(
            f"no run, checkpoint or reference checkpoint {str(source)!r}; the reference checkpoints are {names}"
        )
    return path


def _solver(path: Path, loaded: dict[str, Any], module: AmortizedModule) -> Solver:
    """The gap's solver: what the checkpoint holds; of an older one, what its run's folder says, or that of the structure."""
    held = loaded.get(checkpoint.SOLVER)
    if checkpoint.SOLVER not in loaded:
        config = _config(path)
        held = (config.get("gap") or {}).get("solver")
        if not config:
            rank_zero_warn(
                f"{path} does not hold the gap's solver (it is older): that of the problem's structure is taken"
            )
    return solver_for(module) if held is None else rebuild(held, Solver, f"{path}, the gap's solver")  # type: ignore[type-abstract]


def _config(path: Path) -> dict[str, Any]:
    """The settings in the folder of a checkpoint's run, if it lies in one."""
    config = path.parent.parent / "config.yaml"
    found = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    return found if isinstance(found, dict) else {}


def _name(path: Path) -> str:
    """Of the recipe, as its run's folder or the file's name says it."""
    return str(_config(path).get("recipe") or path.stem)
