r"""Model predictive control of a chain: masses between two walls, joined by springs, brought to rest by pulls between them.

The program is that of :mod:`amortized.problems.control.mpc`; the plant is four masses of 1 and five springs of stiffness 1,
without friction, whose displacements p obey

    ``p_i'' = p_{i-1} - 2 p_i + p_{i+1} + f_i``,   ``p_0 = p_5 = 0``,   ``f = (u_1, -u_1 + u_2, -u_2 + u_3, -u_3)``,

where ``u_j`` is the tension between two neighbours, held for half a second. No displacement and no velocity may leave ± 2, no
tension ± 1. Left alone a chain swings for ever, and nobody can push a single mass: to stop one is to move another.

Source: Wang & Boyd (2010), *Fast model predictive control using online optimization*, section V, for the plant, there of six
masses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amortized.problems.control.mpc import LinearControl, Plant, PlantStates
from amortized.problems.control.pictures import Portrait

MASSES = 4
STEP = 0.5
"""Seconds between changes of the tensions."""
TENSION, DISPLACEMENT, VELOCITY = 1.0, 2.0, 2.0
"""The limits."""


class MassChain(LinearControl):
    """Masses on a chain, by the tensions between neighbours. Contexts ``(B, 8)``: displacements, then velocities.

    Args:
        network: ``(B, 8) -> (B, 3 horizon)``.
        horizon: T, steps of a plan.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    portrait = Portrait(
        (0, MASSES), ("displacement of mass 1", "its velocity"), TENSION, STEP, (DISPLACEMENT, VELOCITY)
    )
    brake: Tensor

    def __init__(self, network: nn.Module, horizon: int = 20, **kwargs: Any) -> None:
        dynamics, push = chain(MASSES, STEP)
        state_cost, limits = (1.0,) * MASSES + (0.1,) * MASSES, (DISPLACEMENT,) * MASSES + (VELOCITY,) * MASSES
        plant = Plant(dynamics, push, state_cost, 0.1, limits, TENSION)
        super().__init__(network, plant=plant, horizon=horizon, **kwargs)
        slow = torch.tensor((1.0,) * MASSES + (10.0,) * MASSES)
        brake = regulator(dynamics, push, torch.diag(slow).double(), 0.1 * torch.eye(MASSES - 1, dtype=torch.float64))
        self.register_buffer("brake", brake.to(torch.get_default_dtype()), persistent=False)

    def interior(self, a: Tensor) -> Tensor:
        """A plan strictly within all limits ``(B, 3 T)``: a linear regulator that minds velocities most, short of the limit.

        It is so for every one of 20,000 states of :class:`ChainStates`; from a larger box some have a plan, but not this one.
        """
        x, plan = a, []
        for _ in range(self.horizon):
            plan.append((-x @ self.brake.T).clamp(-0.95 * TENSION, 0.95 * TENSION))
            x = self.step(x, plan[-1])
        return torch.cat(plan, 1)


def chain(masses: int, step: float) -> tuple[Tensor, Tensor]:
    """A ``(2 n, 2 n)`` and B ``(2 n, n - 1)`` of n masses whose tensions are held for ``step`` seconds, exactly; float64."""
    n, eye = masses, torch.eye(masses, dtype=torch.float64)
    neighbours = eye.roll(1, 0).tril() + eye.roll(-1, 0).triu()
    motion = torch.zeros(3 * n - 1, 3 * n - 1, dtype=torch.float64)
    motion[:n, n : 2 * n] = eye
    motion[n : 2 * n, :n] = neighbours - 2 * eye
    motion[n : 2 * n, 2 * n :] = eye[:, :-1] - eye[:, 1:]
    held = torch.linalg.matrix_exp(step * motion)
    return held[: 2 * n, : 2 * n], held[: 2 * n, 2 * n :]


def regulator(dynamics: Tensor, push: Tensor, q: Tensor, r: Tensor, rounds: int = 1000) -> Tensor:
    """K ``(m, d)``: ``u = -K x`` minimizes ``Σ xᵀ q x + uᵀ r u`` without limits or end, by Riccati's recursion."""
    value, gain = q, push.mT
    for _ in range(rounds):
        gain = torch.linalg.solve(r + push.mT @ value @ push, push.mT @ value @ dynamics)
        value = q + dynamics.mT @ value @ (dynamics - push @ gain)
    return gain


class ChainStates(PlantStates):
    """States of a :class:`MassChain`: displacements within ± 1.2, velocities within ± 0.8, all of which have a plan."""

    box = (1.2,) * MASSES + (0.8,) * MASSES
