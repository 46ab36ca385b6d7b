"""Corrections: what they give is feasible, nearest where they say so, and their derivatives are those of finite differences."""

import copy
import pickle
import time

import pytest
import torch
from torch import nn

from amortized.contract import Polyhedron, ProblemError, violation
from amortized.solvers import (
    ADMM,
    Ball,
    Box,
    Gauge,
    GradientDescent,
    LinearCompletion,
    Projection,
    SecondOrderCone,
    Seek,
    Semidefinite,
    Sequence,
    Simplex,
    Status,
)

N, P, M, B = 8, 3, 6, 16


class Planes:
    """``½ ‖b‖²`` where ``E b = a`` and ``-1 ≤ G b ≤ h``; the matrices shared or each row's own."""

    def __init__(self, own=False, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        shape = (B, P + M, N) if own else (P + M, N)
        self.A = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def objective(self, b, a):
        return b.square().sum(1) / 2

    def polyhedron(self, a):
        bound = torch.full((len(a), M), 1.0, dtype=a.dtype)
        return Polyhedron(self.A, torch.cat([a, -bound], 1), torch.cat([a, 2 * bound], 1))


class Curved:
    """A circle's inside, and a parabola that is to be met."""

    def objective(self, b, a):
        return b.sum(1)

    def equality(self, b, a):
        return b[:, 1:] - a * b[:, :1].square()

    def inequality(self, b, a):
        return b.square().sum(1, keepdim=True) - 4


@pytest.fixture
def a():
    return 0.2 * torch.randn(B, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def b():
    return 3 * torch.randn(B, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def after(solver, problem, a, b):
    (point,) = solver.iterates(problem, a, b)
    return point


LINEAR = {"gauge": Gauge(), "projection": Projection(tol=1e-11), "seek": Seek(60)}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_corrected_is_feasible_and_the_feasible_stays(name, own, a, b):
    problem, solver = Planes(own), LINEAR[name]
    assert violation(problem, b, a).min() > 0.5
    found = solver.solve(problem, a, b)
    assert found.violation.max() < 1e-6
    assert (found.status == Status.CONVERGED).all()
    inside = Gauge().solve(problem, a, 0.1 * b).b
    torch.testing.assert_close(after(solver, problem, a, inside), inside, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [*LINEAR, "completion"])
def test_derivatives_are_those_of_finite_differences(name, a, b):
    problem, solver = Planes(), {**LINEAR, "completion": LinearCompletion()}[name]
    b = b[:3].requires_grad_()
    a = a[:3]
    direction = torch.randn(3, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-5 * torch.randn(3, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (grad,) = torch.autograd.grad((after(solver, problem, a, b) * direction).sum(), b)
    with torch.no_grad():
        up, down = (after(solver, problem, a, b + sign * step) for sign in (1, -1))
    expected = ((up - down) * direction).sum(1) / 2
    torch.testing.assert_close((grad * step).sum(1), expected, rtol=1e-4, atol=1e-9)


def test_the_gauge_goes_as_far_along_the_ray_as_there_is_room(a, b):
    problem = Planes()
    x = Gauge().solve(problem, a, torch.zeros_like(b)).b  # E⁺ a
    found = Gauge().solve(problem, a, b).b
    assert violation(problem, x + 1.001 * (found - x), a).min() > 1e-4
    d = b - x
    d = d - (torch.linalg.pinv(problem.A[:P]) @ (problem.A[:P] @ d.T)).T
    torch.testing.assert_close(torch.cosine_similarity(d, found - x), torch.ones(B, dtype=torch.float64))


def test_the_gauge_takes_the_interior_point_of_the_problem_and_says_where_there_is_none(a, b):
    class Shifted(Planes):
        def polyhedron(self, a):
            A, lower, upper = super().polyhedron(a)
            shift = torch.cat([torch.zeros_like(a), torch.full((len(a), M), 1.5, dtype=a.dtype)], 1)
            return Polyhedron(A, lower + shift, upper + shift)

    with pytest.raises(
        ProblemError, match=r"the shortest point of Shifted's equalities is in none of the 16 .* write interior"
    ):
        Gauge().solve(Shifted(), a, b)

    class Centred(Shifted):
        def interior(self, a):
            rest = torch.full((len(a), M), 2.0, dtype=a.dtype)
            inside = torch.cat([a, rest], 1) @ torch.linalg.pinv(self.A).T
            return Projection(tol=1e-10).correct(Tight(self.A), a, inside)

    class Tight(Shifted):
        def __init__(self, A):
            self.A = A

        def polyhedron(self, a):
            A, lower, upper = super().polyhedron(a)
            margin = torch.cat([torch.zeros_like(a), torch.full((len(a), M), 0.1, dtype=a.dtype)], 1)
            return Polyhedron(A, lower + margin, upper - margin)

    found = Gauge().solve(Centred(), a, b)
    assert found.violation.max() < 1e-7


def test_one_row_without_room_touches_no_other(a, b):
    problem = Planes()
    far = a.clone()
    far[2] *= 1000
    found, alone = Gauge().solve(problem, far, b), Gauge().solve(problem, a, b)
    rest = torch.arange(B) != 2
    torch.testing.assert_close(found.b[rest], alone.b[rest])
    assert found.status[2] == Status.LIMIT
    assert found.violation[2] > 1
    assert (found.b[2] @ problem.A[:P].T - far[2]).abs().max() < 1e-9


def test_the_factor_is_made_once_and_anew_for_other_numbers(a, b, monkeypatch):
    calls = []
    pinv = torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda x: calls.append(1) or pinv(x))
    problem, gauge = Planes(), Gauge()
    for _ in range(3):
        gauge.solve(problem, a, b)
    assert len(calls) == 1
    problem.A[0] *= 2
    assert gauge.solve(problem, a, b).violation.max() < 1e-9
    assert len(calls) == 2
    for other in (copy.deepcopy(gauge), pickle.loads(pickle.dumps(gauge))):
        assert other.solve(Planes(), a, b).violation.max() < 1e-9


def test_single_precision_loses_no_more_than_its_rounding(a, b):
    problem = Planes(dtype=torch.float32)
    found = Gauge().solve(problem, a.float(), b.float()).b
    assert found.dtype == torch.float32
    exact = Planes()
    exact.A = problem.A.double()
    assert violation(exact, found.double(), a.float().double()).max() < 2e-6


def test_projection_is_the_nearest_point(a, b):
    problem = Planes()
    nearest = Projection(tol=1e-10).solve(problem, a, b).b
    for seed in range(20):
        other = (
            Gauge().solve(problem, a, b + torch.randn(B, N, generator=torch.Generator().manual_seed(seed)).double()).b
        )
        assert ((nearest - b).norm(dim=1) <= (other - b).norm(dim=1) + 1e-8).all()


def test_seek_meets_curved_constraints_and_is_differentiable():
    problem, a = Curved(), torch.linspace(0.1, 1, B, dtype=torch.float64)[:, None]
    start = torch.stack([torch.linspace(-3, 3, B), torch.linspace(2, -1, B)], 1).double()
    found = Seek(12, damping=1).solve(problem, a, start)
    assert violation(problem, start, a).max() > 3
    assert found.violation.max() < 1e-6
    assert ((found.b - start).norm(dim=1) < 2 * violation(problem, start, a)).all()
    inside = found.b.square().sum(1) < 3.9  # where the parabola alone is met, to first order no step leaves it
    again = found.b.requires_grad_()
    (grad,) = torch.autograd.grad(after(Seek(2, damping=0), problem, a, again + 1e-5).sum(), again)
    slope = torch.cat([-2 * a * found.b[:, :1], torch.ones_like(a)], 1)
    assert ((grad * slope).sum(1)[inside].abs() < 1e-3).all()
    assert grad.norm(dim=1)[inside].mean() > 0.5


def test_completion_keeps_the_free_and_meets_the_equalities(a, b):
    for own in (False, True):
        problem, solver = Planes(own), LinearCompletion()
        found = after(solver, problem, a, b)
        kept = (found == b).all(0)
        assert int(kept.sum()) == N - P
        left = (problem.A[..., :P, :] @ found.unsqueeze(2)).squeeze(2) - a
        assert left.abs().max() < 1e-10
    named = after(LinearCompletion([0, 1, 2]), Planes(), a, b)
    assert torch.equal(named[:, 3:], b[:, 3:])
    with pytest.raises(ValueError, match="as many unknowns as there are equalities, 3; got 2"):
        after(LinearCompletion([0, 1]), Planes(), a, b)


def test_a_sequence_runs_one_after_the_other(a, b):
    problem = Planes()
    solver = Sequence([GradientDescent(3, lr=0.1), LinearCompletion(), Seek(20)])
    points = list(solver.iterates(problem, a, b))
    assert len(points) == solver.steps == 5
    torch.testing.assert_close(points[2], 0.9**3 * b)
    found = solver.solve(problem, a, b)
    assert found.violation.max() < 1e-6
    assert (found.evaluations >= 2).all()
    with pytest.raises(TypeError, match="linear constraints"):
        solver.require(Curved())
    with pytest.raises(ValueError, match="at least one"):
        Sequence([])
    back = Sequence([ADMM(), GradientDescent(5)])  # which leaves the constraints
    assert back.solve(_WithProgram(), a, b).violation.max() < 1e-5


class _WithProgram(Planes):
    def program(self, a):
        from amortized.contract import QuadraticProgram

        return QuadraticProgram(torch.eye(N).double(), torch.zeros(len(a), N).double(), *self.polyhedron(a))


SETS = {
    "simplex": (Simplex(), lambda x: x.clamp(max=0).abs().sum(-1) + (x.sum(-1) - 1).abs()),
    "box": (Box(-0.5, 0.5), lambda x: (x.abs() - 0.5).clamp(min=0).sum(-1)),
    "ball": (Ball(0.7), lambda x: (x.norm(dim=-1) - 0.7).clamp(min=0)),
    "cone": (SecondOrderCone(), lambda x: (x[..., :-1].norm(dim=-1) - x[..., -1]).clamp(min=0)),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_are_met_by_the_nearest_point_as_layer_and_as_solver(name, b):
    layer, off = SETS[name]
    x = layer(b)
    assert off(x).max() < 1e-12
    torch.testing.assert_close(layer(x), x)
    # Of a convex set the projection x of b has (b − x)ᵀ(y − x) ≤ 0 for every y in it.
    for seed in range(20):
        y = layer(3 * torch.randn(B, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        assert ((b - x) * (y - x)).sum(1).max() < 1e-10
    torch.testing.assert_close(after(layer, Planes(), b[:, :P], b), x)
    assert torch.autograd.gradcheck(layer, b[:2].requires_grad_(), atol=1e-6)
    assert nn.Sequential(nn.Linear(4, N), layer)(torch.randn(2, 4)).shape == (2, N)


def test_semidefinite_matrices_and_a_derivative_that_equal_eigenvalues_do_not_break():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    x = Semidefinite()(b)
    assert torch.linalg.eigvalsh(x).min() > -1e-12
    torch.testing.assert_close(x, x.mT)
    torch.testing.assert_close(Semidefinite()(x), x)
    assert torch.autograd.gradcheck(Semidefinite(), b.requires_grad_(), atol=1e-6)
    equal = torch.eye(4, dtype=torch.float64).expand(2, 4, 4).clone().requires_grad_()
    Semidefinite()(equal).square().sum().backward()
    torch.testing.assert_close(equal.grad, 2 * equal.detach())


def test_the_gauge_costs_little_beside_a_projection(a, b):
    problem, gauge, projection = Planes(), Gauge(), Projection(tol=1e-6)
    many, points = a.repeat(50, 1), b.repeat(50, 1)

    def seconds(solver):
        spent = []
        for _ in range(4):
            start = time.perf_counter()
            after(solver, problem, many, points)
            spent.append(time.perf_counter() - start)
        return min(spent)

    assert seconds(gauge) < seconds(projection) / 3
