r"""Model predictive control: where to push a linear system so that it comes to rest at the origin, within limits of all there is.

A context is the state ``a = x_0`` now; a solution is the plan of the next T pushes, ``u_0 .. u_{T-1}``:

    ``min_u  Σ_t  x_{t+1}ᵀ Q x_{t+1} + r ‖u_t‖²``,  ``x_{t+1} = A x_t + B u_t``, ``x_0 = a``
    subject to  ``|u_t| ≤ u_max``  and  ``|x_{t+1}| ≤ x_max``, each part of its own, at every step.

The states follow from the plan, ``x = F a + G u``, so this is a quadratic program of T m unknowns and T (m + d) constraints,
whose matrices all contexts share. A system is its :class:`Plant`; the one here is the double integrator, a mass on a line, with
``|u_t| ≤ 1``, ``|position| ≤ 5``, ``|velocity| ≤ 2``. Of its states within the limits some (7 in 100) are too fast and too near a
wall to be stopped: those have no feasible plan, a solver proves it, and they are counted, not averaged. Only the plan's first
push is made; then one plans anew: :class:`~amortized.problems.control.ClosedLoop`.

Source: Rawlings, Mayne & Diehl (2017), *Model predictive control*, chapter 1; Borrelli, Bemporad & Morari (2017), *Predictive
control for linear and hybrid systems*, example 12.1, for the double integrator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import Context, QuadraticProgram
from amortized.module import AmortizedModule
from amortized.problems.control.pictures import Portrait, draw_plans
from amortized.solvers.feasible.correction import Correction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.2
"""Seconds between pushes."""
PUSH, POSITION, VELOCITY = 1.0, 5.0, 2.0
"""The limits."""
STATE_COST, PUSH_COST = (1.0, 0.1), 0.1
"""The diagonal of Q, and r."""


class Plant(NamedTuple):
    """A linear system with its cost and limits."""

    dynamics: Tensor
    """A ``(d, d)``."""
    push: Tensor
    """B ``(d, m)``."""
    state_cost: tuple[float, ...]
    """The diagonal of Q, d numbers."""
    push_cost: float
    """r."""
    state_limit: tuple[float, ...]
    """``x_max``, d numbers."""
    push_limit: float
    """``u_max``."""


class LinearControl(AmortizedModule):
    """The best plan of a plant from a state. Contexts ``(B, d)``, solutions ``(B, horizon m)``, a step's m pushes together.

    With ``refine: Gauge`` every prediction keeps all limits wherever :meth:`interior` finds room, which a subclass writes.

    Args:
        network: ``(B, d) -> (B, horizon m)``.
        plant: what is pushed.
        horizon: T, steps of a plan.
        **kwargs: see :class:`~amortized.AmortizedModule`.

    Raises:
        ValueError: if there is no step.
    """

    objective_name = "cost of the plan"
    feasibility_tol = 1e-5
    portrait: Portrait
    dynamics: Tensor
    push: Tensor
    free: Tensor
    forced: Tensor
    weight: Tensor
    P: Tensor
    A: Tensor

    def __init__(self, network: nn.Module, plant: Plant, horizon: int = 20, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        if horizon < 1:
            raise ValueError(f"{type(self).__name__}: horizon must be positive; got {horizon}")
        self.plant, self.horizon = plant, horizon
        dynamics, push = plant.dynamics.double(), plant.push.double()
        d, m = push.shape
        powers = [torch.linalg.matrix_power(dynamics, t) for t in range(horizon + 1)]
        forced = torch.zeros(horizon, d, horizon, m, dtype=torch.float64)
        for t in range(horizon):
            for k in range(t + 1):
                forced[t, :, k] = powers[t - k] @ push
        forced = forced.view(horizon * d, horizon * m)
        weight = torch.tensor(plant.state_cost, dtype=torch.float64).repeat(horizon)
        eye = torch.eye(horizon * m, dtype=torch.float64)
        found = {
            "dynamics": dynamics,
            "push": push,
            "free": torch.cat(powers[1:]),
            "forced": forced,
            "weight": weight,
            "P": 2 * (forced.mT * weight) @ forced + 2 * plant.push_cost * eye,
            "A": torch.cat([eye, forced]),
        }
        for name, value in found.items():
            self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)

    def states(self, b: Tensor, a: Tensor) -> Tensor:
        """The state after each step ``(B, T, d)``."""
        return (a @ self.free.T + b @ self.forced.T).unflatten(1, (self.horizon, -1))

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.states(b, a).flatten(1).square() @ self.weight + self.plant.push_cost * b.square().sum(1)

    def program(self, a: Tensor) -> QuadraticProgram:
        """The program of each state; its value lacks a constant, the cost of pushing not at all."""
        free = a @ self.free.T
        limit = a.new_tensor(self.plant.state_limit).repeat(self.horizon)
        one = self.plant.push_limit * a.new_ones(len(a), self.P.shape[0])
        return QuadraticProgram(
            self.P, 2 * (free * self.weight) @ self.forced, self.A,
            torch.cat([-one, -limit - free], 1), torch.cat([one, limit - free], 1),
        )  # fmt: skip

    def initial(self, a: Tensor) -> Tensor:
        return a.new_zeros(len(a), self.P.shape[0])

    def controls(self, b: Tensor, a: Tensor) -> Tensor:
        """The plan as pushes ``(B, T, m)``."""
        return b.unflatten(1, (-1, self.push.shape[1]))

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """The state after pushes ``(B, m)``."""
        return x @ self.dynamics.T + u @ self.push.T

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        """Of pushing in a state and ending in another, ``(B,)``: what the objective sums."""
        return self.step(x, u).square() @ self.weight[: x.shape[1]] + self.plant.push_cost * u.square().sum(1)

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """Plans as paths among the states, and their pushes, with the limits."""
        paths = {name: torch.cat([a.unsqueeze(1), self.states(b, a)], 1) for name, b in solutions.items()}
        return draw_plans(self.portrait, paths, {name: self.controls(b, a) for name, b in solutions.items()})


class DoubleIntegrator(LinearControl):
    """A mass on a line, pushed. Contexts ``(B, 2)``, solutions ``(B, horizon)``.

    With ``refine: Gauge`` every prediction keeps all limits, wherever a plan can; with a :class:`SpeedLimit` before it, plans
    get nearer to the best.

    Args:
        network: ``(B, 2) -> (B, horizon)``.
        horizon: T, pushes in a plan.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    portrait = Portrait((0, 1), ("position", "velocity"), PUSH, STEP, (POSITION, VELOCITY))

    def __init__(self, network: nn.Module, horizon: int = 20, **kwargs: Any) -> None:
        exact = torch.float64
        dynamics, push = (
            torch.tensor([[1, STEP], [0, 1]], dtype=exact),
            torch.tensor([[STEP**2 / 2], [STEP]], dtype=exact),
        )
        plant = Plant(dynamics, push, STATE_COST, PUSH_COST, (POSITION, VELOCITY), PUSH)
        super().__init__(network, plant=plant, horizon=horizon, **kwargs)

    def interior(self, a: Tensor) -> Tensor:
        """A plan strictly within all limits, where there is one ``(B, T)``: brake, harder than need be, then go home evenly.

        To be stopped in time a mass at speed v and distance d from the wall must be braked by ``v² / 2 d`` at least; it is
        braked by the mean of that and the limit.
        """
        x, v = a.unbind(1)
        home = (-x / (self.horizon * STEP)).clamp(-0.7 * VELOCITY, 0.7 * VELOCITY)
        ahead = (POSITION - x * v.sign()).clamp(min=1e-6)
        strength = ((v.square() / (2 * ahead) + PUSH) / 2).clamp(max=PUSH)
        off = (v - home).unsqueeze(1)
        done = STEP * strength.unsqueeze(1) * torch.arange(self.horizon, device=a.device, dtype=a.dtype)
        return -off.sign() * torch.minimum((off.abs() - done).clamp(min=0) / STEP, strength.unsqueeze(1))


class SpeedLimit(Correction):
    """``u_t`` becomes the nearest push within its limit that keeps the velocity within its own, one step after another.

    Of a :class:`DoubleIntegrator` it meets two of the three limits exactly and moves no push that meets them. A
    :class:`~amortized.solvers.Gauge` after it, in a :class:`~amortized.solvers.Sequence`, then only has to keep the mass off the
    walls: alone it shortens a whole plan because of one push.
    """

    def require(self, problem: Any) -> None:
        """Raises ``TypeError`` unless the problem is a :class:`DoubleIntegrator`."""
        if not isinstance(problem, DoubleIntegrator):
            raise TypeError(f"SpeedLimit is for plans of a DoubleIntegrator; got {type(problem).__name__}")

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        assert isinstance(a, Tensor)
        speeds = [a[:, 1:].to(b.dtype)]
        for gain in (STEP * b.clamp(-PUSH, PUSH)).split(1, 1):
            speeds.append((speeds[-1] + gain).clamp(-VELOCITY, VELOCITY))
        return torch.cat(speeds, 1).diff(dim=1) / STEP


class PlantStates(ContextDataModule):
    """States ``(B, d)`` drawn uniformly from a ``box``, or from one ``scale`` times as large.

    Args:
        scale: of all sides of the box.
        **kwargs: see :class:`~amortized.contexts.ContextDataModule`.

    Raises:
        ValueError: if ``scale`` is not positive.
    """

    box: ClassVar[tuple[float, ...]]
    """Half the length of each of the d sides."""

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scale <= 0:
            raise ValueError(f"{type(self).__name__}: scale must be positive; got {scale}")
        self.scale = scale

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        box = torch.tensor(self.box, device=generator.device)
        return self.scale * box * (2 * torch.rand(n, len(box), generator=generator, device=generator.device) - 1)


class IntegratorStates(PlantStates):
    """States of a :class:`DoubleIntegrator`, from the box of its limits; from a larger one most of those added have no plan."""

    box = (POSITION, VELOCITY)
