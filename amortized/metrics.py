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

    @property
    def gap(self) -> Tensor:
        """``network - reference``."""
        return self.network - self.reference


class AmortizationGap(Metric):
    """Mean, median, 95th percentile and relative gap, and what became of each row.

    One row is kept for each context, so quantiles are those of the whole set and each context counts once. ``compute``
    returns, over the rows whose gap is finite,

    * ``mean``, ``median``, ``p95`` and ``stderr`` (of the mean) of the gap;
    * ``relative``: ``sum(gap) / sum(|reference|)``;
    * ``network`` and ``reference``: the mean objectives;

    and, as fractions of all rows,

    * ``converged``: the reference solver met its tolerance;
    * ``diverged``: no finite gap (the prediction, or every solver run, was NaN or infinite);
    * ``lost``: the cold-started solver alone ended above the network (by more than rounding, 1e-6 relative).

    and ``total``, the number of rows. A negative gap is reported as it is.
    """

    full_state_update = False
    higher_is_better = False
    parts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("parts", default=[], dist_reduce_fx="cat")

    def update(self, rows: GapRows) -> None:
        """Add the rows of one batch."""
        self.parts.append(torch.stack([column.detach().double() for column in rows], 1))

    def rows(self) -> GapRows:
        """Every row measured so far on this process (on all of them inside ``compute``), in the order of the set."""
        parts = [self.parts] if isinstance(self.parts, Tensor) else self.parts
        table = torch.cat([torch.empty(0, len(GapRows._fields), dtype=torch.float64, device=self.device), *parts])
        return GapRows(*table[table[:, 0].argsort()].T)

    def compute(self) -> dict[str, Tensor]:
        """The statistics named above, each a float64 scalar; NaN where there is no finite row."""
        self.table = self.rows()
        return gap_statistics(self.table)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process without rows must still take part in the gathering: give it a part of no rows.
        self.parts = [torch.stack(list(self.rows()), 1)]
        super()._sync_dist(*args, **kwargs)


def gap_statistics(rows: GapRows) -> dict[str, Tensor]:
    """The statistics of :class:`AmortizationGap`, from its rows."""
    finite = torch.isfinite(rows.gap)
    gap = rows.gap[finite]
    n = max(len(gap), 1)
    nan = gap.new_full((), torch.nan)
    total = max(len(rows.gap), 1)
    return {
        "mean": gap.sum() / n if len(gap) else nan,
        "median": gap.quantile(0.5) if len(gap) else nan,
        "p95": gap.quantile(0.95) if len(gap) else nan,
        "stderr": gap.std() / n**0.5 if len(gap) > 1 else nan,
        "relative": gap.sum() / rows.reference[finite].abs().sum() if len(gap) else nan,
        "network": rows.network[finite].mean(),
        "reference": rows.reference[finite].mean(),
        "converged": (rows.converged > 0).sum() / total,
        "diverged": (~finite).sum() / total,
        "lost": (~(rows.cold - rows.network <= 1e-6 * rows.network.abs()) & torch.isfinite(rows.network)).sum() / total,
        "total": gap.new_tensor(len(rows.gap)),
    }
