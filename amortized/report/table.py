"""Results for a person to read: lines of a table, and the cards of a page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from amortized.evaluation.results import Evaluation, Results


def lines(found: Results, objective: str) -> list[tuple[str, str]]:
    """Results for a person to read: labels and values."""
    o, g, r, t = found.objective, found.gap, found.rows, found.time
    unknown = "not finite" if found.constraints is None else "no row to compare"
    rows = [
        (f"{objective}, network", _number(o.network, unknown)),
        (f"{objective}, solver", _number(o.solver, unknown)),
        ("amortization gap, mean ± standard error", _mean(found)),
        ("                  median", _number(g.median, unknown)),
        ("                  95th percentile", _number(g.p95, unknown)),
        *([("                  relative", _relative(g.relative))] if g.relative is not None else []),
        ("rows converged", f"{r.converged:.1%}"),
        ("rows diverged", f"{r.diverged:.1%}"),
        ("rows where the cold solver lost to the network", f"{r.lost:.1%}"),
    ]
    rows += _constraints(found)
    if g.noise:
        rows.insert(3, ("                  of that error, noise of the draws", _number(g.noise)))
    if d := found.decomposition:
        rows += [
            (label, f"{_number(d[term])} ± {_number(d[f'{term}_stderr'])}")
            for label, term in (
                ("above the true minimum, in all", "total"),
                ("    = amortization", "amortization"),
                ("    + the solver's own error", "solver"),
                ("    + approximation, of the family of solutions", "approximation"),
            )
        ]
    for name, e in found.evaluations.items():
        rows += [
            (f"on {e.rows.total} {name} contexts: {objective}, network", _number(e.objective.network)),
            ("    amortization gap, mean ± standard error", _mean(e)),
            ("    rows converged, diverged, lost", f"{e.rows.converged:.1%} {e.rows.diverged:.1%} {e.rows.lost:.1%}"),
            *((f"    {label}", value) for label, value in _constraints(e)),
        ]
    if found.solver.chosen_by not in (None, "objective"):
        rows.append((f"solver, chosen by the problem's {found.solver.chosen_by}", f"{found.solver.name}"))
    if found.solver.best_known is not None:
        rows.append(("rows with a better solution from an earlier run", f"{found.solver.best_known}"))
    if t.network is not None and t.solver is not None:
        reached, space = t.equal_quality_ratio, " " * 4
        median, p95 = _ratio(t.row_ratio_median), _ratio(t.row_ratio_p95)
        cold, warm = _count(t.evaluations_cold), _count(t.evaluations_warm)
        rows += [
            (f"time for {t.contexts} contexts, network", f"{1e3 * t.network:.3g} ms"),
            (f"{space}{t.rival}, to its end", f"{1e3 * t.solver:.3g} ms"),
            (
                f"{space}{t.rival}, to the network's quality",
                f"{reached:.3g}x the network's"
                if reached
                else "no row to compare"
                if t.not_finite == 1
                else "never reached",
            ),
            *(
                [(f"{space}  of the rows feasible on all sides, which are", f"{1 - t.not_finite:.1%}")]
                if found.constraints and t.not_finite
                else []
            ),
            (
                f"{space}  each row's: median, 95 %, share never",
                f"{median}, {p95}, {t.rows_never_reached:.1%}",
            ),
            (f"evaluations to {t.tolerance:g} of the best, {t.warm_rival}: cold, warm", f"{cold}, {warm}"),
            (
                f"{space}saved by the warm start; unsolved cold, warm",
                f"{_count(t.evaluations_saved)}; {t.rows_never_solved_cold:.1%}, {t.rows_never_solved_warm:.1%}",
            ),
        ]
    return rows


def _mean(found: Evaluation) -> str:
    if found.constraints is not None and found.gap.mean is None:
        return "none: no row is feasible on both sides"
    return f"{_number(found.gap.mean)} ± {_number(found.gap.stderr)}"


def _constraints(found: Evaluation) -> list[tuple[str, str]]:
    """What to know of the constraints, where there are some."""
    c = found.constraints
    if c is None:
        return []
    off = ", ".join(
        "not finite" if x is None else f"{x:.2g}" for x in (c.violation_mean, c.violation_p95, c.violation_max)
    )
    rows = [
        (f"rows feasible within {c.tolerance:g}: network, solver", f"{c.feasible:.1%}, {c.reference_feasible:.1%}"),
        ("violation of the network: mean, 95 %, largest", off),
    ]
    if c.unsolved:
        proved = f" ({c.impossible:.1%} proved to have none)" if c.impossible else ""
        rows.append(("rows without a feasible solution, left out", f"{c.unsolved:.1%}{proved}"))
    if c.feasible < 1:
        rows.append(("gap of all rows, feasible or not: no measure", _number(c.all_mean)))
    return rows


def table(found: Results, name: str, objective: str, more: Sequence[tuple[str, str]] = (), width: int = 80) -> str:
    """:func:`lines`, and ``more`` of them, under a title, for a terminal of so many columns; a label too long loses its end."""
    heading, rows = title(found, name), [*lines(found, objective), *more]
    width = min(width, max(len(heading), *(len(label) + max(2 + len(value), 20) for label, value in rows)))
    text = [f"{_cut(label, width - len(value) - 2):<{width - len(value)}}{value}" for label, value in rows]
    rule = "─" * width
    note = textwrap.wrap(f"note: {found.solver.advice}", width) if found.solver.advice else []
    return "\n".join([_cut(heading, width), rule, *text, rule, *note])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def title(found: Results, name: str) -> str:
    """What the table is of, in one line."""
    return f"{name}: network against solver on {found.rows.total} held-out contexts"


def cards(found: Results, objective: str) -> list[tuple[str, str, str]]:
    """The headline figures: what, value, and what else to know."""
    o, g, r, t = found.objective, found.gap, found.rows, found.time
    relative = f"{_relative(g.relative)} of the solver's {objective}; " if g.relative is not None else ""
    shown = [
        (
            "Amortization gap, mean",
            _number(g.mean) if g.mean is not None or not found.constraints else "none",
            f"± {_number(g.stderr)}; median {_number(g.median)}",
        ),
        ("Mean objective, network", _number(o.network), f"{objective}; solver {_number(o.solver)}"),
        (
            "Rows converged",
            f"{r.converged:.1%}",
            f"of {r.total}; {r.diverged:.1%} diverged, {r.lost:.1%} lost to the network",
        ),
    ]
    shown[0] = (*shown[0][:2], relative + shown[0][2])
    if c := found.constraints:
        off = "not finite" if c.violation_max is None else f"{c.violation_max:.2g}"
        told = f"of the predictions, within {c.tolerance:g}; largest violation {off}; solver {c.reference_feasible:.1%}"
        shown.insert(2, ("Rows feasible", f"{c.feasible:.1%}", told))
    if m := found.measurements.get("certificate"):
        bound = _number(m["median"])
        told = f"of {m['contexts']} test contexts, of {1 - m['alpha']:.0%} promised; median bound {bound} ({m['kind']})"
        shown.append(("Certificate holds", f"{m['coverage']:.1%}", told))
    if t.network is not None:
        reached = t.equal_quality_ratio
        shown += [
            (
                "Solver, to equal quality",
                f"{reached:.3g}x" if reached else "never",
                f"the network's time ({t.rival}); never on {t.rows_never_reached:.1%} of rows",
            ),
            (
                "Warm start saves",
                _count(t.evaluations_saved),
                f"of {_count(t.evaluations_cold)} evaluations, median over rows ({t.warm_rival}); "
                f"{t.rows_never_solved_warm:.1%} of rows never solved, cold {t.rows_never_solved_cold:.1%}",
            ),
        ]
    return shown


def _number(value: float | None, unknown: str = "not finite") -> str:
    return unknown if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _relative(value: float) -> str:
    """A fraction in per cent, or where the solver came near to zero a multiple; none of what is zero but for rounding."""
    if abs(value) >= 1e6:
        return "the solver's is about 0"
    return f"{value:.2%}" if abs(value) < 10 else f"{value:,.0f}x"


def _ratio(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}x"
