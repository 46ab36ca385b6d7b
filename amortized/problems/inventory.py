r"""A black box: the cost of stocks along a supply chain, as a simulation finds it that counts whole pieces.

Goods pass from a factory to customers through three stages, each of which holds a stock. Every period stage j orders what its
customer demanded, and receives, a period later, what the stage above had on the shelf, ``C_j`` pieces at most; customers who find
the shop empty wait. With the base stocks ``S_j`` on the shelves at the start,

    ``L(b; a) = mean_t [ sum_j h_j (stock of stage j) + p (customers waiting) ]``,     ``S_j = round(s(b_j))``,

the mean over periods and 16 courses of demand that all contexts share, after some periods of warming up. A context has the mean
and spread of the demand, the capacities, the holding costs and the penalty; ``b`` are safety factors, for ``s(b_j)`` is close to
mean + b_j · standard deviation of the demand. Pieces are whole, so L is constant almost everywhere and its gradient zero; and
the simulation runs in NumPy, where torch sees nothing at all. :class:`Inventory` is its smooth twin: the same simulation with
``S_j = s(b_j)``, in torch. Its gradient is the exact one of a piecewise linear function (infinitesimal perturbation analysis).

Source: Glasserman & Tayur (1995), *Sensitivity analysis for base-stock levels in multiechelon production-inventory systems*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from amortized.contexts.data_module import ContextDataModule
from amortized.module import AmortizedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("shop", "depot", "works")
"""From the customers upwards."""


class Chain(NamedTuple):
    """B supply chains."""

    demand: Tensor
    """Mean and standard deviation of a period's demand ``(B, 2)``, in pieces."""
    capacity: Tensor
    """Pieces that each stage can receive in a period ``(B, 3)``, whole numbers."""
    holding: Tensor
    """Cost of a piece on each shelf for a period ``(B, 3)``."""
    penalty: Tensor
    """Cost of a waiting customer for a period ``(B, 1)``."""


class Inventory(AmortizedModule):
    """The smooth twin. Solutions ``(B, 3)``: safety factors of the stages; decoded they are base stocks, in pieces.

    Args:
        network: ``(B, 9) -> (B, 3)``.
        courses: of demand, over which the cost is averaged.
        periods: of each course.
        warm_up: periods at the start that do not count.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "cost of a period"

    def __init__(
        self, network: nn.Module, courses: int = 16, periods: int = 50, warm_up: int = 10, **kwargs: Any
    ) -> None:
        super().__init__(network, **kwargs)
        if not 0 <= warm_up < periods:
            raise ValueError(f"{type(self).__name__}: warm_up must be less than periods; got {warm_up} and {periods}")
        self.warm_up = warm_up
        noise = torch.randn(courses, periods, generator=torch.Generator().manual_seed(0))
        self.noise: Tensor
        self.register_buffer("noise", noise, persistent=False)

    def objective(self, b: Tensor, a: Chain) -> Tensor:
        return simulate(self.base_stock(b, a), self.course(a), *a[1:], warm_up=self.warm_up).mean(1)

    def base_stock(self, b: Tensor, a: Chain) -> Tensor:
        """``s(b)``, ``(B, 3)``: ``mean + b · deviation``, bent so that it stays positive."""
        mean, deviation = a.demand.split(1, 1)
        return deviation * softplus(b + mean / deviation)

    def course(self, a: Chain) -> Tensor:
        """The demand of every period, ``(B, courses, periods)``, whole numbers."""
        mean, deviation = a.demand[:, :, None, None].unbind(1)
        return (mean + deviation * self.noise).round().clip(min=0)

    def support(self) -> dict[str, constraints.Constraint]:
        """All positive; costs may be zero."""
        return {
            "demand": constraints.positive,
            "capacity": constraints.positive,
            "holding": constraints.nonnegative,
            "penalty": constraints.nonnegative,
        }

    def observe(self, a: Chain) -> Tensor:
        """``(B, 9)``: logarithms of demand and costs, and the capacities' slack in standard deviations."""
        mean, deviation = a.demand.split(1, 1)
        slack = (a.capacity - mean) / deviation
        costs = torch.cat([a.holding, a.penalty], 1)
        return torch.cat([a.demand.log() - 2, slack, (costs + 1e-3).log()], 1)

    def decode(self, b: Tensor, a: Chain) -> Tensor:
        """Base stocks ``(B, 3)``, in pieces."""
        return self.base_stock(b, a)

    def draw(self, a: Chain, solutions: dict[str, Tensor]) -> Figure:
        """The base stocks of each context beside the mean demand, and what they cost."""
        from matplotlib.figure import Figure

        n = len(a.demand)
        with torch.no_grad():
            found = {name: (self.decode(b, a).cpu(), self.objective(b, a).cpu()) for name, b in solutions.items()}
        figure = Figure(figsize=(max(1.7 * n, 3.4), 2.8), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, n, squeeze=False).flat):
            for k, (name, (stock, _)) in enumerate(found.items()):
                axes.bar([j + 0.4 * k - 0.2 for j in range(3)], stock[i].tolist(), 0.4, color=f"C{k}", label=name)
            axes.axhline(float(a.demand[i, 0]), color="0.5", linestyle=":", linewidth=1, label="mean demand")
            axes.set_title(" | ".join(f"{float(cost[i]):.4g}" for _, cost in found.values()), fontsize=8)
            axes.set_xticks(range(3), STAGES, fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
        figure.axes[0].set_ylabel("base stock (pieces)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure


class BlackBoxInventory(Inventory):
    """The black box: base stocks are whole pieces, and the simulation runs outside torch. Settings as of :class:`Inventory`."""

    differentiable = False

    def objective(self, b: Tensor, a: Chain) -> Tensor:
        chain: Any = (x.detach().cpu().numpy() for x in (self.decode(b, a), self.course(a), *a[1:]))
        return torch.from_numpy(simulate(*chain, warm_up=self.warm_up).mean(1)).to(b)

    def decode(self, b: Tensor, a: Chain) -> Tensor:
        return self.base_stock(b, a).round()


def simulate(base_stock: Any, demand: Any, capacity: Any, holding: Any, penalty: Any, *, warm_up: int) -> Any:
    """The mean cost of a period, ``(B, courses)``; of tensors, or of NumPy's arrays.

    Args:
        base_stock: ``(B, 3)``.
        demand: ``(B, courses, periods)``.
        capacity: ``(B, 3)``.
        holding: ``(B, 3)``.
        penalty: ``(B, 1)``.
        warm_up: periods at the start that do not count.
    """
    nothing = 0 * demand[:, :, 0]
    stock = [nothing + base_stock[:, j : j + 1] for j in range(3)]
    coming, ordered = [nothing] * 3, [nothing] * 3
    waiting, cost, periods = nothing, nothing, demand.shape[2]
    for t in range(periods):
        waiting = waiting + demand[:, :, t]
        stock = [here + arrived for here, arrived in zip(stock, coming, strict=True)]
        sold = _least(stock[0], waiting)
        stock[0], waiting = stock[0] - sold, waiting - sold
        for j in range(3):
            ordered[j] = ordered[j] + demand[:, :, t]
            sent = _least(ordered[j], capacity[:, j : j + 1])
            if j < 2:  # the works make what they need
                sent = _least(sent, stock[j + 1])
                stock[j + 1] = stock[j + 1] - sent
            ordered[j], coming[j] = ordered[j] - sent, sent
        if t >= warm_up:
            cost = cost + sum(holding[:, j : j + 1] * stock[j] for j in range(3)) + penalty * waiting
    return cost / (periods - warm_up)


def _least(x: Any, y: Any) -> Any:
    return x - (x - y).clip(min=0)


class InventoryContexts(ContextDataModule):
    """Supply chains without end: demand of 5 to 25 pieces a period, capacities of 1 to 3 standard deviations more.

    A shelf is the cheaper the farther it is from the shop, where a piece costs 1; a waiting customer costs 4 to 30.

    Args:
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def sample(self, n: int, generator: torch.Generator) -> Chain:
        u = torch.rand(n, 8, generator=generator, device=generator.device)
        mean = 5 * 5 ** u[:, :1]
        deviation = (0.7 + 0.8 * u[:, 1:2]) * mean.sqrt()
        capacity = (mean + (1 + 2 * u[:, 2:5]) * deviation).ceil()
        depot = 0.3 + 0.5 * u[:, 5:6]
        holding = torch.cat([torch.ones_like(depot), depot, depot * (0.3 + 0.5 * u[:, 6:7])], 1)
        return Chain(torch.cat([mean, deviation], 1), capacity, holding, 4 * 7.5 ** u[:, 7:8])
