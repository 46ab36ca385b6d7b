"""The strong solvers against problems whose minima are known: the Moré–Garbow–Hillstrom set and quadratics."""

import pytest
import torch
from more_garbow_hillstrom import EVERY, Least
from test_solvers import Quadratics, quadratics

from amortized.solvers import BFGS, LBFGS, GaussNewton, Newton, Solver

STRONG = {"bfgs": BFGS(steps=5000), "lbfgs": LBFGS(steps=5000, dense=0)}
strong = pytest.mark.parametrize("solver", list(STRONG.values()), ids=list(STRONG))


@strong
@pytest.mark.parametrize("problem", EVERY, ids=[problem.name for problem in EVERY])
def test_more_garbow_hillstrom(problem: Least, solver: Solver) -> None:
    b = problem.starts(64)
    found = solver.solve(problem, b, b)
    assert found.converged.all()
    assert (found.residual <= 1e-6).all()
    at = torch.tensor(problem.minima, dtype=b.dtype)
    off = ((found.value[:, None] - at).abs() / (1 + at)).amin(1)
    # The trigonometric problem has more local minima than are published.
    assert (off < 1e-6).double().mean() >= (0.6 if problem.name == "trigonometric" else 1)


@strong
@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize("n", [2, 20])
def test_ill_conditioned_quadratics(solver: Solver, n: int, condition: float) -> None:
    a, b, best = quadratics(128, n, condition)
    found = solver.solve(Quadratics(), a, b)
    assert found.converged.all()
    # ‖g‖² / 2μ bounds the gap of a convex quadratic, μ = 1 / condition.
    assert (found.value - best <= found.residual**2 * condition / 2 + 1e-12 * best.abs()).all()


@strong
@pytest.mark.parametrize("n", [2, 20])
def test_float32_reaches_what_float32_can(solver: Solver, n: int) -> None:
    a, b, _ = quadratics(256, n, 100.0, torch.float32)
    tight = type(solver)(steps=5000, tol=1e-5)
    found = tight.solve(Quadratics(), a, b)
    assert found.converged.all()


SLOW_VALLEYS = {"newton": {"powell badly scaled", "biggs exp6"}, "gauss-newton": {"powell badly scaled"}}


class Halved:
    """½ Σ r², as Gauss–Newton asks for."""

    def __init__(self, problem: Least) -> None:
        self.problem, self.residuals = problem, problem.residuals

    def objective(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.problem.objective(b, a) / 2


@pytest.mark.parametrize("name", list(SLOW_VALLEYS))
@pytest.mark.parametrize("problem", EVERY, ids=[problem.name for problem in EVERY])
def test_trust_regions_on_more_garbow_hillstrom(problem: Least, name: str) -> None:
    b = problem.starts(16)
    found = Newton().solve(problem, b, b) if name == "newton" else GaussNewton().solve(Halved(problem), b, b)
    if problem.name in SLOW_VALLEYS[name]:
        assert (found.value < problem.objective(b, b)).all()
    else:
        assert found.converged.double().mean() >= 0.9  # Gauss–Newton crawls where residuals stay large


def test_newton_needs_two_evaluations_on_a_quadratic() -> None:
    a, b, best = quadratics(32, 20, 1e4)
    found = Newton(radius=1e6).solve(Quadratics(), a, b)
    assert found.converged.all()
    assert (found.evaluations == 2).all()
    torch.testing.assert_close(found.value, best)


def test_newton_leaves_a_saddle() -> None:
    class Saddle:
        def objective(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return b[:, 0] ** 2 + (b[:, 1] ** 2 - 1) ** 2

    b = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = Newton().solve(Saddle(), b, b)
    assert found.converged.all()
    torch.testing.assert_close(found.b.abs(), torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_gauss_newton_checks_the_scale_of_the_objective() -> None:
    problem = EVERY[0]
    b = problem.starts(2)
    with pytest.raises(ValueError, match="half the sum of squared residuals"):
        GaussNewton().solve(problem, b, b)
