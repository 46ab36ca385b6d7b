"""Regression to solutions, which are given in the data or made by a solver."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError, evaluate, leaves, take
from amortized.losses.objective import Loss
from amortized.solvers.base import Solver


class RegressionLoss(Loss):
    r"""``||f(a) - b*(a)||^2 / dim(b)``: squared distance to a solution, given in the data or made by a solver.

    With a solver the solutions of contexts seen before come from memory, and from ``cache`` on disk when it is given:
    each context is solved once, in this run or in any later one. So this is for finite sets of contexts, and for
    objectives without trained parameters; a cache of another objective is noticed by its values and refused.

    Args:
        field: name of the field of the context that holds the solution, shape ``(B, *)``.
        solver: makes the solutions, from ``model.initial(a)``.
        cache: directory of solutions, made if it is not there.

    Raises:
        ProblemError: if the context has no such field, or the cache belongs to another objective.
    """

    def __init__(self, field: str | None = None, solver: Solver | None = None, cache: str | None = None) -> None:
        if (field is None) == (solver is None):
            raise ValueError("RegressionLoss needs either the context's `field` with the solutions, or a `solver`")
        self.field, self.solver = field, solver
        self.cache = _SolutionCache(cache)

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        b = model.iterates(a)[-1]
        target = self._target(model, a)
        if target.shape != b.shape:
            raise ProblemError(f"solutions have shape {tuple(target.shape)}, the network predicts {tuple(b.shape)}")
        return (b - target).square().flatten(1).mean(1)

    def _target(self, model: Predictor, a: Context) -> Tensor:
        if self.field is not None:
            target = getattr(a, self.field, None)
            if target is None:
                fields = getattr(a, "_fields", ("a plain tensor",))
                raise ProblemError(
                    f"RegressionLoss: the context has no field {self.field!r}; it has {', '.join(fields)}"
                )
            return target
        assert self.solver is not None
        return self.cache.solutions(model, a, self.solver)


class _SolutionCache:
    """Solutions by a 64-bit hash of each context row, sorted: looked up for a whole batch by binary search."""

    def __init__(self, directory: str | None) -> None:
        self.directory = Path(directory) if directory else None
        self.keys = torch.empty(0, dtype=torch.int64)
        self.b: Tensor | None = None
        self.value = torch.empty(0)
        self.unchecked = False
        for part in sorted(self.directory.glob("*.pt")) if self.directory else ():
            self._add(**torch.load(part, weights_only=True))
            self.unchecked = True

    def solutions(self, model: Predictor, a: Context, solver: Solver) -> Tensor:
        device = leaves(a)[0].device
        keys = row_hashes(a)
        found, at = self._find(keys)
        if self.unchecked and found.any():
            self._check(model, take(a, found.nonzero()[:, 0].to(device)), at[found])
        if not found.all():
            missing, first = _first_of_each(keys[~found])
            part = take(a, (~found).nonzero()[first, 0].to(device))
            solution = solver.solve(model, part, model.initial(part))
            self._save({"keys": missing, "b": solution.b.cpu(), "value": solution.value.cpu()})
            _, at = self._find(keys)
        assert self.b is not None
        return self.b[at].to(device)

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self.keys):
            return torch.zeros(len(keys), dtype=torch.bool), torch.zeros(len(keys), dtype=torch.int64)
        at = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return self.keys[at] == keys, at

    def _add(self, keys: Tensor, b: Tensor, value: Tensor) -> None:
        self.keys, order = torch.cat([self.keys, keys]).sort()
        self.b = (b if self.b is None else torch.cat([self.b, b]))[order]
        self.value = torch.cat([self.value.to(value.dtype), value])[order]

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


def row_hashes(a: Context) -> Tensor:
    """A 64-bit hash of each row's bytes, shape ``(B,)`` on the CPU; equal rows hash alike on any machine."""
    total = None
    for number, leaf in enumerate(leaves(a)):
        rows = leaf.detach().flatten(1) if leaf.ndim > 1 else leaf.detach()[:, None]
        words = rows.cpu().contiguous().view(torch.uint8).to(torch.int64)
        odd = torch.randint(2**62, (words.shape[1],), generator=torch.Generator().manual_seed(number)) * 2 + 1
        mixed = ((words + 1) * odd).sum(1)
        total = mixed if total is None else total * 1_000_003 + mixed
    assert total is not None
    return total
