r"""Optimal power flow: which generators serve the loads of a network at the lowest cost, within all its limits.

A context is the load ``(P_d, Q_d)`` at each bus; a solution is what each generator feeds in, ``p + jq``, and the voltage of
each bus, ``V = v exp(jθ)``:

    ``L(b; a) = Σ_i c2_i p_i² + c1_i p_i + c0_i``, subject to
    ``V ∘ conj(Y V) = C (p + jq) − (P_d + jQ_d)``           (balance of active and reactive power at each bus),
    ``p, q, v`` between their limits,  ``|S_l| ≤ s_l``       (apparent power at either end of each limited branch).

All is in per unit, the cost in $/h. The balance is not convex, and the voltages that fit the rest follow from it only by
Newton's method: the power flow. Source: Carpentier (1962); in these coordinates Zimmerman, Murillo-Sánchez & Thomas
(2011), section 5; learned with completion by Donti, Rolnick & Kolter (2021), *DC3*, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import Predictor
from amortized.losses.objective import Loss
from amortized.module import AmortizedModule
from amortized.networks import MLP
from amortized.problems.constrained.power_flow_cases import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Loads(NamedTuple):
    """What B networks must serve at each of their N buses."""

    p: Tensor
    """Active power ``(B, N)``, per unit."""
    q: Tensor
    """Reactive power ``(B, N)``, per unit."""


class Dispatch(NamedTuple):
    """A solution in the units of engineers."""

    p: Tensor
    """Active power of each generator ``(B, G)``, MW."""
    q: Tensor
    """Reactive power of each generator ``(B, G)``, Mvar."""
    angle: Tensor
    """Of the voltage at each bus ``(B, N)``, degrees."""
    voltage: Tensor
    """Its size ``(B, N)``, per unit."""


class PowerFlow(AmortizedModule):
    """The cheapest dispatch of a network. Solutions ``(B, 2G + 2N − 1)``: ``p``, ``q``, ``θ`` but for the slack bus, ``v``.

    With ``refine: Completion`` the network says what the generators do and the voltages at their buses, and the power flow
    follows; without it, predictions are off balance.

    Args:
        network: ``Loads -> (B, 2G + 2N − 1)``, as :class:`OperatingPoint` of the same case.
        case: ``case14``, ``case30``, ``case57`` or ``case118``.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "cost [$/h]"

    def __init__(self, network: nn.Module, case: str = "case14", **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.grid = Grid(case)

    def parts(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``p``, ``q``, ``θ`` (of every bus, 0 at the slack) and ``v`` of solutions."""
        grid = self.grid
        p, q, rest, v = b.split([grid.generators, grid.generators, grid.buses - 1, grid.buses], 1)
        theta = torch.cat([rest[:, : grid.slack], torch.zeros_like(b[:, :1]), rest[:, grid.slack :]], 1)
        return p, q, theta, v

    def objective(self, b: Tensor, a: Loads) -> Tensor:
        p = b[:, : self.grid.generators]
        two, one, zero = self.grid.of(b, "cost_2", "cost_1", "cost_0")
        return ((two * p + one) * p + zero).sum(1)

    def equality(self, b: Tensor, a: Loads) -> Tensor:
        """What each bus gives to the network and serves, less what it gets: active, then reactive power ``(B, 2N)``."""
        p, q, theta, v = self.parts(b)
        g, s = self.grid.of(b, "g", "b")
        e, f = v * theta.cos(), v * theta.sin()
        real, imaginary = e @ g.mT - f @ s.mT, f @ g.mT + e @ s.mT
        active = e * real + f * imaginary + a.p.to(b.dtype) - self._at_buses(p)
        reactive = f * real - e * imaginary + a.q.to(b.dtype) - self._at_buses(q)
        return torch.cat([active, reactive], 1)

    def _at_buses(self, x: Tensor) -> Tensor:
        """What generators ``(B, G)`` feed in, by bus ``(B, N)``."""
        return x @ nn.functional.one_hot(self.grid.at, self.grid.buses).to(x.dtype)

    def inequality(self, b: Tensor, a: Loads) -> Tensor:
        """How far ``p``, ``q``, ``v`` and the power on branches are above their limits, per unit; at most 0 is within.

        Of a branch it is ``(|S|² − s²) / 2s``: smooth, ``|S| − s`` near the limit and no less beyond it.
        """
        grid = self.grid
        p, q, theta, v = self.parts(b)
        upper, lower = self.limits(b)
        x = torch.cat([p, q, v], 1)
        if not len(grid.limited):
            return torch.cat([x - upper, lower - x], 1)
        e, f = v * theta.cos(), v * theta.sin()
        squares = []
        for end, at in (("from", grid.limited_from), ("to", grid.limited_to)):
            g, s = grid.of(b, f"{end}_g", f"{end}_b")
            current = (e @ g.mT - f @ s.mT).square() + (f @ g.mT + e @ s.mT).square()
            squares.append(v[:, at].square() * current)
        (rating,) = grid.of(b, "rating")
        over = (torch.cat(squares, 1) / rating.repeat(2) - rating.repeat(2)) / 2
        return torch.cat([x - upper, lower - x, over], 1)

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The upper and the lower limits of ``p``, ``q`` and ``v``, each ``(2G + N,)``."""
        return limits(self.grid, like)

    @property
    def dependent(self) -> Tensor:
        """The unknowns that follow from the balance: ``p`` at the slack, ``q``, ``θ``, and ``v`` where nothing is fed in."""
        grid = self.grid
        G, N = grid.generators, grid.buses
        slack = (grid.at == grid.slack).nonzero()[:, 0]
        without = torch.ones(N, dtype=torch.bool, device=grid.at.device)
        without[grid.at] = False
        rest = torch.arange(G, 2 * G + N - 1, device=grid.at.device)
        return torch.cat([slack, rest, 2 * G + N - 1 + without.nonzero()[:, 0]])

    def nominal(self) -> tuple[Tensor, Loads]:
        """The case's own loads, and their optimum, as one row."""
        grid = self.grid
        return grid.optimum.unsqueeze(0), Loads(grid.load_p.unsqueeze(0), grid.load_q.unsqueeze(0))

    def initial(self, a: Loads) -> Tensor:
        """The middle of the limits of ``p``, ``q`` and ``v``, all angles 0."""
        return flat_start(self.grid, a.p).expand(len(a.p), -1).clone()

    def decode(self, b: Tensor, a: Loads) -> Dispatch:
        """MW, Mvar, degrees and per unit."""
        p, q, theta, v = self.parts(b)
        return Dispatch(p * self.grid.base, q * self.grid.base, theta.rad2deg(), v)

    def draw(self, a: Loads, solutions: dict[str, Tensor]) -> Figure:
        """Each generator's dispatch and each bus's voltage of the first contexts, between their limits."""
        from amortized.problems.constrained.power_flow_pictures import draw_dispatch

        return draw_dispatch(self, a, solutions)


def limits(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower limits of ``p``, ``q`` and ``v``, each ``(2G + N,)``."""
    upper, lower = (torch.cat(grid.of(like, f"p_{end}", f"q_{end}", f"v_{end}")) for end in ("max", "min"))
    return upper, lower


def flat_start(grid: Grid, like: Tensor) -> Tensor:
    """The middle of the limits of ``p``, ``q`` and ``v``, with all angles 0, ``(2G + 2N − 1,)``."""
    upper, lower = limits(grid, like)
    middle = (upper + lower) / 2
    fed, v = middle[: 2 * grid.generators], middle[2 * grid.generators :]
    return torch.cat([fed, v.new_zeros(grid.buses - 1), v])


class OperatingPoint(nn.Module):
    """An MLP from loads to ``p``, ``q`` and ``v`` within their limits (by a sigmoid), and angles.

    It sees each load as its deviation from the case's own, in tenths of that, buses without load left out; and starts near
    the optimum of the case's own loads.

    Args:
        case: ``case14``, ``case30``, ``case57`` or ``case118``.
        hidden: widths of the hidden layers.
        activation: see :class:`~amortized.networks.MLP`.
    """

    seen: Tensor

    def __init__(self, case: str = "case14", hidden: Sequence[int] = (128, 128), activation: str = "silu") -> None:
        super().__init__()
        self.grid = grid = Grid(case)
        seen = torch.cat([grid.load_p, grid.load_q]).nonzero()[:, 0]
        self.register_buffer("seen", seen, persistent=False)
        self.mlp = MLP(len(seen), 2 * grid.generators + 2 * grid.buses - 1, hidden, activation)
        with torch.no_grad():
            weight, bias = list(self.mlp.parameters())[-2:]
            weight.mul_(0.1)
            bias.zero_()

    def forward(self, a: Loads) -> Tensor:
        grid = self.grid
        p, q, optimum = grid.of(a.p, "load_p", "load_q", "optimum")
        nominal = torch.cat([p, q])[self.seen]
        raw = self.mlp(10 * (torch.cat([a.p, a.q], 1)[:, self.seen] / nominal - 1))
        split = [2 * grid.generators, grid.buses - 1, grid.buses]
        (fed, angle, v), (fed_there, angle_there, v_there) = raw.split(split, 1), optimum.split(split)
        upper, lower = limits(grid, raw)
        there = ((torch.cat([fed_there, v_there]) - lower) / (upper - lower)).clamp(0.02, 0.98).logit()
        within = lower + (upper - lower) * (torch.cat([fed, v], 1) + there).sigmoid()
        return torch.cat([within[:, : split[0]], angle_there + angle / 10, within[:, split[0] :]], 1)


class PowerFlowLoss(Loss):
    """The cost, a penalty on limits that are not kept, and a little for a start from which the power flow is soon found.

    ``L(b) / L_0 + weight Σ max(0, d(b) + margin) + start ‖b_0 − b‖²``, with the prediction ``b_0``, its completion b and the
    least cost of the case's own loads ``L_0``. The L1 penalty is exact: above a finite weight, the largest multiplier (the
    price of a limit), nothing is gained by breaking one.

    Args:
        weight: of a limit broken by 1 per unit, in units of ``L_0``.
        margin: by which limits are kept more strictly, per unit, so that held-out loads keep them too.
        start: of a start's distance to where the power flow ends.
    """

    def __init__(self, weight: float = 10.0, margin: float = 1e-3, start: float = 1.0) -> None:
        self.weight, self.margin, self.start = weight, margin, start

    def __call__(self, model: Predictor, a: Loads) -> Tensor:
        problem: Any = model
        first, *_, b = problem.iterates(a) if problem.refine is not None else 2 * problem.iterates(a)
        unit = problem.objective(*problem.nominal()).to(b.dtype)
        over = (problem.inequality(b, a) + self.margin).clamp(min=0).sum(1)
        apart = (first - b.detach()).square().sum(1)
        return problem.objective(b, a) / unit + self.weight * over + self.start * apart


class PowerFlowContexts(ContextDataModule):
    """Loads without end: each bus's active and reactive power uniform within ``spread`` of the case's own.

    Args:
        case: ``case14``, ``case30``, ``case57`` or ``case118``.
        spread: relative; 0.1 is ± 10 %.
        **kwargs: see :class:`~amortized.contexts.ContextDataModule`.
    """

    def __init__(self, case: str = "case14", spread: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case, self.spread = case, spread
        self.grid = Grid(case)

    def sample(self, n: int, generator: torch.Generator) -> Loads:
        nominal = torch.stack([self.grid.load_p, self.grid.load_q]).float().to(generator.device)
        change = torch.rand(n, 2, self.grid.buses, generator=generator, device=generator.device)
        p, q = (nominal * (1 + self.spread * (2 * change - 1))).unbind(1)
        return Loads(p, q)
