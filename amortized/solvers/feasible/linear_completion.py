"""Completion of linear equalities: some unknowns are predicted, the others solved for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.linear import Factor, LinearCorrection


class LinearCompletion(LinearCorrection):
    r"""``C(b) = (b_F, E_D⁻¹ (e − E_F b_F))``: the free unknowns of a prediction as they are, the dependent ones from ``E b = e``.

    Every equality is met, inequalities are not looked at: follow it by :class:`~amortized.solvers.Seek` in a
    :class:`~amortized.solvers.Sequence`, or train with a penalty, as the source does. E is factored once.

    Source: Donti, Rolnick & Kolter (2021), *DC3: a learning method for optimization with hard constraints*, section 3.1.

    Args:
        dependent: which unknowns are solved for, as many as there are equalities; None chooses them so that ``E_D`` is well
            conditioned, by Gaussian elimination with complete pivoting.

    Raises:
        ValueError: if the number of dependent unknowns is not that of the equalities, or their columns are dependent.
    """

    def __init__(self, dependent: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dependent = None if dependent is None else tuple(dependent)
        self._completed: tuple[Factor, Completed] | None = None

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        at, factor = self.stated(problem, a)
        if self._completed is None or self._completed[0] is not factor:
            self._completed = (factor, self._complete(at.A.double()[..., factor.equal, :]))
        own = self._completed[1]
        x = b.flatten(1).double()
        free = x.index_select(1, own.free)
        solved = times(own.inverse, at.upper[:, factor.equal] - times(own.rest, free))
        return x.index_copy(1, own.free, free).index_copy(1, own.dependent, solved).to(b.dtype).view_as(b)

    def _complete(self, e: Tensor) -> Completed:
        p, n = e.shape[-2:]
        dependent = pivots(e if e.ndim == 2 else e[0]) if self.dependent is None else torch.tensor(self.dependent)
        if len(dependent) != p:
            raise ValueError(
                f"LinearCompletion solves for as many unknowns as there are equalities, {p}; got {len(dependent)}"
            )
        dependent = dependent.to(e.device)
        free = torch.ones(n, dtype=torch.bool, device=e.device).index_fill(0, dependent, False).nonzero()[:, 0]
        inverse, info = torch.linalg.inv_ex(e.index_select(-1, dependent))
        if bool((info != 0).any()):
            raise ValueError(f"LinearCompletion: the equalities do not determine the unknowns {dependent.tolist()}")
        return Completed(dependent, free, inverse, e.index_select(-1, free))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_completed": None}


class Completed(NamedTuple):
    """Equalities, solved for the dependent unknowns."""

    dependent: Tensor
    free: Tensor
    inverse: Tensor
    """``E_D⁻¹``."""
    rest: Tensor
    """``E_F``."""


def pivots(e: Tensor) -> Tensor:
    """Columns of a matrix ``(p, n)`` that are far from dependent ``(p,)``: where complete pivoting eliminates."""
    e, chosen = e.clone(), []
    for _ in range(len(e)):
        row, column = divmod(int(e.abs().argmax()), e.shape[1])
        chosen.append(column)
        e = e - torch.outer(e[:, column] / e[row, column], e[row])
        e[row], e[:, column] = 0, 0
    return torch.tensor(sorted(chosen))
