r"""How good a transport map is, at a test: its cost, and, where the right map is known, the variance that it leaves unexplained.

The field's figure of a map T against the right one T*, from alpha to beta, is

    ``L2-UVP = 100 E_alpha |T(x) - T*(x)|^2 / Var(beta)``   in per cent,

which the map to the mean of beta brings to 100. Source: Korotin et al. (2021), *Do neural optimal transport solvers work?*
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.contract import of_every_process
from amortized.problems.transport.potentials import Draws, GaussianPotential, Wasserstein2
from amortized.solvers import LBFGS, Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MongeMap(Callback):
    """Measures at a test both maps of a :class:`~amortized.problems.transport.Wasserstein2`, over the test's draws.

    Into ``monge`` of ``results.json``: ``W2_squared_network`` and ``W2_squared_solver``, the cost by the dual, with the conjugate
    as predicted and as solved; and where the data have a ``known`` potential, ``W2_squared_known``, ``uvp_forward`` (of
    ``grad f``), ``uvp_network`` and ``uvp_solver`` (of the two ways back), in per cent.

    Args:
        solver: of the conjugate, from the prediction; ``None``: 100 steps of L-BFGS.

    Raises:
        TypeError: if the module is not a :class:`~amortized.problems.transport.Wasserstein2`.
    """

    name = "monge"
    captions: ClassVar = {
        "monge": (
            "The map",
            "Left: draws of both measures. Middle: where the gradient of the potential takes the first's, with the way of "
            "some. Right: where the prediction takes the second's back to.",
        )
    }

    def __init__(self, solver: Solver | None = None) -> None:
        self.solver = solver if solver is not None else LBFGS(100)
        self.results: dict[str, Any] = {}
        self._found: list[tuple[Tensor, ...]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Wasserstein2):
            raise TypeError(f"MongeMap measures Wasserstein2; {type(pl_module).__name__} is none")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._found = {}, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or not isinstance(batch, Draws) or not len(outputs):
            return
        module: Any = pl_module
        with torch.inference_mode(False), torch.no_grad():
            a, b = Draws(*(leaf.clone() for leaf in batch)), outputs.detach().clone()
            solved = self.solver.solve(module, a, b).b
            values = [module.dual_value(x, a) for x in (b, solved)]
            self._found.append(tuple(part.cpu() for part in (*a, module.transport(a.x), b, solved, *values)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = of_every_process(self._found, trainer.world_size)
        parts = [batch for found in every for batch in found]
        if not parts:
            return
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        self.a, self.moved, self.back = Draws(*columns[:2]), columns[2], columns[3]
        known = getattr(getattr(trainer, "datamodule", None), "known", None)
        self.results = monge(self.a, self.moved, self.back, columns[4], columns[5:], known)

    def lines(self) -> list[tuple[str, str]]:
        """The cost, and what the maps leave unexplained."""
        found = self.results
        if not found:
            return []
        known = f"; known {found['W2_squared_known']:.4g}" if "W2_squared_known" in found else ""
        cost = f"{found['W2_squared_network']:.4g}; {found['W2_squared_solver']:.4g}{known}"
        lines = [("W₂² by the dual: network; solver", cost)]
        if known:
            shown = "; ".join(f"{found[f'uvp_{part}']:.3g} %" for part in ("forward", "network", "solver"))
            lines.append(("    L2-UVP: map; way back by network; by solver", shown))
        return lines

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """Both maps, of measures in the plane."""
        return {"monge": self._draw} if self.results and self.moved.shape[1] == 2 else {}

    def _draw(self) -> Figure:
        return draw_maps(self.a, self.moved, self.back)


def monge(
    a: Draws, moved: Tensor, back: Tensor, solved: Tensor, values: list[Tensor], known: GaussianPotential | None
) -> dict[str, float]:
    """The figures of :class:`MongeMap`.

    Args:
        a: N draws of both measures.
        moved: where the map takes x, ``(N, d)``.
        back: where the prediction takes y back to.
        solved: where the solver does.
        values: of the dual ``(N,)``, with the prediction and with the solution.
        known: the right potential, or ``None``.
    """
    squares = (a.x.square().sum(1) + a.y.square().sum(1)).mean()
    found = {
        f"W2_squared_{side}": float(squares - 2 * value.mean())
        for side, value in zip(("network", "solver"), values, strict=True)
    }
    if known is not None:
        right, right_back = known.carry(a.x), known.carry_back(a.y)
        maps = {"forward": (moved, right), "network": (back, right_back), "solver": (solved, right_back)}
        found["W2_squared_known"] = known.W2_squared
        found |= {f"uvp_{name}": unexplained(of, exact) for name, (of, exact) in maps.items()}
    return found


def unexplained(moved: Tensor, exact: Tensor) -> float:
    """L2-UVP in per cent: the mean squared distance between ``(N, d)`` points, over the variance of where they should be."""
    return 100 * float((moved - exact).square().sum(1).mean() / exact.var(0).sum())


def draw_maps(a: Draws, moved: Tensor, back: Tensor, shown: int = 1024) -> Figure:
    """Draws of both measures in the plane, and both maps of them."""
    from matplotlib.figure import Figure

    x, y, moved, back = (part[:shown].detach().cpu() for part in (a.x, a.y, moved, back))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    panels[0].plot(*x.T, ".", color="C0", markersize=3, label="x")
    panels[0].plot(*y.T, ".", color="C1", markersize=3, label="y")
    panels[0].legend(frameon=False)
    for axes, points, ends, colour, name in (
        (panels[1], x, moved, "C1", "∇f(x)"),
        (panels[2], y, back, "C0", "network(y)"),
    ):
        way = (ends - points)[:128]
        axes.quiver(*points[:128].T, *way.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="0.75")
        axes.plot(*ends.T, ".", color=colour, markersize=3)
        axes.set_title(name, fontsize=9)
    for axes in panels:
        axes.set(xticks=[], yticks=[], aspect="equal")
    return figure
