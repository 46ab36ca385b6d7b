"""What a run found: the groups of ``results.json``."""

from __future__ import annotations

import math
from typing import Any

from amortized.evaluation.budget import Budget
from amortized.evaluation.gap import Cases

NOT_MEASURED: dict[str, Any] = dict.fromkeys(
    (
        *("network", "solver", "equal_quality_ratio", "contexts", "rival"),
        *("not_finite", "row_ratio_median", "row_ratio_p95", "rows_never_reached"),
        *("warm_rival", "tolerance", "evaluations_cold", "evaluations_warm", "evaluations_saved"),
        *("rows_never_solved_cold", "rows_never_solved_warm"),
    )
)
"""``time`` in ``results.json`` where there was no budget."""


def results(
    gap: dict[str, float], budget: Budget | None, shifted: dict[str, float] | None = None, advice: str | None = None
) -> dict[str, Any]:
    """The content of ``results.json``: groups of numbers, each of which has all of its keys.

    ``objective``: ``network`` and ``solver``, the mean objectives, in the objective's unit.

    ``gap``: ``mean``, ``median``, ``p95`` and ``stderr`` (of the mean) in the objective's unit; ``relative``, a fraction,
    ``null`` where the solver's objective is about zero; ``noise``, the part of ``stderr`` that is due to the draws of a random
    objective; ``rounding``, what the gap can be off by, of the precision of the evaluation.

    ``rows``: ``total``, a count; ``converged``, ``diverged``, ``lost`` and ``unbounded``, fractions of it, as in
    :class:`~amortized.evaluation.metric.AmortizationGap`.

    ``time``, all of it ``null`` where it was not measured, on the first contexts of the test in one batch:

    * ``contexts``: how many; ``not_finite``: the fraction of them left out of the means, since a side is not finite there;
    * ``network``: seconds of a forward pass; ``solver``: of the whole run of ``rival``, the cold-started solver that was
      first to reach the network's mean objective;
    * ``equal_quality_ratio``: when it did, over ``network``; ``row_ratio_median`` and ``row_ratio_p95``: the same for each
      row's own objective; ``rows_never_reached``: the fraction of rows on which it never did;
    * ``warm_rival``: the solver by which the prediction is judged as a warm start, the one that solves most rows from the
      cold start; a row is solved when it lacks at most ``tolerance`` of what the cold start lacks;
    * ``evaluations_cold`` and ``evaluations_warm``: that it takes, median over rows; ``evaluations_saved``: their
      difference row by row, its median; ``rows_never_solved_cold`` and ``rows_never_solved_warm``: fractions of rows.

    ``decomposition``, only where the problem declares its optimum: ``total``, ``amortization``, ``solver`` and
    ``approximation``, each with ``*_stderr``, in the objective's unit: see :func:`~amortized.evaluation.metric.decomposition`.

    ``shifted``, only where the data have shifted contexts: ``objective``, ``gap``, ``rows`` (and ``decomposition``) of those.

    ``solver``: ``advice``, what to change first about the measurement, in one line, or ``null``: see
    :func:`~amortized.evaluation.advice.advice`.

    What is not finite is ``null``: a mean without a finite row; a median that is infinite, as half of the rows never got there.
    """
    timed = NOT_MEASURED if budget is None else budget.summary()
    found: dict[str, Any] = {**_measured(gap), "time": _finite(timed), "solver": {"advice": advice}}
    return found | ({"shifted": _measured(shifted)} if shifted else {})


def _measured(gap: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The groups of ``results.json`` that one set of contexts has."""
    groups = {
        "objective": {"network": gap["network"], "solver": gap["reference"]},
        "gap": {name: gap[name] for name in ("mean", "median", "p95", "relative", "stderr", "noise", "rounding")},
        "rows": {
            "total": int(gap["total"]),
            **{name: gap[name] for name in ("converged", "diverged", "lost", "unbounded")},
        },
        "decomposition": {
            k.removeprefix("decomposition/"): v for k, v in gap.items() if k.startswith("decomposition/")
        },
    }
    return {name: _finite(group) for name, group in groups.items() if group}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def worst_rows(worst: Cases | None) -> list[dict[str, float]]:
    """Index in the test set, objective of network and solver, and gap of the worst contexts, the worst first."""
    if worst is None:
        return []
    r = worst.rows
    columns = {"index": r.index, "network": r.network, "solver": r.reference, "gap": r.gap, "converged": r.converged}
    listed = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]
