"""Solvers of other packages, one row after another: the ground truth of tests and benchmarks, not a fast inner loop."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amortized.contract import Context, Problem, take, value_and_grad
from amortized.solvers.base import Solution, Solver, Status, Trace, size, tolerance


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is not installed: pip install {package} (or '.[benchmarks]' in a clone)", name=error.name
        ) from error


class SciPy(Solver):
    """``scipy.optimize.minimize`` on each row in turn, with gradients from torch, in float64 on the CPU.

    For ground truth, and for a single problem (B = 1), where it is the faster choice.

    Args:
        steps: iterations at most.
        method: one that takes gradients: ``"L-BFGS-B"``, ``"BFGS"``, ``"CG"``, ``"SLSQP"``, ...
        tol: gradient norm at which a row counts as converged; None chooses by dtype.

    Raises:
        ModuleNotFoundError: from :meth:`solve`, if SciPy is not installed.
    """

    def __init__(self, steps: int = 5000, method: str = "L-BFGS-B", tol: float | None = None) -> None:
        super().__init__(steps, tol)
        self.method = method

    def _solve(self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`; ``trace`` is called once, at the end."""
        optimize = _module("scipy.optimize", "scipy")
        value, grad = value_and_grad(problem, b, a)
        tols = (tolerance(self.tol, b.dtype) * size(value, grad.flatten(1).norm(dim=1))).nan_to_num().tolist()
        rows = []
        for i, tol in enumerate(tols):
            here, start = take(a, slice(i, i + 1)), b[i : i + 1]
            best: list[Any] = [start, torch.inf, torch.inf]
            count = 0

            def both(x: np.ndarray, here: Context = here, start: Tensor = start, best: Any = best) -> Any:
                nonlocal count
                count += 1
                point = torch.from_numpy(x).to(start).view(start.shape)
                value, grad = value_and_grad(problem, point, here)
                norm = float(grad.norm())
                if float(value) < best[1] or (float(value) == best[1] and norm < best[2]):
                    best[:] = [point.clone(), float(value), norm]
                return float(value), grad.flatten().double().cpu().numpy()

            options: dict[str, float] = {"maxiter": self.steps}
            if self.method == "L-BFGS-B":
                options |= {"gtol": tol / start.numel() ** 0.5, "ftol": 0, "maxfun": 20 * self.steps}
            else:
                options |= {"gtol": tol} if self.method in ("BFGS", "CG") else {}
            out = optimize.minimize(
                both, start.flatten().double().cpu().numpy(), jac=True, method=self.method, options=options
            )
            finite = torch.isfinite(torch.tensor(best[1]))
            status = Status.CONVERGED if best[2] <= tol else Status.LIMIT if finite else Status.DIVERGED
            rows.append((*best, int(getattr(out, "nit", 0)), count, int(status)))
        return _gather(rows, b, trace)


class QPSolver(Solver):
    """A solver of ``qpsolvers`` on each quadratic program in turn: OSQP, Clarabel, Gurobi, ... whichever is installed.

    The problem has ``program(a)`` (:class:`~amortized.contract.Quadratic`). ``residual`` is the largest violation of a
    constraint; a row has converged if the solver found a solution that is feasible to ``tol``.

    Args:
        name: of the solver, as ``qpsolvers`` calls it.
        tol: violation up to which a row counts as converged; None chooses by dtype.

    Raises:
        ModuleNotFoundError: from :meth:`solve`, if ``qpsolvers`` is not installed.
        TypeError: from :meth:`solve`, if the problem lacks ``program``.
    """

    needs = ("program",)

    def __init__(self, name: str = "clarabel", tol: float | None = None) -> None:
        super().__init__(1, tol)
        self.name = name

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, except that the start is not used; ``trace`` is called once, at the end."""
        qpsolvers, sparse = _module("qpsolvers", "qpsolvers"), _module("scipy.sparse", "scipy")
        rows = []
        for i in range(len(b)):
            program = problem.program(take(a, slice(i, i + 1)))
            p, q, matrix, low, high = (
                (x[0] if x.ndim > 2 or k in (1, 3, 4) else x).double().cpu().numpy() for k, x in enumerate(program)
            )
            equal, up, down = low == high, (low < high) & np.isfinite(high), (low < high) & np.isfinite(low)
            x = qpsolvers.solve_qp(
                sparse.csc_matrix(p), q, sparse.csc_matrix(np.concatenate([matrix[up], -matrix[down]])),
                np.concatenate([high[up], -low[down]]), sparse.csc_matrix(matrix[equal]), high[equal],
                solver=self.name,
            )  # fmt: skip
            if x is None:
                rows.append((b[i : i + 1], torch.nan, torch.inf, 0, 1, int(Status.LIMIT)))
                continue
            point = torch.from_numpy(np.asarray(x)).to(b).view(1, *b.shape[1:])
            value = float(problem.objective(point, take(a, slice(i, i + 1))))
            off = float(np.maximum(matrix @ x - high, low - matrix @ x).max(initial=0.0))
            converged = off <= tolerance(self.tol, b.dtype) * 10
            rows.append((point, value, off, 1, 1, int(Status.CONVERGED if converged else Status.LIMIT)))
        return _gather(rows, b, trace)


def _gather(rows: list[tuple[Any, ...]], b: Tensor, trace: Trace | None) -> Solution:
    """One solution from what was found for each row."""
    points, values, residuals, iterations, evaluations, statuses = zip(*rows, strict=True)
    whole = [torch.tensor(x, dtype=torch.int64, device=b.device) for x in (iterations, evaluations, statuses)]
    found = Solution(torch.cat(points), b.new_tensor(values), b.new_tensor(residuals), *whole)
    if trace is not None:
        trace(int(found.evaluations.max()), found.b, found.value)
    return found
