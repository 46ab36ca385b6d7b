r"""The amortization gap ``L(f(a); a) - L(b*(a); a)`` over a set of contexts, exact on any number of processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class GapRows(NamedTuple):
    """What was measured on each context, all of shape ``(B,)``; the columns of :class:`AmortizationGap`."""

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    """The context's place in the whole set; it orders the rows, whatever process measured them."""
    network: Tensor
    """``L`` of the prediction."""
    reference: Tensor
    """``L`` of the better of the solver's cold and warm solutions."""
    cold: Tensor
    """``L`` of the solver started cold."""
    converged: Tensor
    """1 where the solver behind ``reference`` met its tolerance."""
    evaluations: Tensor
    """Evaluations of the objective that the cold start took."""
    again: Tensor | None = None
    """The gap once more, both sides on a second set of fresh draws; the gap itself where the objective is not random."""
    family: Tensor | None = None
    """``L`` of the best solution there is, ``min_b L(b; a)``, as far as known: see :func:`decomposition`."""
    optimum: Tensor | None = None
    """``L*``, the true minimum, where the problem declares it."""
    rounding: Tensor | None = None
    """What the gap can be off by, of the precision in which the two values were evaluated."""
    violation: Tensor | None = None
    """Of the prediction, in the constraints' units; this and what follows, where the problem has constraints."""
    reference_violation: Tensor | None = None
    cold_violation: Tensor | None = None
    tolerance: Tensor | None = None
    """The violation up to which a solution counts as feasible."""
    impossible: Tensor | None = None
    """1 where the solver proved that the row has no solution."""
    stored: Tensor | None = None
    """1 where ``reference`` is of an earlier run, where those are kept (``gap.best_known``)."""

    @property
    def gap(self) -> Tensor:
        """``network - reference``."""
        return self.network - self.reference

    @property
    def constrained(self) -> bool:
        """Whether the rows are of a problem with constraints."""
        return self.tolerance is not None and not bool(self.tolerance.isnan().all())

    def within(self, violation: Tensor | None) -> Tensor:
        """Where a violation is within the tolerance ``(B,)``; everywhere without constraints."""
        if violation is None or self.tolerance is None:
            return torch.ones_like(self.network, dtype=torch.bool)
        return (violation <= self.tolerance) | self.tolerance.isnan()

    @property
    def feasible(self) -> Tensor:
        """Where the prediction is feasible ``(B,)``."""
        return self.within(self.violation)

    @property
    def solved(self) -> Tensor:
        """Where the reference is feasible ``(B,)``."""
        return self.within(self.reference_violation)

    @property
    def comparable(self) -> Tensor:
        """Where the gap means something ``(B,)``: it is finite, and both sides are feasible."""
        return self.gap.isfinite() & self.feasible & self.solved


class AmortizationGap(Metric):
    """Mean, median, 95th percentile and relative gap, and what became of each row.

    One row is kept for each context, so quantiles are those of the whole set and each context counts once. ``compute``
    returns, over the rows whose gap is finite (with constraints: and both of whose sides are feasible),

    * ``mean``, ``median``, ``p95`` and ``stderr`` (of the mean) of the gap;
    * ``noise``: of that mean, the standard error that comes of evaluating a random objective on finitely many draws (rows
      must draw independently of each other), whatever solutions the search found. 0 where the objective is not random.
      ``stderr`` contains it;
    * ``relative``: ``sum(gap) / sum(|reference|)``; NaN where the reference is about zero, a millionth of the gap or less;
    * ``rounding``: the mean of what gaps can be off by, of the precision in which the objectives were evaluated;
    * ``network`` and ``reference``: the mean objectives;

    and, as fractions of all rows,

    * ``converged``: the reference solver met its tolerance;
    * ``diverged``: no finite gap (the prediction, or every solver run, was NaN or infinite);
    * ``unbounded``: the solver ended, without convergence, at minus infinity or below -1e12 times the prediction's value (or 1):
      the objective has no minimum there, or it is far from anything of use;
    * ``lost``: the cold-started solver alone ended above the network (by more than rounding, 1e-6 relative); with constraints
      the prediction is feasible there, and the solver is above it or is not.

    and ``total``, the number of rows. A negative gap is reported as it is. Where the rows know the true minimum, the terms of
    :func:`decomposition` follow, as ``decomposition/*``. Where the problem has constraints, :func:`feasibility` follows;
    where solutions of earlier runs were candidates, ``stored``, the number of rows whose reference is one of them.
    """

    full_state_update = False
    higher_is_better = False
    parts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("parts", default=[], dist_reduce_fx="cat")
        self.reset()

    def update(self, rows: GapRows) -> None:
        """Add the rows of one batch."""
        unknown = torch.full_like(rows.network, torch.nan)
        columns = [unknown if column is None else column for column in rows]
        self.parts.append(torch.stack([column.detach().double() for column in columns], 1))

    def rows(self) -> GapRows:
        """Every row measured so far on this process (on all of them inside ``compute``), in the order of the set."""
        table = self.parts if isinstance(self.parts, Tensor) else torch.cat(self.parts)
        return GapRows(*table[table[:, 0].argsort()].T)

    def compute(self) -> dict[str, Tensor]:
        """The statistics named above, each a float64 scalar; NaN where there is no finite row."""
        self.table = self.rows()
        return gap_statistics(self.table)

    def reset(self) -> None:
        """Start anew, with a part of no rows: a process without rows must still take part in the gathering."""
        super().reset()
        self.parts.append(torch.empty(0, len(GapRows._fields), dtype=torch.float64, device=self.device))


def gap_statistics(rows: GapRows) -> dict[str, Tensor]:
    """The statistics of :class:`AmortizationGap`, from its rows."""
    finite = rows.comparable
    gap = rows.gap[finite]
    n = max(len(gap), 1)
    nan = gap.new_full((), torch.nan)
    total = max(len(rows.gap), 1)
    lost = ~(rows.cold - rows.network <= 1e-6 * rows.network.abs()) | ~rows.within(rows.cold_violation)
    low = rows.reference < -1e12 * rows.network.abs().clamp(min=1)
    return {
        "mean": gap.sum() / n if len(gap) else nan,
        "median": gap.quantile(0.5) if len(gap) else nan,
        "p95": gap.quantile(0.95) if len(gap) else nan,
        "stderr": gap.std() / n**0.5 if len(gap) > 1 else nan,
        "noise": ((gap - rows.again[finite]).square().sum() / 2).sqrt() / n
        if rows.again is not None and len(gap)
        else nan,
        "relative": _relative(gap.sum(), rows.reference[finite].abs().sum()) if len(gap) else nan,
        "rounding": rows.rounding[finite].mean() if rows.rounding is not None and len(gap) else nan,
        "network": rows.network[finite].mean(),
        "reference": rows.reference[finite].mean(),
        "converged": (rows.converged > 0).sum() / total,
        "diverged": (~rows.gap.isfinite()).sum() / total,
        "unbounded": (low & ~(rows.converged > 0)).sum() / total,
        "lost": (lost & rows.network.isfinite() & rows.feasible).sum() / total,
        "total": gap.new_tensor(len(rows.gap)),
        **{f"decomposition/{name}": value for name, value in decomposition(rows).items()},
        **feasibility(rows),
        **({"stored": rows.stored.nansum()} if rows.stored is not None and rows.stored.isfinite().any() else {}),
    }


def feasibility(rows: GapRows) -> dict[str, Tensor]:
    """What became of the constraints; nothing where there are none.

    * ``violation/mean``, ``violation/p95``, ``violation/max`` of the predictions, in the constraints' units, over those where
      it is finite; ``violation/tolerance``, up to which a row counts as feasible;
    * ``feasible`` and ``reference_feasible``: of all rows, the fractions on which the prediction and the reference are;
    * ``unsolved``: the fraction without a feasible reference, whose gaps mean nothing, and of them ``impossible``, again of all
      rows: the solver proved that they have no solution;
    * ``all/mean``: the mean gap of all rows where it is finite, feasible or not: what it is without its constraints.
    """
    if not rows.constrained or rows.violation is None or rows.tolerance is None or rows.impossible is None:
        return {}
    off, gap, total = rows.violation[rows.violation.isfinite()], rows.gap[rows.gap.isfinite()], len(rows.gap)
    nan = off.new_full((), torch.nan)
    return {
        "violation/mean": off.mean(),
        "violation/p95": off.quantile(0.95) if len(off) else nan,
        "violation/max": off.amax() if len(off) else nan,
        "violation/tolerance": rows.tolerance.nan_to_num(nan=-torch.inf).amax(),
        "feasible": rows.feasible.sum() / total,
        "reference_feasible": rows.solved.sum() / total,
        "unsolved": (~rows.solved).sum() / total,
        "impossible": (~rows.solved & (rows.impossible > 0)).sum() / total,
        "all/mean": gap.mean(),
    }


def _relative(gap: Tensor, reference: Tensor) -> Tensor:
    return gap / reference if reference > 1e-6 * gap.abs() else gap.new_full((), torch.nan)


def decomposition(rows: GapRows) -> dict[str, Tensor]:
    """What the predictions lose against the true minimum ``L*``, and to what; nothing where no row knows ``L*``.

        ``L(f(a)) - L*  =  [L(f(a)) - L(b*)]  +  [L(b*) - min_b L]  +  [min_b L - L*]``
        ``total         =   amortization      +   solver            +   approximation``

    * ``amortization``: against the reference solver's solution ``b*``: the gap;
    * ``solver``: what that solver left on the table; ``min_b L``, the best value that any ``b`` has, is what the problem
      declares as ``family_optimum``, or else what the same solver finds when it is run much longer from ``b*`` (then this
      term is a lower bound, and what the long run missed counts as approximation);
    * ``approximation``: what the best ``b`` lacks, because the family of solutions (mean-field Gaussians, splines of ten
      knots) does not hold the true one. 0 where the problem's ``optimum`` is the minimum over ``b`` itself.

    Each is the mean over the comparable rows where all four values are finite, so they add up exactly, with the standard error of
    that mean over the rows as ``*_stderr``. No term is cut off at 0: it can be negative within
    rounding, and for a random objective within its noise. The split is that of Cremer, Li & Duvenaud (2018), with the
    solver's own error set apart.
    """
    if rows.family is None or rows.optimum is None:
        return {}
    terms = {
        "total": rows.network - rows.optimum,
        "amortization": rows.gap,
        "solver": rows.reference - rows.family,
        "approximation": rows.family - rows.optimum,
    }
    finite = torch.stack([rows.comparable, *(term.isfinite() for term in terms.values())]).all(0)
    n = int(finite.sum())
    if not n:
        return {}
    means = {name: term[finite].mean() for name, term in terms.items()}
    errors = {
        f"{name}_stderr": term[finite].std() / n**0.5 if n > 1 else means["total"].new_full((), torch.nan)
        for name, term in terms.items()
    }
    return means | errors
