"""Regression to solutions: those of a solution set, those that are a field of the context, or a solver's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError, Solved, feasibility_tol
from amortized.losses.distances import Distance, Euclidean
from amortized.losses.objective import Loss
from amortized.solvers.base import Solver


class Targets(NamedTuple):
    """What predictions should be."""

    b: Tensor
    """Solutions ``(B, *)``, or k of each context ``(B, k, *)``."""
    weight: Tensor | None = None
    """``(B,)``; ``None``: 1."""


class RegressionLoss(Loss):
    r"""``w d(f(a), b*(a))``: the distance of the prediction to a known solution.

    Solutions come from one of three places, the first by default:

    * the data's ``solutions``, a folder of solved contexts (``amortized solve``): each was solved once, before;
    * a ``field`` of the context, where the data have them;
    * a ``solver``, from ``model.initial(a)``, in every training step: for contexts drawn without end, where none comes twice
      and a set would be read once. Nothing is kept.

    Where there are several solutions of a context, ``(B, k, *)``, the nearest one counts; NaN stands for those that are not
    there. With one of several as its target, and no rule that says which, regression learns their mean, which solves nothing.

    What the solver did not solve is no target: such a row has the weight ``unsolved``, 0 unless it is set.

    Args:
        field: name of the field of the context that holds the solution.
        solver: makes the solutions.
        distance: d; ``None`` is :class:`~amortized.losses.distances.Euclidean`, the mean squared difference.
        unsolved: weight of a row whose solver did not converge, or found nothing feasible, in [0, 1]: its target is the best
            that was found.
        cache: is no more; what to do in its place is said.

    Raises:
        ProblemError: if there are no solutions, or they have another shape than predictions.
    """

    uses_gradient = False

    def __init__(
        self,
        field: str | None = None,
        solver: Solver | None = None,
        distance: Distance | None = None,
        unsolved: float = 0.0,
        cache: str | None = None,
    ) -> None:
        if cache is not None:
            raise ValueError(
                "RegressionLoss keeps no cache: solve contexts once by `amortized solve -c RECIPE --ckpt_path untrained "
                f"--contexts N --out {cache}` and train on them by --data.solutions {cache}, with neither solver nor cache here"
            )
        if field is not None and solver is not None:
            raise ValueError("RegressionLoss takes the solutions of a `field` or of a `solver`, not both")
        if not 0 <= unsolved <= 1:
            raise ValueError(f"RegressionLoss: unsolved is a weight in [0, 1]; got {unsolved}")
        self.field, self.solver, self.unsolved = field, solver, unsolved
        self.distance = distance if distance is not None else Euclidean()
        self._learns = False

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        if self.field is not None:
            return self._off(model, a, Targets(self._held(a, self.field)))
        if self.solver is None:
            raise ProblemError(
                "RegressionLoss has no solutions to learn from: name the folder of a set by --data.solutions (`amortized solve "
                "-c RECIPE --ckpt_path untrained --contexts N --out FOLDER` makes one), the context's `field`, or a `solver`"
            )
        found = self.solver.solve(model, a, model.initial(a))
        solved = found.converged & (found.violation <= feasibility_tol(model))
        self._learns = self._learns or bool(solved.any())
        if not self._learns:
            raise ProblemError(
                f"RegressionLoss: {type(self.solver).__name__} converged on none of {len(solved)} contexts, so there is no "
                "target: give it more steps or a larger tol"
            )
        return self._off(model, a, self._weighted(found.b, solved & found.value.isfinite(), found.value))

    def on_solved(self, model: Predictor, a: Solved) -> Tensor:
        if self.field is not None or self.solver is not None:
            return self(model, a.context)
        return self._off(model, a.context, self._weighted(a.b, a.solved, a.objective))

    def _weighted(self, b: Tensor, solved: Tensor, value: Tensor) -> Targets:
        """A target that is not finite has weight 0, and must not reach a gradient."""
        weight = torch.where(solved, 1.0, torch.where(value.isfinite(), self.unsolved, 0.0)).to(value.dtype)
        return Targets(torch.where((weight > 0).view(-1, *[1] * (b.ndim - 1)), b, 0), weight)

    def _held(self, a: Context, field: str) -> Tensor:
        target: Tensor | None = getattr(a, field, None)
        if target is None:
            fields = getattr(a, "_fields", ("a plain tensor",))
            raise ProblemError(f"RegressionLoss: the context has no field {field!r}; it has {', '.join(fields)}")
        return target

    def _off(self, model: Predictor, a: Context, target: Targets) -> Tensor:
        b = model.iterates(a)[-1]
        b_star = target.b.to(b.dtype)
        several = b_star.ndim == b.ndim + 1
        if b_star.shape[:1] + b_star.shape[1 + several :] != b.shape:
            raise ProblemError(f"solutions have shape {tuple(b_star.shape)}, the network predicts {tuple(b.shape)}")
        off = self._nearest(b, b_star) if several else self.distance(b, b_star)
        return off if target.weight is None else target.weight.to(off.dtype) * off

    def _nearest(self, b: Tensor, b_star: Tensor) -> Tensor:
        """The distance to the nearest of k solutions ``(B, k, *)``."""
        B, k = b_star.shape[:2]
        there = b_star.isfinite().flatten(2).all(2)
        each = b.unsqueeze(1).expand_as(b_star).flatten(0, 1)
        known = torch.where(there.view(B, k, *[1] * (b.ndim - 1)), b_star, 0).flatten(0, 1)
        return torch.where(there, self.distance(each, known).view(B, k), torch.inf).amin(1)
