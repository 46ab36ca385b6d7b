"""Completion: equations solved for what follows from the rest, the gradient through it, and corrections of inequalities."""

import pytest
import torch

from amortized.contract import violation
from amortized.solvers import Completion, Status


class Ring:
    """``w₁ = x₁² + a w₂ / 4``, ``w₂ = sin w₁ + x₂``, and x₁ + w₁ ≤ 1; unknowns in the order x₁, w₁, x₂, w₂."""

    dependent = torch.tensor([1, 3])

    def objective(self, b, a):
        return b.square().sum(1)

    def equality(self, b, a):
        x1, w1, x2, w2 = b.unbind(1)
        return torch.stack([x1**2 + a[:, 0] * w2 / 4 - w1, w1.sin() + x2 - w2], 1)

    def inequality(self, b, a):
        return b[:, :1] + b[:, 1:2] - 1


class Shared(Ring):
    """The same, with a solved row at which all rows share a factor."""

    def nominal(self):
        return torch.zeros(1, 4, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)


class Linear:
    """``A b = a`` for 3 of 5 unknowns, with one matrix for all rows."""

    dependent = torch.tensor([0, 2, 4])
    A = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calls = 0

    def objective(self, b, a):
        return b.square().sum(1)

    def equality(self, b, a):
        type(self).calls += 1
        return b @ self.A.T - a

    def nominal(self):
        return torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)


def rows(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return a, 0.5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("problem", [Ring(), Shared()])
def test_the_dependent_unknowns_satisfy_the_equations_and_the_others_stay(problem):
    a, b = rows()
    found = Completion().solve(problem, a, b)
    assert found.converged.all()
    assert problem.equality(found.b, a).abs().max() < 1e-9
    assert torch.equal(found.b[:, [0, 2]], b[:, [0, 2]])
    alone = Completion().solve(problem, a[2:3], b[2:3])
    torch.testing.assert_close(alone.b[0], found.b[2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("problem", [Ring(), Shared()])
def test_the_gradient_is_that_of_the_implicit_function(problem):
    a, b = rows(4)
    layer = Completion(steps=50, tol=1e-13)

    def completed(x):
        return layer.solve(problem, a, x).b

    x = b.clone().requires_grad_()
    (y,) = layer.iterates(problem, a, x)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (grad,) = torch.autograd.grad((weight * y).sum(), x)
    for k in range(4):
        step = torch.zeros_like(b)
        step[:, k] = 1e-6
        slope = (weight * (completed(b + step) - completed(b - step))).sum(1) / 2e-6
        torch.testing.assert_close(grad[:, k], slope, rtol=1e-5, atol=1e-6)
    assert not grad[:, [1, 3]].any()  # a start is only a start


def test_linear_equations_take_one_step_by_one_factor():
    problem, a = Linear(), torch.randn(7, 3, dtype=torch.float64)
    Linear.calls = 0
    found = Completion().solve(problem, a, torch.randn(7, 5, dtype=torch.float64))
    assert found.converged.all()
    assert (found.iterations == 1).all()
    assert Linear.calls <= 5
    torch.testing.assert_close(problem.equality(found.b, a), torch.zeros(7, 3, dtype=torch.float64), atol=1e-10, rtol=0)


def test_corrections_meet_inequalities_outside_of_training_only():
    problem, (a, b) = Ring(), rows(32)
    b[:, 0] = 0.6 + b[:, 0].abs() / 4
    layer = Completion(corrections=5)
    assert len(list(layer.train().iterates(problem, a, b))) == 1
    completed, corrected = layer.eval().iterates(problem, a, b)
    off, on = violation(problem, completed, a), violation(problem, corrected, a)
    assert (off > 0.1).sum() > 8
    assert (on <= 1e-4).all()
    kept = off <= 5e-5
    assert torch.equal(completed[kept], corrected[kept])
    moved = (corrected - completed)[:, [0, 2]].norm(dim=1)
    assert moved.max() < 1.5 * off.max()


def test_a_row_without_a_solution_touches_no_other():
    problem, (a, b) = Ring(), rows()
    a[1] = torch.nan
    found = Completion(corrections=3).solve(problem, a, b)
    good = torch.tensor([0, 2, 3, 4, 5])
    assert found.status[1] == Status.DIVERGED
    assert found.converged[good].all()
    torch.testing.assert_close(
        Completion(corrections=3).solve(problem, a[good], b[good]).b, found.b[good], rtol=0, atol=1e-9
    )


def test_what_does_not_fit_is_told():
    a, b = rows()

    class TooFew(Ring):
        dependent = torch.tensor([1])

    with pytest.raises(ValueError, match="has 2 equations and names 1 dependent"):
        Completion().solve(TooFew(), a, b)
    with pytest.raises(TypeError, match="needs more of a problem than object has: equality, dependent"):
        Completion().solve(object(), a, b)
    with pytest.raises(ValueError, match="corrections and margin"):
        Completion(corrections=-1)
