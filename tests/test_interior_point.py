"""The interior point: known minima, multipliers, rows for themselves, and rows without a solution."""

import pytest
import torch
from hock_schittkowski import PROBLEMS

from amortized.contract import QuadraticProgram, take, value_and_grad
from amortized.solvers import ADMM, InteriorPoint, Status
from amortized.solvers.smooth.newton import jacobian
from amortized.solvers.structured.newton_system import newton_system

ELSEWHERE = {15: 0.7, 27: 0.85}
"""Problems with a second minimum, or a valley that the limit of rounds does not reach the end of: the share that gets there."""


def starts(problem, count=16):
    """The standard start, and others around it."""
    x = torch.tensor(problem.start, dtype=torch.float64)
    noise = torch.randn(count, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[0] = 0
    return x + 0.1 * noise * x.abs().clamp(min=1), torch.zeros(count, 1)


@pytest.mark.parametrize("number", PROBLEMS)
def test_known_minima_of_nonlinear_programs(number):
    problem = PROBLEMS[number]
    b, a = starts(problem)
    found = InteriorPoint(100, tol=1e-8).solve(problem, a, b)
    reached = found.converged & ((found.value - problem.minimum).abs() <= 1e-5 * max(1, abs(problem.minimum)))
    assert reached.double().mean() >= ELSEWHERE.get(number, 1)
    assert (found.violation[found.converged] <= 1e-6).all()


@pytest.mark.parametrize("number", [43, 71, 100])
def test_the_multipliers_balance_the_gradient(number):
    problem = PROBLEMS[number]
    b, a = starts(problem, 4)
    found = InteriorPoint(tol=1e-9).solve(problem, a, b)
    assert found.converged.all()
    x = found.b.requires_grad_()
    c, d = problem.equality(x, a), problem.inequality(x, a)
    y, z = found.dual.split([c.shape[1], d.shape[1]], 1)
    _, grad = value_and_grad(problem, found.b, a)
    balance = grad + (y.unsqueeze(1) @ jacobian(c, x) if c.requires_grad else 0 * grad.unsqueeze(1)).squeeze(1)
    balance = balance + (z.unsqueeze(1) @ jacobian(d, x)).squeeze(1)
    assert balance.abs().max() < 1e-6 * (1 + grad.abs().max())
    assert (z >= 0).all()
    assert (z * d).abs().max() < 1e-6


def test_a_start_with_multipliers_is_soon_at_its_end():
    problem = PROBLEMS[100]
    b, a = starts(problem)
    cold = InteriorPoint().solve(problem, a, b)
    warm = InteriorPoint().solve(problem, a, cold.b, dual=cold.dual)
    assert warm.converged.all()
    assert warm.iterations.double().mean() < cold.iterations.double().mean() / 2
    with pytest.raises(ValueError, match=r"0 \+ 4 multipliers.*got 3"):
        InteriorPoint().solve(problem, a, b, dual=torch.zeros(16, 3))


class Discs:
    """The nearest point to the origin in the disc of radius 1 around a, that lies on y = a₂ too: two rows out of reach."""

    def objective(self, b, a):
        return b.square().sum(1)

    def equality(self, b, a):
        return b[:, 1:] - a[:, 2:]

    def inequality(self, b, a):
        return (b - a[:, :2]).square().sum(1, keepdim=True) - 1


def test_rows_without_a_feasible_point_end_and_touch_no_other():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    a[:, 2] = a[:, 1] + 0.5
    a[3, 2], a[7, 2] = a[3, 1] + 2, torch.nan
    found = InteriorPoint(200).solve(Discs(), a, torch.zeros(12, 2, dtype=torch.float64))
    good = torch.ones(12, dtype=torch.bool)
    good[[3, 7]] = False
    assert found.converged[good].all()
    assert found.status[3] == Status.LIMIT
    assert found.violation[3] > 0.1
    assert found.iterations[3] < 100
    assert not found.converged[7]
    alone = InteriorPoint(200).solve(Discs(), a[good], torch.zeros(10, 2, dtype=torch.float64))
    torch.testing.assert_close(found.b[good], alone.b, rtol=1e-9, atol=1e-9)
    for row in (0, 11):
        one = InteriorPoint(200).solve(Discs(), a[row : row + 1], torch.zeros(1, 2, dtype=torch.float64))
        torch.testing.assert_close(one.b[0], found.b[row], rtol=1e-9, atol=1e-9)


def test_single_precision_is_solved_in_double():
    problem = PROBLEMS[71]
    b, a = starts(problem)
    found = InteriorPoint(tol=1e-6).solve(problem, a, b.float())
    assert found.b.dtype == torch.float32
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.full((16,), 17.0140173), rtol=1e-5, atol=0)


def test_it_asks_for_constraints():
    class Free:
        def objective(self, b, a):
            return b.square().sum(1)

    with pytest.raises(TypeError, match="equality, inequality or program"):
        InteriorPoint().solve(Free(), torch.zeros(1, 1), torch.zeros(1, 2))


class Programs:
    """Programs with random data; a row of a is q, then a bound for each constraint. Some rows have no feasible point."""

    n, m, equalities = 8, 14, 3

    def __init__(self, own, rows=32):
        generator = torch.Generator().manual_seed(2)
        lead = (rows,) if own else ()
        root = torch.randn(*lead, self.n, self.n - 2, generator=generator, dtype=torch.float64)
        self.P = root @ root.mT
        self.A = torch.randn(*lead, self.m, self.n, generator=generator, dtype=torch.float64)
        self.a = torch.randn(rows, self.n + self.m, generator=generator, dtype=torch.float64)
        self.own = own

    def program(self, a):
        index = torch.cat([(self.a == row).all(1).nonzero()[:, 0] for row in a])
        q, bound = a.split([self.n, self.m], 1)
        lower, upper = -bound.abs() - 0.5, bound.abs() + 0.5
        upper[:, : self.equalities] = lower[:, : self.equalities] = bound[:, : self.equalities] / 10
        lower[:, 3:5], upper[:, 5:7] = -torch.inf, torch.inf
        P, A = (self.P[index], self.A[index]) if self.own else (self.P, self.A)
        return QuadraticProgram(P, q, A, lower, upper)

    def objective(self, b, a):
        P, q, *_ = self.program(a)
        return ((b.unsqueeze(1) @ P).squeeze(1) * b).sum(1) / 2 + (q * b).sum(1)


@pytest.mark.parametrize("own", [False, True])
def test_programs_end_where_admm_ends_with_its_multipliers(own):
    problem = Programs(own)
    b = torch.zeros(32, 8, dtype=torch.float64)
    found, other = (
        InteriorPoint(tol=1e-9).solve(problem, problem.a, b),
        ADMM(tol=1e-9, steps=50000).solve(problem, problem.a, b),
    )
    both = found.converged & other.converged
    assert found.converged.double().mean() > 0.8
    assert (found.converged | ~other.converged).all()
    torch.testing.assert_close(found.value[both], other.value[both], rtol=1e-6, atol=1e-6)
    P, q, A, lower, upper = problem.program(problem.a)
    x, y = found.b[both], found.dual[both]
    A = A[both] if own else A.expand(len(x), -1, -1)
    P = P[both] if own else P.expand(len(x), -1, -1)
    balance = (P @ x.unsqueeze(2)).squeeze(2) + q[both] + (A.mT @ y.unsqueeze(2)).squeeze(2)
    assert balance.abs().max() < 1e-7
    ax = (A @ x.unsqueeze(2)).squeeze(2)
    assert (torch.where(y > 1e-6, (upper[both] - ax).abs(), 0) < 1e-5).all()
    assert (torch.where(y < -1e-6, (ax - lower[both]).abs(), 0) < 1e-5).all()
    assert found.iterations[both].max() < 25


def test_programs_without_a_solution_are_proved_so_row_by_row():
    class Box:
        """min ½ p b₁² + q·b over bounds on b₁, b₂ and b₁ + b₂."""

        def program(self, a):
            one = torch.ones(len(a), 1, dtype=a.dtype)
            A = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=a.dtype)
            lower = torch.cat([-one, torch.where(a[:, 1:2] > 0, -torch.inf, -1.0), a[:, :1]], 1)
            return QuadraticProgram(
                torch.diag(torch.tensor([1.0, 0], dtype=a.dtype)),
                one.expand(-1, 2),
                A,
                lower,
                torch.cat([one, one, 9 * one], 1),
            )

        def objective(self, b, a):
            return b[:, 0] ** 2 / 2 + b.sum(1)

    a = torch.tensor([[-1.0, 0], [3, 0], [-torch.inf, 1], [1, 0], [10, 0]], dtype=torch.float64)
    found = InteriorPoint().solve(Box(), a, torch.zeros(5, 2, dtype=torch.float64))
    solved, none = int(Status.CONVERGED), int(Status.INFEASIBLE)
    assert found.status.tolist() == [solved, none, none, solved, none]
    torch.testing.assert_close(found.value[[0, 3]], torch.tensor([-1.0, 1.0], dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_newton_system_is_shifted_where_the_constraints_leave_negative_curvature():
    h = torch.diag_embed(torch.tensor([[1.0, -1, 2], [1, 1, -1]], dtype=torch.float64))
    j = torch.tensor([[[0.0, 1, 0]]], dtype=torch.float64).expand(2, -1, -1)
    system = newton_system(h, j, torch.ones(2, dtype=torch.float64))
    assert system.sound.all()
    assert system.delta[0] == 0
    assert system.delta[1] > 1
    r1, r2 = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    x, y = system.solve(r1, r2)
    torch.testing.assert_close((system.h @ x.unsqueeze(2)).squeeze(2) + y * j[:, 0], r1)
    torch.testing.assert_close((j @ x.unsqueeze(2)).squeeze(2), r2)
    assert take(system.delta, torch.tensor([0])).shape == (1,)
