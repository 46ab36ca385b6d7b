"""The gauge of a polyhedron: along the ray from an interior point, no farther than the boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, ProblemError
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.linear import LinearCorrection, particular


class Gauge(LinearCorrection):
    r"""``C(b) = x + d / max(1, γ(d))``, ``d = Π (b − x)``: exact feasibility for linear constraints, in closed form.

    x is an interior point that meets the equalities, Π projects on the directions that keep them met, and
    ``γ(d) = max_i (G d)_i / (upper − G x)_i``, with the lower bounds alike, is the gauge of the polyhedron seen from x: how many
    times too far d reaches. A feasible ``b`` stays where it is; the boundary is reached in every direction.

    The interior point of a context is ``problem.interior(a)`` ``(B, *)`` where the problem has it, else ``E⁺ e``, the shortest
    point that meets the equalities. Of a row whose point is not strictly inside only the equalities are met, and its violation
    says so.

    Source: Tabas & Zhang (2022), *Computationally efficient safe reinforcement learning for power systems*, for the gauge map;
    Li, Kolouri & Mohammadi (2023), *Learning to solve optimization problems with hard linear constraints* (LOOP-LC).

    Raises:
        ProblemError: if no row of a first batch has such a point inside.
    """

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        first = self._known is None
        at, factor = self.stated(problem, a)
        y = b.flatten(1).double()
        x = problem.interior(a).flatten(1).double() if hasattr(problem, "interior") else particular(factor, at)
        d = times(factor.null, y - x)
        up, down = ((bound[:, ~factor.equal] - times(factor.a, x)) for bound in (at.upper, at.lower))
        inside = (up > 0) & (down < 0)
        if first and not inside.all(1).any():
            raise ProblemError(
                f"Gauge needs a point strictly inside the constraints of each context, and {_whose(problem)} is in none of the "
                f"{len(b)} of the first batch: write interior(a) -> (B, n), which meets the equalities and leaves room elsewhere"
            )
        move = times(factor.a, d)
        reach = torch.maximum(move / torch.where(inside, up, 1), move / torch.where(inside, down, -1))
        reach = torch.cat([torch.ones_like(y[:, :1]), reach], 1).amax(1)
        reach = torch.where(inside.all(1), reach, 1)
        return (x + d / reach.unsqueeze(1)).to(b.dtype).view_as(b)


def _whose(problem: Any) -> str:
    name = type(problem).__name__
    return f"{name}.interior(a)" if hasattr(problem, "interior") else f"the shortest point of {name}'s equalities"
