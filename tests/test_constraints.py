"""Feasibility in the core: what is violated, by how much, and which of two solutions is the better one."""

import math

import pytest
import torch

from amortized.contract import (
    QuadraticProgram,
    best_of,
    better,
    constrained,
    feasibility_tol,
    feasible_value,
    violation,
)
from amortized.solvers import ADMM, LBFGS, AugmentedLagrangian, MultiStart, ProjectedGradient

D = torch.float64


class Sphere:
    """The nearest point to ``a`` of the unit sphere: an equality alone."""

    def objective(self, b, a):
        return (b - a).square().sum(1)

    def equality(self, b, a):
        return b.square().sum(1, keepdim=True) - 1


class Disc(Sphere):
    """The nearest point to ``a`` of the unit disc."""

    equality = property()  # none: an AttributeError

    def inequality(self, b, a):
        return b.square().sum(1, keepdim=True) - 1


class Box:
    """``min (b - a)^2``, b in ``[0, 1]``, as a program."""

    def objective(self, b, a):
        return (b - a).square().sum(1)

    def program(self, a):
        eye = torch.eye(a.shape[1], dtype=a.dtype)
        return QuadraticProgram(2 * eye, -2 * a, eye, torch.zeros_like(a), torch.ones_like(a))


class Projected:
    """The same with a projection."""

    objective = Box.objective

    def project(self, b, a):
        return b.clamp(0, 1)


class Free:
    objective = Box.objective


def test_violation_is_the_largest_of_a_rows_constraints():
    b, a = torch.tensor([[0.6, 0.8], [2.0, -0.5], [0.0, 0.5]], dtype=D), torch.zeros(3, 2, dtype=D)
    for problem, expected in (
        (Sphere(), [0, 3.25, 0.75]),
        (Disc(), [0, 3.25, 0]),
        (Box(), [0, 1, 0]),
        (Projected(), [0, 1, 0]),
        (Free(), [0, 0, 0]),
    ):
        torch.testing.assert_close(violation(problem, b, a), torch.tensor(expected, dtype=D))
        assert constrained(problem) == (type(problem) is not Free)
        assert violation(problem, b[:0], a[:0]).shape == (0,)
    bad = torch.tensor([[math.nan, 0.0], [0.5, 0.5]], dtype=D)
    assert violation(Box(), bad, a[:2]).isnan().tolist() == [True, False]
    assert feasible_value(Box(), b, b[:, 0], a).tolist() == [0.6, math.inf, 0.0]
    assert feasibility_tol(Box()) == 1e-4


def test_better_ranks_feasible_first_then_lower_then_closer_and_nan_last():
    nan, inf = math.nan, math.inf
    ranked = [(-inf, 0), (1, 0), (2, 5e-5), (-9, 0.1), (-99, 0.2)]  # value and violation, the best first
    last = [(nan, 0), (0, nan), (inf, 0), (0, inf), (nan, nan)]
    value, off = torch.tensor(ranked + last, dtype=D).T
    i = torch.arange(len(value)).clamp(max=len(ranked))  # none of the last is better than another
    mask = better(value[:, None], off[:, None], value[None], off[None], tol=1e-4)
    assert torch.equal(mask, i[:, None] < i[None])
    for order in (torch.arange(10), torch.arange(10).flip(0)):
        assert best_of(value[order], off[order], tol=1e-4) == order.argmin()


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        (Sphere(), AugmentedLagrangian()),
        (Disc(), AugmentedLagrangian()),
        (Box(), ADMM()),
        (Projected(), ProjectedGradient()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_solution_has_its_violation_and_its_multipliers_start_the_next(problem, solver):
    a = torch.tensor([[2.0, 0.5], [0.2, 0.3], [-1.0, 3.0]], dtype=D)
    start = torch.full_like(a, 0.4)
    found = solver.solve(problem, a, start)
    assert found.converged.all()
    torch.testing.assert_close(found.violation, violation(problem, found.b, a), rtol=0, atol=0)
    assert found.violation.max() < 1e-5
    again = solver.solve(problem, a, found.b, dual=found.dual)
    assert again.iterations.max() == 0
    if found.dual is not None:
        without = solver.solve(problem, a, found.b)
        assert without.iterations.max() > 0, "the primal solution alone is no start to stop at"
        # L + dual' constraints is stationary.
        b = found.b.requires_grad_()
        c = (
            b
            if isinstance(problem, Box)
            else problem.equality(b, a)
            if type(problem) is Sphere
            else problem.inequality(b, a)
        )
        (grad,) = torch.autograd.grad((problem.objective(b, a) + (found.dual * c).sum(1)).sum(), b)
        assert grad.abs().max() < 1e-4
        with pytest.raises(ValueError, match="dual must"):
            solver.solve(problem, a, found.b.detach(), dual=found.dual[:2])
    nothing = solver.solve(problem, a[:0], start[:0])
    assert nothing.violation.shape == (0,)


def test_the_start_that_ignores_constraints_does_not_win():
    class Wave(Sphere):
        """Constraint ``b^3 - 3 b = 2.5`` of one unknown: a solver that starts at -1 stays there, infeasible and lower."""

        def objective(self, b, a):
            return b.sum(1)

        def equality(self, b, a):
            return b**3 - 3 * b - 2.5

    a = torch.zeros(4, 1, dtype=D)
    torch.manual_seed(0)
    starts = MultiStart(AugmentedLagrangian(), starts=32, spread=3.0)
    found = starts.explore(Wave(), a, a - 1)
    assert found.best.violation.max() < 1e-4
    torch.testing.assert_close(found.best.b, torch.full_like(a, 2.0536), atol=1e-3, rtol=0)
    assert (found.values >= found.best.value[:, None] - 1e-4).all()
    assert LBFGS(50).solve(Wave(), a, a).violation.min() > 1, "it passes over the constraints, and its solution says so"


def test_a_trace_has_points_whose_feasibility_can_be_told():
    a = torch.tensor([[2.0, 0.5], [-1.0, 3.0]], dtype=D)
    for problem, solver in ((Sphere(), AugmentedLagrangian()), (Box(), ADMM()), (Box(), MultiStart(ADMM(), 3))):
        seen = []
        found = solver.solve(problem, a, torch.full_like(a, 4.0), trace=lambda *x, seen=seen: seen.append(x))
        (_, first, at_first), (_, last, value) = seen[0], seen[-1]
        assert last.shape == first.shape == a.shape
        torch.testing.assert_close(last, found.b, atol=1e-8, rtol=0)
        torch.testing.assert_close(value, found.value, atol=1e-8, rtol=0)
        torch.testing.assert_close(at_first, problem.objective(first, a))
        assert feasible_value(problem, last, value, a).isfinite().all()
