"""What a run found: ``results.json`` as a dataclass, each of its groups another."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from amortized.evaluation.budget import Budget
from amortized.evaluation.gap import Cases


@dataclass(frozen=True)
class Objective:
    """The mean objectives, in the objective's unit; ``None`` (``null``) where no row was finite."""

    network: float | None
    solver: float | None


@dataclass(frozen=True)
class Gap:
    """The amortization gap over the contexts, in the objective's unit; ``None`` where no row was finite."""

    mean: float | None
    median: float | None
    p95: float | None
    relative: float | None
    """A fraction of the solver's objective; ``None`` where that is about zero."""
    stderr: float | None
    """Of the mean."""
    noise: float | None
    """The part of ``stderr`` that is due to the draws of a random objective."""
    rounding: float | None
    """What the gap can be off by, of the precision of the evaluation."""


@dataclass(frozen=True)
class Rows:
    """What became of the rows: a count, and fractions of it as in :class:`~amortized.evaluation.metric.AmortizationGap`."""

    total: int
    converged: float
    diverged: float
    lost: float
    unbounded: float


@dataclass(frozen=True)
class Time:
    """The first contexts of the test, in one batch; all ``None`` where there was no budget.

    A row is *solved* when it lacks at most ``tolerance`` of what the cold start lacks. A median is ``None`` where half of the
    rows never got there.
    """

    network: float | None = None
    """Seconds of a forward pass."""
    solver: float | None = None
    """Seconds of the whole run of ``rival``."""
    equal_quality_ratio: float | None = None
    """When ``rival`` reached the network's mean objective, over ``network``."""
    contexts: int | None = None
    rival: str | None = None
    """The cold-started solver that was first to reach the network's mean objective."""
    not_finite: float | None = None
    """The fraction of contexts left out of the means, since a side is not finite there."""
    row_ratio_median: float | None = None
    """As ``equal_quality_ratio``, for each row's own objective."""
    row_ratio_p95: float | None = None
    rows_never_reached: float | None = None
    """The fraction of rows on which it never did."""
    warm_rival: str | None = None
    """The solver by which the prediction is judged as a warm start, the one that solves most rows from the cold start."""
    tolerance: float | None = None
    evaluations_cold: float | None = None
    """Evaluations until a row is solved, median over rows."""
    evaluations_warm: float | None = None
    evaluations_saved: float | None = None
    """The difference of the two row by row, its median."""
    rows_never_solved_cold: float | None = None
    rows_never_solved_warm: float | None = None


@dataclass(frozen=True)
class SolverUsed:
    """The solver that the gap was measured with."""

    advice: str | None
    """What to change first about the measurement: see :func:`~amortized.evaluation.advice.advice`."""
    name: str | None = None
    """Its class."""
    chosen_by: str | None = None
    """What of the problem it was chosen by, where none was named: ``program``, ``smooth and prox``, ..."""
    best_known: int | None = None
    """Rows whose reference is of an earlier run, where the best solutions are kept (``gap.best_known``)."""


@dataclass(frozen=True)
class Constraints:
    """What became of the constraints, as in :func:`~amortized.evaluation.metric.feasibility`; violations in their units.

    The means, quantiles and errors of the gap are then over contexts on which both sides are feasible.
    """

    tolerance: float
    """The violation up to which a solution counts as feasible."""
    violation_mean: float | None
    violation_p95: float | None
    violation_max: float | None
    feasible: float
    """The fraction of feasible predictions."""
    reference_feasible: float
    """The fraction of contexts with a feasible reference."""
    unsolved: float
    """The fraction without one."""
    impossible: float
    """Of all, the fraction that the solver proved to have no solution."""
    all_mean: float | None
    """The mean gap over all contexts, feasible or not: it says nothing but how the objective alone compares."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one set of contexts."""

    objective: Objective
    gap: Gap
    rows: Rows
    decomposition: dict[str, float | None] | None
    """Only where the problem declares its optimum: ``total``, ``amortization``, ``solver`` and ``approximation``, each with
    ``*_stderr``, in the objective's unit: see :func:`~amortized.evaluation.metric.decomposition`."""
    constraints: Constraints | None
    """Only where the problem has constraints."""

    @staticmethod
    def groups(statistics: dict[str, float]) -> dict[str, Any]:
        """The fields, from the statistics of :class:`~amortized.evaluation.metric.AmortizationGap`."""
        found = finite(statistics)
        rows: dict[str, Any] = {f.name: statistics[f.name] for f in dataclasses.fields(Rows)}
        terms = {k.removeprefix("decomposition/"): v for k, v in found.items() if k.startswith("decomposition/")}
        bound = {f.name: found.get(f.name.replace("violation_", "violation/")) for f in dataclasses.fields(Constraints)}
        bound |= {"tolerance": found.get("violation/tolerance"), "all_mean": found.get("all/mean")}
        return {
            "objective": Objective(network=found["network"], solver=found["reference"]),
            "gap": Gap(**{f.name: found[f.name] for f in dataclasses.fields(Gap)}),
            "rows": Rows(**rows | {"total": int(rows["total"])}),
            "decomposition": terms or None,
            "constraints": Constraints(**bound) if bound["tolerance"] is not None else None,  # type: ignore[arg-type]
        }

    @staticmethod
    def read(found: dict[str, Any]) -> dict[str, Any]:
        """The fields, from their groups in ``results.json``."""
        kinds = {"objective": Objective, "gap": Gap, "rows": Rows}
        return {name: kind(**found[name]) for name, kind in kinds.items()} | {
            "decomposition": found.get("decomposition"),
            "constraints": Constraints(**found["constraints"]) if "constraints" in found else None,
        }


@dataclass(frozen=True)
class Results(Evaluation):
    """The content of ``results.json``: a group of numbers for each field; a field that is ``None`` or empty is left out."""

    time: Time
    solver: SolverUsed
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The same on each further set of contexts, by its name in ``data.evaluations``. One named ``shifted`` stands at the top
    level too, where it was before sets had names."""
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What callbacks of the user's own measured, each a group of the name it has."""

    @classmethod
    def of(
        cls,
        statistics: dict[str, float],
        budget: Budget | None = None,
        evaluations: dict[str, dict[str, float]] | None = None,
        solver: SolverUsed | None = None,
        measurements: dict[str, dict[str, Any]] | None = None,
    ) -> Results:
        """From the statistics of the gap, those on each further set of contexts, and what else was measured."""
        return cls(
            **cls.groups(statistics),
            time=Time(**finite(budget.summary())) if budget is not None else Time(),
            solver=solver or SolverUsed(None),
            evaluations={name: Evaluation(**cls.groups(s)) for name, s in (evaluations or {}).items()},
            measurements={name: finite(values) for name, values in (measurements or {}).items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Groups by name, of plain numbers and texts."""
        found = _present(dataclasses.asdict(self))
        if "evaluations" in found:
            found["evaluations"] = {name: _present(groups) for name, groups in found["evaluations"].items()}
            found |= {name: groups for name, groups in found["evaluations"].items() if name == "shifted"}
        return found | found.pop("measurements", {})

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Results:
        """What :meth:`to_json` gave."""
        evaluations = found.get("evaluations", {})
        own = {f.name for f in dataclasses.fields(cls)} | ({"shifted"} & set(evaluations))
        return cls(
            **cls.read(found),
            time=Time(**found["time"]),
            solver=SolverUsed(**found["solver"]),
            evaluations={name: Evaluation(**cls.read(groups)) for name, groups in evaluations.items()},
            measurements={name: group for name, group in found.items() if name not in own},
        )


def _present(groups: dict[str, Any]) -> dict[str, Any]:
    return {name: group for name, group in groups.items() if group}


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values, ``None`` for a number that is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def worst_rows(worst: Cases | None) -> list[dict[str, float]]:
    """Index in the test set, objective of network and solver, and gap of the worst contexts, the worst first.

    Where there are constraints, the violation of both too.
    """
    if worst is None:
        return []
    r = worst.rows
    columns = {"index": r.index, "network": r.network, "solver": r.reference, "gap": r.gap, "converged": r.converged}
    if r.constrained:
        columns |= {"violation": r.violation, "solver_violation": r.reference_violation}  # type: ignore[dict-item]
    listed = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]
