"""Contexts a second of ``amortized solve`` on sphere beside a loop of SciPy's L-BFGS over single problems.

``python -m benchmarks.mass_production [--quick]``

Both draw the same functions, on one thread. SciPy gets the objective and its gradient in NumPy, and the cold start of the
recipe's solver; ours has a certificate for each row, and solves what is above the tolerance. In turn, the median of 5.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

import amortized
from amortized.contract import take, value_and_grad

GAMMA, TOL = 0.5, 0.1


def objective(b: np.ndarray, y: np.ndarray, offsets: np.ndarray) -> tuple[float, np.ndarray]:
    """``L(b; a)`` of one function of the sphere, and its gradient."""
    r = np.sqrt(b @ b)
    x = b / r
    c = np.clip(y @ x, -1 + 1e-12, 1 - 1e-12)
    d = np.arccos(c)
    z = -(d * d / 2 + offsets) / GAMMA
    top = z.max()
    w = np.exp(z - top)
    s = w.sum()
    on_x = ((w / s) * (-d / np.sqrt(1 - c * c))) @ y
    return -GAMMA * (np.log(s) + top) + (r - 1) ** 2, (on_x - (on_x @ x) * x) / r + 2 * (r - 1) * x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    rows = 4096 if parser.parse_args().quick else 16384
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    solver = amortized.load("sphere")
    a = solver.data.produce(0, rows)
    few = take(a, slice(0, 200))
    start = solver.module.initial(few).double().numpy()
    y, offsets = few.centres.double().numpy(), few.offsets.double().numpy()
    solver.rows(few, TOL)
    ratios, rates = [], []
    for _ in range(5):
        began = time.perf_counter()
        for at in range(0, rows, 4096):
            solver.rows(take(a, slice(at, at + 4096)), TOL)
        ours = rows / (time.perf_counter() - began)
        began = time.perf_counter()
        value = [
            minimize(objective, b, (y[i], offsets[i]), jac=True, method="L-BFGS-B").fun for i, b in enumerate(start)
        ]
        theirs = len(start) / (time.perf_counter() - began)
        ratios.append(ours / theirs)
        rates.append((ours, theirs))
    began = time.perf_counter()
    for i, b in enumerate(start[:50]):
        row = take(few, slice(i, i + 1))

        def by_torch(x: np.ndarray, row: Any = row) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(solver.module, torch.from_numpy(x).float().unsqueeze(0), row)
            return float(value), gradient[0].double().numpy()

        minimize(by_torch, b, jac=True, method="L-BFGS-B")
    plain = 50 / (time.perf_counter() - began)
    first = solver.rows(few, TOL)
    gap = first.objective.double().numpy() - np.minimum(np.array(value), first.objective.double().numpy())
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"amortized {ours:,.0f} contexts/s, SciPy {theirs:,.0f}: ratio {statistics.median(ratios):.0f}")
    print(f"SciPy with the gradient of PyTorch, as a problem has it: {plain:,.0f} contexts/s, ratio {ours / plain:.0f}")
    print(f"mean gap to SciPy's best of 200: {gap.mean():.4f}; within {TOL}: {(gap <= TOL).mean():.1%}")


if __name__ == "__main__":
    main()
