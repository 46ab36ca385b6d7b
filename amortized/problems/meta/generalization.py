r"""Whether amortizing beats solving, where the model sees a part of what it is judged on.

A learner has the support set alone. What a solver does in its place is to minimize the error on that,

    ``b_S(T) = argmin_b L(b; support of T)``,

and it overfits: the better it solves the inner problem, the worse it may do on the query set. So there are two gaps
between network and solver, with opposite signs as a rule: on what is seen, where the solver is at its best, and on
the query set, which counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.contract import draws, evaluate, of_every_process, stream_seed
from amortized.evaluation.float64 import at_least_float32
from amortized.problems.meta.classification import FewShotClassification
from amortized.problems.meta.few_shot import FewShot
from amortized.solvers import LBFGS, Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Generalization(Callback):
    """Measures at a test what the network and a solver of the support set make of both sets.

    Into ``generalization`` of ``results.json``, each a mean over the test's tasks, with half the width of its 95 % interval as
    ``*_ci``:

    * ``support_network``, ``support_solver``: the objective on the support set;
    * ``query_network``, ``query_solver``: on the query set;
    * ``accuracy_network``, ``accuracy_solver``: the share of query points classified rightly, of a classification;
    * ``wins``: the share of tasks on which the network's query objective is below the solver's; ``tasks``: how many.

    Args:
        solver: of the support set, from the template's own parameters; its steps are those that a user would take. ``None``:
            100 steps of L-BFGS.

    Raises:
        TypeError: if the module is not a :class:`~amortized.problems.meta.FewShot`.
    """

    name = "generalization"
    captions: ClassVar = {
        "generalization": (
            "Support and query set",
            "Each task's objective on the query set against that on the support set, for the network and for a solver that "
            "minimizes the latter. A solver far to the left and high up has overfitted.",
        )
    }

    def __init__(self, solver: Solver | None = None) -> None:
        self.solver = solver if solver is not None else LBFGS(100)
        self.results: dict[str, Any] = {}
        self._found: dict[str, list[Tensor]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, FewShot):
            raise TypeError(f"Generalization measures few-shot problems; {type(pl_module).__name__} is none")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._found = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or not len(outputs):
            return
        for name, values in generalization(pl_module, batch, outputs, self.solver, batch_idx).items():  # type: ignore[arg-type]
            self._found.setdefault(name, []).append(values.cpu())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = of_every_process(self._found, trainer.world_size)
        names = next((list(found) for found in every if found), [])
        self.rows = {name: torch.cat([part for found in every for part in found.get(name, [])]) for name in names}
        for name, values in self.rows.items():
            self.results |= {name: float(values.mean()), f"{name}_ci": interval(values)}
        if self.rows:
            self.results["tasks"] = len(self.rows["wins"])

    def lines(self) -> list[tuple[str, str]]:
        """Both sets, network and solver."""

        def shown(name: str, scale: float = 1) -> str:
            return f"{scale * self.results[name]:.4g} ± {scale * self.results[f'{name}_ci']:.2g}"

        found = [
            (
                f"{part} set (95 %): network; solver of the support set",
                f"{shown(f'{part}_network')}; {shown(f'{part}_solver')}",
            )
            for part in ("support", "query")
        ]
        if "accuracy_network" in self.results:
            both = "; ".join(f"{shown(f'accuracy_{side}', 100)} %" for side in ("network", "solver"))
            found.append(("    query points classified rightly", both))
        return [*found, ("    tasks on which the network is better", f"{self.results['wins']:.1%}")]

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """Query against support objective."""
        return {"generalization": self._draw}

    def _draw(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        for side, colour in (("network", "C3"), ("solver", "C0")):
            x, y = (self.rows[f"{part}_{side}"][:500].clamp(min=1e-8) for part in ("support", "query"))
            axes.plot(x, y, ".", color=colour, markersize=3, label=side)
        axes.set(xscale="log", yscale="log", xlabel="objective on the support set", ylabel="on the query set")
        both = axes.dataLim.intervalx
        axes.plot(both, both, color="0.7", linewidth=0.8, zorder=0)
        axes.legend(frameon=False)
        return figure


def generalization(module: FewShot, a: Any, b: Tensor, solver: Solver, seed: int = 0) -> dict[str, Tensor]:
    """What predictions ``b`` and a solver of the support sets have on both sets of each task, each ``(B,)``.

    Args:
        module: the problem.
        a: B tasks.
        b: predictions ``(B, P)``.
        solver: runs from ``module.initial(a)``.
        seed: number of the draws of a random objective.
    """
    module, a = at_least_float32(module, a)
    b = b.detach().to(torch.promote_types(b.dtype, torch.float32))
    with torch.no_grad():
        a, seen = module.prepare(a), module.observe(a)
    with draws(stream_seed(0, "gap search", seed), b.device):
        solved = solver.solve(module, seen, module.initial(a)).b
    found = {}
    for side, solution in (("network", b), ("solver", solved)):
        found[f"support_{side}"], found[f"query_{side}"] = (evaluate(module, solution, of) for of in (seen, a))
        if isinstance(module, FewShotClassification):
            with torch.no_grad():
                found[f"accuracy_{side}"] = module.accuracy(solution, a)
    found["wins"] = (found["query_network"] < found["query_solver"]).to(b.dtype)
    return found


def interval(values: Tensor) -> float:
    """Half the width of the 95 % interval of the mean of ``(N,)`` values."""
    return 1.96 * float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
