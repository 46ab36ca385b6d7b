r"""Receding horizon: plan, make the first move alone, plan anew from where that led; what all the moves cost together.

A plan's gap says how well one problem is solved. In use a plan is made at every step and only its first move is made, so
that errors may cancel or add up: the closed loop's cost is ``Σ_t c(x_t, u_t)`` with ``u_t`` the first move of the plan for
``x_t``. It is measured for the network, for a solver that starts cold, and for one that starts from the network's plan.

Source: Rawlings, Mayne & Diehl (2017), *Model predictive control*, section 1.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.contract import Context, num_rows, take, violation
from amortized.module import AmortizedModule
from amortized.problems.control.pictures import Portrait, draw_plans
from amortized.solvers import Solver, solver_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Controlled(Protocol):
    """What a problem of control says beside its objective; its contexts are states ``(B, d)``."""

    portrait: Portrait
    """How to draw its paths."""

    def controls(self, b: Tensor, a: Tensor) -> Tensor:
        """The moves of a plan ``(B, T, m)``."""
        ...

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """The state after a move: ``(B, d), (B, m) -> (B, d)``."""
        ...

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        """Of a move in a state, ``(B,)``."""
        ...


Planner = Callable[[Tensor], Tensor]
"""Plans for states: ``(B, d) -> (B, *)``."""


class Run(NamedTuple):
    """A closed loop of N steps from B states."""

    cost: Tensor
    """``(B,)``, of all moves."""
    violation: Tensor
    """``(B,)``, the largest of the plans; of a problem without constraints 0."""
    states: Tensor
    """``(B, N + 1, d)``."""
    controls: Tensor
    """``(B, N, m)``."""
    seconds: float
    """For a plan of each of the B states, the median step."""


@torch.no_grad()
def receding_horizon(problem: Any, planner: Planner, x: Tensor, steps: int) -> Run:
    """Control a system for ``steps`` steps from states x ``(B, d)``.

    Args:
        problem: :class:`Controlled`.
        planner: the policy.
        x: where to start ``(B, d)``.
        steps: N, at least 1.

    Raises:
        ValueError: if ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"receding_horizon: steps must be positive; got {steps}")
    states = [x]
    controls: list[Tensor] = []
    seconds: list[float] = []
    total, off = x.new_zeros(len(x)), x.new_zeros(len(x))
    for _ in range(steps):
        started = time.perf_counter()
        b = planner(x)
        u = problem.controls(b, x)[:, 0]
        seconds.append(time.perf_counter() - started)
        total, off = total + problem.cost(x, u), torch.maximum(off, violation(problem, b, x))
        x = problem.step(x, u)
        states.append(x)
        controls.append(u)
    return Run(total, off, torch.stack(states, 1), torch.stack(controls, 1), sorted(seconds)[len(seconds) // 2])


def planners(module: AmortizedModule, solver: Solver) -> dict[str, Planner]:
    """The network; the solver, started cold; the solver, started from the network's plan and multipliers."""
    return {
        "network": module,
        "solver": lambda x: solver.solve(module, x, module.initial(x)).b,
        "solver from the network": lambda x: solver.solve(module, x, module(x), dual=module.dual(x)).b,
    }


class ClosedLoop(Callback):
    """Measures receding-horizon control at a test, into ``closed_loop`` of ``results.json``, the table, and a picture.

    For each of ``network``, ``solver`` and ``solver from the network``: the mean ``cost`` over the first contexts of the test,
    and the ``milliseconds`` that their plans take a step. Contexts for which the solver proves that there is no plan are left
    out; ``impossible`` is how many. ``violation`` is the largest of any plan on the way, in the constraints' units.

    Args:
        solver: plans; ``None``: the one that the problem's structure asks for.
        steps: of the loop.
        contexts: at most so many.
    """

    name = "closed_loop"
    captions: ClassVar = {
        "closed_loop": (
            "Receding horizon",
            "Paths of the closed loop, where at each step one plans anew and makes the first move alone, and the moves.",
        )
    }

    def __init__(self, solver: Solver | None = None, steps: int = 40, contexts: int = 128) -> None:
        if steps < 1 or contexts < 1:
            raise ValueError(f"ClosedLoop: steps and contexts must be positive; got {steps} and {contexts}")
        self.solver, self.steps, self.contexts = solver, steps, contexts
        self.results: dict[str, Any] = {}
        self._pictures: dict[str, Callable[[], Figure]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        missing = [name for name in ("controls", "step", "cost", "portrait") if not hasattr(pl_module, name)]
        if missing or not isinstance(pl_module, AmortizedModule):
            raise TypeError(
                f"ClosedLoop measures a problem of control: {type(pl_module).__name__} has no {', '.join(missing)} "
                "(see amortized.problems.control.closed_loop.Controlled)"
            )

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._pictures = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Context,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or not trainer.is_global_zero or not len(outputs):
            return
        assert isinstance(pl_module, AmortizedModule)
        solver = self.solver or solver_for(pl_module)
        x: Any = take(batch, slice(0, min(self.contexts, num_rows(batch))))
        possible = ~solver.solve(pl_module, x, pl_module.initial(x)).infeasible
        x, asked = x[possible], len(x)
        if not len(x):
            return
        runs = {
            name: receding_horizon(pl_module, planner, x, self.steps)
            for name, planner in planners(pl_module, solver).items()
        }
        self.results = {
            "contexts": len(x),
            "impossible": asked - len(x),
            "steps": self.steps,
            **{
                name.replace(" ", "_"): {
                    "cost": float(run.cost.mean()),
                    "violation": float(run.violation.max()),
                    "milliseconds": 1e3 * run.seconds,
                }
                for name, run in runs.items()
            },
        }
        self._pictures["closed_loop"] = lambda: _draw(pl_module, runs)

    def lines(self) -> list[tuple[str, str]]:
        """For the table."""
        found = {name: r for name, r in self.results.items() if isinstance(r, dict)}
        return [
            (
                f"closed loop of {self.results['steps']} steps, {name.replace('_', ' ')}",
                f"{r['cost']:.4g}; {r['milliseconds']:.1f} ms a step for {self.results['contexts']} states",
            )
            for name, r in found.items()
        ]

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """For the report."""
        return self._pictures


def _draw(problem: Any, runs: dict[str, Run]) -> Figure:
    """The paths and moves of the network and of the solver."""
    kept = {name: runs[name] for name in ("network", "solver")}
    paths, moves = {name: run.states for name, run in kept.items()}, {name: run.controls for name, run in kept.items()}
    return draw_plans(problem.portrait, paths, moves)
