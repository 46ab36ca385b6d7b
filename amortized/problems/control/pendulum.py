r"""Policies through a model: swing a pendulum up, or a pole on a cart, with too little force to do it in one go.

A context is a state ``x_0``; a solution is a plan of T forces, as real numbers b; the cost is that of the path they make,

    ``L(b; x_0) = Σ_t c(x_{t+1}, u_t)``,  ``u_t = u_max tanh(b_t)``,  ``x_{t+1} = x_t + h f(x_t, u_t)``.

A network that prints T forces must know where they lead. A *policy* need not: ``b_t = π(x_t, t)``, rolled out through the same
model (:class:`Policy`), is a plan all the same, trained by the same objective and measured by the same gap. The cost has
minima by the dozen (to which side, after how many swings), so a policy has K proposals, and the plan is the cheapest of the
paths that it rolls out.

Source: Sutton & Barto (2018) and Barto, Sutton & Anderson (1983) for the two systems, with the numbers of Gymnasium's
``Pendulum`` and ``CartPole``; Åström & Furuta (2000), *Swinging up a pendulum by energy control*, for the cold start;
Deisenroth & Rasmussen (2011) for policies through a model; Johannink et al. (2019), *Residual reinforcement learning for robot
control*, for learning what a rule lacks; Guzmán-Rivera et al. (2012), *Multiple choice learning*, for proposals of which the best
counts.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.module import AmortizedModule
from amortized.networks import MLP
from amortized.problems.control.pictures import Portrait, draw_plans

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class System(nn.Module, abc.ABC):
    """A thing to be moved by one force: its motion, its cost, and the states that it starts from."""

    names: ClassVar[tuple[str, ...]]
    """Of the parts of a state, d of them."""
    limit: ClassVar[float]
    """Of the force, to either side."""
    period: ClassVar[float]
    """h, seconds between two forces."""
    start: ClassVar[tuple[float, ...]]
    """States start uniformly between plus and minus this; angles are from upright."""
    angles: ClassVar[tuple[int, ...]]
    """Which parts of a state are angles."""

    @abc.abstractmethod
    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """The state after a period under forces ``(B, 1)``: ``(B, d) -> (B, d)``."""

    @abc.abstractmethod
    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        """Of being in a state and having pushed so, ``(B,)``."""

    @abc.abstractmethod
    def rule(self, x: Tensor) -> Tensor:
        """A force in the range ``(B, 1)`` that a simple rule takes, which is where solvers start."""

    def ruled(self, x: Tensor) -> Tensor:
        """The rule as a b ``(B, 1)``: nine tenths of its force, which a finite b can say."""
        return (0.9 * self.rule(x) / self.limit).atanh()

    def features(self, x: Tensor) -> Tensor:
        """What a policy sees of a state, all about 1 in size: angles by sine and cosine."""
        parts: list[Tensor] = []
        for i, part in enumerate(x.split(1, 1)):
            parts += [part.sin(), part.cos()] if i in self.angles else [part / 4]
        return torch.cat(parts, 1)


class Pendulum(System):
    """A rod that hangs by one end; the torque lifts it by at most 24 degrees from rest."""

    names = ("angle", "speed")
    limit, period, start, angles = 2.0, 0.05, (math.pi, 1.0), (0,)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        theta, omega = x.split(1, 1)
        omega = omega.add(theta.sin(), alpha=15 * self.period).add(u, alpha=3 * self.period)
        return torch.cat([theta.add(omega, alpha=self.period), omega], 1)

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        theta, omega = x.unbind(1)
        return 2 - 2 * theta.cos() + 0.1 * omega.square() + 0.001 * u[:, 0].square()

    def rule(self, x: Tensor) -> Tensor:
        theta, omega = x[:, :1], x[:, 1:]
        lacking = 15 * (1 - theta.cos()) - omega.square() / 2
        pump = self.limit * torch.where(lacking > 0, 1.0, -1.0) * torch.where(omega < 0, -1.0, 1.0)
        hold = (-10 * theta.sin() - 2 * omega).clamp(-self.limit, self.limit)
        return torch.where(theta.cos() > 0.95, hold, pump)


class CartPole(System):
    """A pole on a cart that is pushed along a rail."""

    names = ("position", "velocity", "angle", "speed")
    limit, period, start, angles = 10.0, 0.05, (1.0, 0.5, math.pi, 1.0), (2,)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        position, velocity, theta, omega = x.unbind(1)
        mass, pole, length = 1.1, 0.1, 0.5
        sin, cos = theta.sin(), theta.cos()
        push = (u[:, 0] + pole * length * omega.square() * sin) / mass
        turn = (9.8 * sin - cos * push) / (length * (4 / 3 - pole * cos.square() / mass))
        velocity = velocity + self.period * (push - pole * length * turn * cos / mass)
        omega = omega + self.period * turn
        return torch.stack([position + self.period * velocity, velocity, theta + self.period * omega, omega], 1)

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        position, velocity, theta, omega = x.unbind(1)
        moving = 0.01 * velocity.square() + 0.01 * omega.square()
        return 2 - 2 * theta.cos() + 0.1 * position.square() + moving + 0.001 * u[:, 0].square()

    def rule(self, x: Tensor) -> Tensor:
        position, velocity, theta, omega = x.split(1, 1)
        lacking = 9.8 * (1 - theta.cos()) - omega.square() / 3
        pump = -4 * lacking.sign() * (omega * theta.cos()).sign() - position - velocity
        hold = 30 * theta.sin() + 6 * omega + position + 2 * velocity
        return torch.where(theta.cos() > 0.9, hold, pump).clamp(-self.limit, self.limit)


class SwingUp(AmortizedModule):
    """The cheapest path of a system from a state. Contexts ``(B, d)``, solutions ``(B, horizon)``.

    Args:
        network: ``(B, d) -> (B, horizon)``: a :class:`Policy` of the same system and horizon, or any other.
        system: what is moved.
        horizon: T, forces in a plan.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "cost of the path"

    def __init__(self, network: nn.Module, system: System | None = None, horizon: int = 60, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.system, self.horizon = system if system is not None else Pendulum(), horizon

    @property
    def portrait(self) -> Portrait:
        """The angle and its speed."""
        system, angle = self.system, self.system.angles[0]
        return Portrait((angle, angle + 1), (system.names[angle], system.names[angle + 1]), system.limit, system.period)

    def controls(self, b: Tensor, a: Tensor) -> Tensor:
        """The plan as forces ``(B, T, 1)``."""
        return self.system.limit * b.tanh().unsqueeze(2)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """The state after forces ``(B, 1)``."""
        return self.system.step(x, u)

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        """Of pushing in a state and ending in another, ``(B,)``: what the objective sums."""
        return self.system.cost(self.system.step(x, u), u)

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return _cost(self.system, self.states(b, a), self.controls(b, a))

    def states(self, b: Tensor, a: Tensor) -> Tensor:
        """Where the path leads ``(B, T + 1, d)``, the start included."""
        path = [a.to(b.dtype)]
        for u in self.controls(b, a).unbind(1):
            path.append(self.system.step(path[-1], u))
        return torch.stack(path, 1)

    def initial(self, a: Tensor) -> Tensor:
        """The system's rule, rolled out."""
        x = a
        plan: list[Tensor] = []
        for _ in range(self.horizon):
            plan.append(self.system.ruled(x))
            x = self.system.step(x, self.system.limit * plan[-1].tanh())
        return torch.cat(plan, 1)

    def decode(self, b: Tensor, a: Tensor) -> Tensor:
        """Forces ``(B, T)``."""
        return self.controls(b, a)[:, :, 0]

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """Paths in the plane of the angle and its speed, and the forces."""
        paths = {name: self.states(b, a) for name, b in solutions.items()}
        return draw_plans(self.portrait, paths, {name: self.controls(b, a) for name, b in solutions.items()})


def _cost(system: System, path: Tensor, u: Tensor) -> Tensor:
    """Of paths ``(B, T + 1, d)`` made by forces ``(B, T, 1)``, without what the starts cost, ``(B,)``."""
    return system.cost(path[:, 1:].flatten(0, 1), u.flatten(0, 1)).view(u.shape[:2]).sum(1)


class Policy(nn.Module):
    """``b_t = π_k(x_t, t)``, rolled out through a system: ``(B, d) -> (B, horizon)``, the cheapest of K proposals.

    All K paths are rolled out as rows of one batch. The gradient is that of the cheapest alone, so that proposals part. With
    ``residual`` the network says what the system's rule lacks, ``b_t = rule(x_t) + π_k(x_t, t)``: it begins with paths that get
    somewhere, along which gradients neither vanish nor explode as those of a system that falls over.

    Args:
        system: what is moved.
        horizon: T, steps.
        proposals: K.
        hidden: widths of the layers, shared by the proposals.
        activation: see :class:`~amortized.networks.MLP`.
        residual: whether to add to the rule.

    Raises:
        ValueError: if there is no proposal or no step.
    """

    def __init__(
        self,
        system: System | None = None,
        horizon: int = 60,
        proposals: int = 4,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if proposals < 1 or horizon < 1:
            raise ValueError(f"Policy: proposals and horizon must be positive; got {proposals} and {horizon}")
        self.system, self.horizon, self.proposals = system if system is not None else Pendulum(), horizon, proposals
        seen = len(self.system.names) + len(self.system.angles)
        self.residual = residual
        self.mlp = MLP(seen + 1 + proposals, 1, hidden, activation)

    def forward(self, a: Tensor) -> Tensor:
        plans, costs = self._rolled(a.repeat_interleave(self.proposals, 0))
        if self.proposals == 1:
            return plans
        best = costs.view(len(a), self.proposals).nan_to_num(nan=torch.inf).argmin(1)
        return plans[best + self.proposals * torch.arange(len(a), device=a.device)]

    def _rolled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The plan of each row ``(N, T)``, rows in turn of each proposal, and what it costs ``(N,)``."""
        which = torch.eye(self.proposals, dtype=x.dtype, device=x.device).repeat(len(x) // self.proposals, 1)
        path = [x]
        plan: list[Tensor] = []
        for t in range(self.horizon):
            time = x.new_full((len(x), 1), t / self.horizon)
            raw = self.mlp(torch.cat([self.system.features(path[-1]), time, which], 1))
            if self.residual:
                raw = raw + self.system.ruled(path[-1])
            path.append(self.system.step(path[-1], self.system.limit * raw.tanh()))
            plan.append(raw)
        plans = torch.cat(plan, 1)
        with torch.no_grad():
            cost = _cost(self.system, torch.stack(path, 1), self.system.limit * plans.tanh().unsqueeze(2))
        return plans, cost


class SystemStates(ContextDataModule):
    """States ``(B, d)`` drawn uniformly from a system's range, the parts that are no angles from ``scale`` times that.

    Args:
        system: whose states.
        scale: of the range.
        **kwargs: see :class:`~amortized.contexts.ContextDataModule`.
    """

    def __init__(self, system: System | None = None, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scale <= 0:
            raise ValueError(f"SystemStates: scale must be positive; got {scale}")
        self.system, self.scale = system if system is not None else Pendulum(), scale

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angles = self.system.angles
        size = [s if i in angles else self.scale * s for i, s in enumerate(self.system.start)]
        unit = 2 * torch.rand(n, len(size), generator=generator, device=generator.device) - 1
        return torch.tensor(size, device=generator.device) * unit
