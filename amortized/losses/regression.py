"""Regression to solutions, which are given in the data or made by a solver."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError, evaluate, feasibility_tol, leaves, row_hashes, take
from amortized.losses.objective import Loss
from amortized.solvers.base import Solver


class RegressionLoss(Loss):
    r"""``||f(a) - b*(a)||^2 / dim(b)``: squared distance to a solution, given in the data or made by a solver.

    With a solver the solutions of contexts seen before come from memory, and from ``cache`` on disk when it is given:
    each context is solved once, in this run or in any later one. So this is for finite sets of contexts, and for
    objectives without trained parameters; a cache of another objective is noticed by its values and refused.

    Only what the solver solved is a target: a context on which it did not converge, or found nothing feasible, has loss 0 and
    is not learned from; a warning says of how many. It is not solved again.

    Args:
        field: name of the field of the context that holds the solution, shape ``(B, *)``.
        solver: makes the solutions, from ``model.initial(a)``.
        cache: directory of solutions, made if it is not there.

    Raises:
        ProblemError: if the context has no such field, the cache belongs to another objective, or the solver converged on
            none of the first contexts that it was given.
    """

    uses_gradient = False

    def __init__(self, field: str | None = None, solver: Solver | None = None, cache: str | None = None) -> None:
        if (field is None) == (solver is None):
            raise ValueError("RegressionLoss needs either the context's `field` with the solutions, or a `solver`")
        self.field, self.solver = field, solver
        self.cache = _SolutionCache(cache)

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        b = model.iterates(a)[-1]
        target, known = self._target(model, a)
        if target.shape != b.shape:
            raise ProblemError(f"solutions have shape {tuple(target.shape)}, the network predicts {tuple(b.shape)}")
        off = (b - target).square().flatten(1).mean(1)
        return off if known is None else torch.where(known, off, 0)

    def _target(self, model: Predictor, a: Context) -> tuple[Tensor, Tensor | None]:
        """The solutions ``(B, *)``, and where they are solutions ``(B,)``; ``None``: everywhere."""
        if self.field is not None:
            target = getattr(a, self.field, None)
            if target is None:
                fields = getattr(a, "_fields", ("a plain tensor",))
                raise ProblemError(
                    f"RegressionLoss: the context has no field {self.field!r}; it has {', '.join(fields)}"
                )
            return target, None
        assert self.solver is not None
        return self.cache.solutions(model, a, self.solver)


class _SolutionCache:
    """Solutions by a 64-bit hash of each context row, sorted: looked up for a whole batch by binary search."""

    def __init__(self, directory: str | None) -> None:
        self.directory = Path(directory) if directory else None
        self.keys = torch.empty(0, dtype=torch.int64)
        self.b: Tensor | None = None
        self.value = torch.empty(0)
        self.solved = torch.empty(0, dtype=torch.bool)
        self.unchecked = False
        self.warned = False
        for part in sorted(self.directory.glob("*.pt")) if self.directory else ():
            self._add(**torch.load(part, weights_only=True))
            self.unchecked = True

    def solutions(self, model: Predictor, a: Context, solver: Solver) -> tuple[Tensor, Tensor]:
        """Solutions ``(B, *)``, and whether they are: 0 stands where the solver found none ``(B,)``."""
        device = leaves(a)[0].device
        keys = row_hashes(a)
        found, at = self._find(keys)
        check = found & self.solved[at] if len(self.solved) else found
        if self.unchecked and check.any():
            self._check(model, take(a, check.nonzero()[:, 0].to(device)), at[check])
        if not found.all():
            missing, first = _first_of_each(keys[~found])
            part = take(a, (~found).nonzero()[first, 0].to(device))
            solution = solver.solve(model, part, model.initial(part))
            solved = (solution.converged & (solution.violation <= feasibility_tol(model))).cpu()
            if not solved.all():
                self._tell(solved, solver)
            b = torch.where(solved.view(-1, *[1] * (solution.b.ndim - 1)), solution.b.cpu(), 0)
            self._save({"keys": missing, "b": b, "value": solution.value.cpu(), "solved": solved})
            _, at = self._find(keys)
        assert self.b is not None
        return self.b[at].to(device), self.solved[at].to(device)

    def _tell(self, solved: Tensor, solver: Solver) -> None:
        """Say once that some contexts are left out; what is learned from none is a mistake."""
        name = type(solver).__name__
        mend = "give it more steps or a larger tol, or drop contexts that have no solution"
        if not len(self.keys) and not solved.any():
            raise ProblemError(
                f"RegressionLoss: {name} converged on none of {len(solved)} contexts, so there is no target: {mend}"
            )
        if not self.warned:
            self.warned = True
            left = int((~solved).sum())
            warnings.warn(
                f"RegressionLoss leaves out {left} of {len(solved)} contexts, on which {name} did not converge or found nothing "
                f"feasible, and others like them: {mend}",
                stacklevel=2,
            )

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self.keys):
            return torch.zeros(len(keys), dtype=torch.bool), torch.zeros(len(keys), dtype=torch.int64)
        at = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return self.keys[at] == keys, at

    def _add(self, keys: Tensor, b: Tensor, value: Tensor, solved: Tensor | None = None) -> None:
        solved = torch.ones_like(keys, dtype=torch.bool) if solved is None else solved  # of an older cache
        self.keys, order = torch.cat([self.keys, keys]).sort()
        self.b = (b if self.b is None else torch.cat([self.b, b]))[order]
        self.value = torch.cat([self.value.to(value.dtype), value])[order]
        self.solved = torch.cat([self.solved, solved])[order]

    def _save(self, part: dict[str, Tensor]) -> None:
        self._add(**part)
        if self.directory:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(part["keys"].numpy().tobytes()).hexdigest()[:16]
            unfinished = self.directory / f"{name}.tmp{os.getpid()}"
            torch.save(part, unfinished)
            unfinished.replace(self.directory / f"{name}.pt")

    def _check(self, model: Predictor, a: Context, at: Tensor) -> None:
        """The first solutions taken from disk must still have the objective value they were stored with."""
        assert self.b is not None
        device = leaves(a)[0].device
        then, now = self.value[at], evaluate(model, self.b[at].to(device), a).cpu()
        if not torch.allclose(then, now, rtol=1e-3, atol=1e-5):
            raise ProblemError(
                f"the solutions cached in {self.directory} are of another objective (a value there is {float(then[0]):.6g}, "
                f"now {float(now[0]):.6g}): delete that directory or name another with the loss's `cache`"
            )
        self.unchecked = False


def _first_of_each(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, sorted, and where each stands first."""
    distinct, inverse = keys.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
    return distinct, first
