"""Solvers that use structure: what they find, against what is known or what outside solvers find."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_solvers import Bowl, Rosenbrock, bowls, valleys
from torch import Tensor

from amortized.contract import QuadraticProgram
from amortized.solvers import (
    ADMM,
    CMAES,
    FISTA,
    LBFGS,
    Anderson,
    AugmentedLagrangian,
    GaussNewton,
    GradientDescent,
    MultiStart,
    Newton,
    ProjectedGradient,
    Solver,
    Status,
)
from amortized.solvers.external import QPSolver, SciPy
from amortized.solvers.smooth import gauss_newton
from amortized.solvers.structured import proximal

try:
    import qpsolvers  # here, not in a test: what it imports may set environment variables
except ModuleNotFoundError:
    qpsolvers = None

D = torch.float64


class Lasso:
    """(1/2m) ‖X b − a‖² + λ ‖b‖₁, over rows of targets a."""

    def __init__(self, m: int = 40, n: int = 12, weight: float = 0.05) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.weight = torch.randn(m, n, generator=g, dtype=D), weight

    def smooth(self, b: Tensor, a: Tensor) -> Tensor:
        return ((b @ self.x.T - a) ** 2).mean(1) / 2

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.smooth(b, a) + self.weight * b.abs().sum(1)

    def prox(self, b: Tensor, t: Tensor, a: Tensor) -> Tensor:
        return b.sign() * (b.abs() - self.weight * t.unsqueeze(1)).clamp(min=0)

    def data(self, size: int = 8) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        truth = torch.randn(size, 12, generator=g, dtype=D) * (torch.rand(size, 12, generator=g) < 0.3)
        return truth @ self.x.T + 0.1 * torch.randn(size, 40, generator=g, dtype=D), torch.zeros(size, 12, dtype=D)


@pytest.mark.parametrize(
    "solver", [FISTA(), FISTA(accelerate=False), FISTA(lr=10.0)], ids=["fista", "ista", "long step"]
)
def test_lasso_as_scikit_learn(solver: FISTA) -> None:
    from sklearn.linear_model import Lasso as Reference

    problem = Lasso()
    a, b = problem.data()
    found = solver.solve(problem, a, b)
    assert found.converged.all()
    for target, mine in zip(a, found.b, strict=True):
        fit = Reference(alpha=problem.weight, fit_intercept=False, tol=1e-12, max_iter=100000)
        best = torch.from_numpy(fit.fit(problem.x.numpy(), target.numpy()).coef_)
        torch.testing.assert_close(mine, best, atol=1e-5, rtol=0)
        assert torch.equal(mine != 0, best != 0)


def test_acceleration_pays() -> None:
    problem = Lasso(weight=0.01)
    a, b = problem.data()
    fast, slow = FISTA().solve(problem, a, b), FISTA(accelerate=False).solve(problem, a, b)
    assert (fast.iterations.double().mean() < slow.iterations.double().mean()).all()


class Boxed(Bowl):
    """A bowl over the box [−½, ½]."""

    def project(self, b: Tensor, a: object) -> Tensor:
        return b.clamp(-0.5, 0.5)


def test_projected_gradient_on_a_box() -> None:
    a, b = bowls()
    found = ProjectedGradient().solve(Boxed(), a, b + 3)
    assert found.converged.all()
    torch.testing.assert_close(found.b, a.at.clamp(-0.5, 0.5), atol=1e-5, rtol=0)


def test_a_bad_row_stays_alone_in_fista() -> None:
    problem = Lasso()
    a, b = problem.data()
    clean = FISTA().solve(problem, a, b)
    a[3] = math.nan
    found = FISTA().solve(problem, a, b)
    fine = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found.b[fine], clean.b[fine], atol=1e-6, rtol=0)
    assert found.diverged.tolist() == [i == 3 for i in range(8)]


def test_unrolled_ista_learns_its_steps() -> None:
    problem = Lasso()
    a, b = problem.data()
    solver = FISTA(steps=5, lr=0.1, learn_lr=True, accelerate=False)
    *_, last = solver.iterates(problem, a, b)
    problem.objective(last, a).mean().backward()
    assert (solver.log_lr.grad < 0).all()  # longer steps would have been better
    with torch.inference_mode():
        *_, again = solver.iterates(problem, *problem.data())
    torch.testing.assert_close(again, last.detach())


@pytest.mark.parametrize(
    ("solver", "lacks"), [(FISTA(), "smooth, prox"), (ProjectedGradient(), "project")], ids=lambda x: type(x).__name__
)
def test_a_solver_names_the_structure_it_misses(solver: FISTA, lacks: str) -> None:
    a, b = bowls()
    with pytest.raises(TypeError, match=f"{type(solver).__name__} needs more of a problem than Bowl has: {lacks}"):
        solver.solve(Bowl(), a, b)


class Contraction:
    """b = M b + a, with the spectral radius of M at 0.99."""

    def __init__(self, n: int = 10) -> None:
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=D)).Q
        self.m = (basis * torch.linspace(-0.9, 0.99, n, dtype=D)) @ basis.T

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        return b @ self.m + a


def test_anderson_is_faster_than_the_damped_iteration() -> None:
    problem, a = Contraction(), torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=D)
    best = torch.linalg.solve(torch.eye(10, dtype=D) - problem.m.T, a.T).T
    mixed = Anderson().solve(problem, a, torch.zeros_like(a))
    plain = Anderson(memory=0, steps=5000).solve(problem, a, torch.zeros_like(a))
    for found in (mixed, plain):
        assert found.converged.all()
        torch.testing.assert_close(found.b, best, atol=2e-4, rtol=0)
    assert (5 * mixed.evaluations < plain.evaluations).all()


def test_anderson_beyond_contraction_and_with_a_bad_row() -> None:
    class Cosine:
        def update(self, b: Tensor, a: Tensor) -> Tensor:
            return a * b.cos()

    a = torch.tensor([[1.0], [1.5], [math.nan], [3.0]], dtype=D)
    found = Anderson().solve(Cosine(), a, torch.zeros_like(a))
    assert found.status.tolist()[:3] == [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED]
    at = found.b[found.converged]
    torch.testing.assert_close(at, a[found.converged] * at.cos(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory", [0, 5])
def test_anderson_stops_at_an_error_that_the_problem_has(memory: int) -> None:
    class Largest(Contraction):
        def fixed_point_error(self, b: Tensor, moved: Tensor, a: Tensor) -> Tensor:
            return 1e3 * (moved - b).abs().amax(1)

    problem, a = Largest(), torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=D)
    found = Anderson(memory=memory, tol=1e-2, steps=5000).solve(problem, a, torch.zeros_like(a))
    assert found.converged.all()
    error = problem.fixed_point_error(found.b, problem.update(found.b, a), a)
    torch.testing.assert_close(found.residual, error)
    assert (error <= 1e-2).all()
    usual = Anderson(memory=memory, tol=1e-2, steps=5000).solve(Contraction(), a, torch.zeros_like(a))
    assert (found.iterations > usual.iterations).all()


class Programs:
    """½ bᵀPb + qᵀb within bounds on A b; contexts are q and the bounds, and where ``own`` also P and A."""

    def __init__(self, p: Tensor | None = None, a: Tensor | None = None) -> None:
        self.p, self.a = p, a

    def program(self, a: QuadraticProgram) -> QuadraticProgram:
        return a if self.p is None else QuadraticProgram(self.p, a.q, self.a, a.lower, a.upper)

    def objective(self, b: Tensor, a: QuadraticProgram) -> Tensor:
        p, q, *_ = self.program(a)
        return (0.5 * b * (p @ b.unsqueeze(2)).squeeze(2) + q * b).sum(1)


def programs(size: int, rank: int, shared: bool) -> tuple[Programs, QuadraticProgram, Tensor]:
    """Programs of 8 unknowns with 3 equalities, 4 inequalities above and a box; degenerate where ``rank`` < 8."""
    g = torch.Generator().manual_seed(0)
    rows = 1 if shared else size
    root = torch.randn(rows, 8, rank, generator=g, dtype=D)
    matrix = torch.cat([torch.randn(rows, 7, 8, generator=g, dtype=D), torch.eye(8, dtype=D).expand(rows, 8, 8)], 1)
    inside = torch.rand(size, 8, generator=g, dtype=D) - 0.5
    at = (matrix @ inside.unsqueeze(2)).squeeze(2)
    lower = torch.cat([at[:, :3], torch.full((size, 4), -math.inf, dtype=D), -torch.ones(size, 8, dtype=D)], 1)
    upper = torch.cat([at[:, :3], at[:, 3:7] + 0.1, torch.ones(size, 8, dtype=D)], 1)
    p = root @ root.mT
    a = QuadraticProgram(
        p.expand(size, 8, 8), torch.randn(size, 8, generator=g, dtype=D), matrix.expand(size, -1, -1), lower, upper
    )
    return (Programs(p[0], matrix[0]) if shared else Programs()), a, torch.zeros(size, 8, dtype=D)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("rank", [8, 3], ids=["strictly convex", "degenerate"])
def test_admm_certifies_its_optimum(rank: int, shared: bool) -> None:
    problem, a, b = programs(20, rank, shared)
    solver = ADMM(chunk=7)
    found = solver.solve(problem, a, b)
    y = found.dual
    assert found.converged.all()
    proof = solver.certify(problem, a, found.b, y)
    assert (proof.primal < 2e-6).all()
    assert (proof.dual < 2e-6).all()
    assert (proof.gap < 1e-4).all()
    torch.testing.assert_close(found.value, problem.objective(found.b, a))
    again = solver.solve(problem, a, found.b, dual=y)
    assert (again.evaluations <= 1).all()


@pytest.mark.parametrize("rank", [8, 3], ids=["strictly convex", "degenerate"])
def test_admm_as_qpsolvers(rank: int) -> None:
    if qpsolvers is None:
        pytest.skip("qpsolvers is not installed")
    problem, a, b = programs(5, rank, shared=True)
    found, best = ADMM().solve(problem, a, b), QPSolver().solve(problem, a, b)
    assert best.converged.all()
    torch.testing.assert_close(found.value, best.value, atol=1e-5, rtol=1e-5)
    if rank == 8:
        torch.testing.assert_close(found.b, best.b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_admm_keeps_rows_apart_and_says_which_have_no_solution(shared: bool) -> None:
    problem, a, b = programs(8, 8, shared)
    clean = ADMM().solve(problem, a, b)
    p, q, matrix, lower, upper = (leaf.clone() for leaf in a)
    q[1] = math.nan
    lower[2, 5], upper[2, 5] = 1.0, 0.5  # a bound above the other
    lower[4, 8:], upper[4, 8:] = 5.0, 6.0  # a box that the equalities do not meet
    upper[6, 0] = math.nan
    fine, ends = [0, 3, 5, 7], [0, Status.DIVERGED, Status.INFEASIBLE, 0, Status.INFEASIBLE, 0, Status.DIVERGED, 0]
    if not shared:
        p[3, 2, 1], p[5] = math.nan, -p[5]  # not a number; not convex
        fine, ends[3], ends[5] = [0, 7], Status.DIVERGED, Status.DIVERGED
    found = ADMM(steps=2000).solve(problem, QuadraticProgram(p, q, matrix, lower, upper), b)
    assert found.status.tolist() == ends
    assert found.infeasible.tolist() == [end == Status.INFEASIBLE for end in ends]
    torch.testing.assert_close(found.b[fine], clean.b[fine], atol=1e-5, rtol=0)


def test_admm_does_not_raise_for_a_shared_matrix_that_is_not_a_number() -> None:
    problem, a, b = programs(3, 8, shared=True)
    problem.p = problem.p * math.nan
    assert ADMM().solve(problem, a, b).diverged.all()


def test_admm_says_which_objectives_fall_for_ever() -> None:
    p, q = torch.zeros(3, 2, 2, dtype=D), torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]], dtype=D)
    matrix, zero = torch.eye(2, dtype=D).expand(3, 2, 2), torch.zeros(3, 2, dtype=D)
    a = QuadraticProgram(p, q, matrix, zero, torch.full((3, 2), math.inf, dtype=D))
    found = ADMM().solve(Programs(), a, zero + 1)
    assert found.status.tolist() == [0, Status.INFEASIBLE, 0]


def test_admm_proves_nothing_of_programs_that_are_feasible_but_far_away() -> None:
    problem, a, b = programs(20, 8, shared=False)
    at = (a.P.new_ones(20, 1, 8) @ a.A.mT).squeeze(1) * 50  # b = 50 is feasible, and little else
    found = ADMM().solve(problem, a._replace(lower=at - 1e-3, upper=at + 1e-3), b)
    assert found.converged.all()
    torch.testing.assert_close(found.b, torch.full_like(b, 50), atol=0.1, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4], ids=["small", "plain", "large"])
def test_admm_in_other_units_and_in_single_precision(unit: float, shared: bool) -> None:
    problem, a, b = programs(20, 8, shared)
    best = ADMM(tol=1e-9).solve(problem, a, b).b
    if shared:
        problem.p = unit * problem.p
    scaled = a._replace(P=unit * a.P, q=unit * a.q)
    found = ADMM(rtol=1e-6).solve(problem, scaled, b)
    assert found.converged.all()
    torch.testing.assert_close(found.b, best, atol=1e-4, rtol=0)
    if shared:
        problem.p, problem.a = problem.p.float(), problem.a.float()
    single = ADMM().solve(problem, QuadraticProgram(*(leaf.float() for leaf in scaled)), b.float())
    assert single.converged.all()
    assert {single.b.dtype, single.value.dtype, single.residual.dtype} == {torch.float32}
    assert single.iterations.max() <= 1000
    torch.testing.assert_close(single.b.double(), best, atol=1e-2, rtol=0)


def test_admm_in_badly_scaled_coordinates() -> None:
    problem, a, b = programs(20, 8, shared=False)
    columns, rows = 10 ** torch.linspace(-2, 2, 8, dtype=D), 10 ** torch.linspace(-3, 3, 15, dtype=D)
    scaled = QuadraticProgram(
        columns.unsqueeze(1) * a.P * columns, columns * a.q, rows.unsqueeze(1) * a.A * columns, rows * a.lower, rows * a.upper
    )  # fmt: skip
    found = ADMM().solve(problem, scaled, b)
    assert found.converged.all()
    assert found.iterations.double().mean() <= 700
    torch.testing.assert_close(found.value, ADMM().solve(problem, a, b).value, atol=1e-3, rtol=0)


class DC3:
    """The convex family of Donti, Rolnick & Kolter (2021): 100 unknowns, 50 equalities to x, 50 inequalities."""

    def __init__(self) -> None:
        draw = np.random.RandomState(17)
        self.p, self.q = (torch.from_numpy(v) for v in (np.diag(draw.rand(100)), draw.rand(100)))
        equal, x, above = (
            draw.normal(size=(50, 100)),
            draw.uniform(-1, 1, size=(10000, 50)),
            draw.normal(size=(50, 100)),
        )
        self.x, self.a = torch.from_numpy(x), torch.from_numpy(np.concatenate([equal, above]))
        self.h = torch.from_numpy(np.abs(above @ np.linalg.pinv(equal)).sum(1))

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (0.5 * (b @ self.p) * b + self.q * b).sum(1)

    def program(self, a: Tensor) -> QuadraticProgram:
        free, h = torch.full_like(a, -math.inf), self.h.expand(len(a), 50)
        bounds = torch.cat([a, free], 1), torch.cat([a, h], 1)
        return QuadraticProgram(self.p, self.q.expand(len(a), 100), self.a, *bounds)


def test_admm_on_the_programs_of_dc3() -> None:
    problem = DC3()
    a = problem.x[-833:]
    solver = ADMM()
    found = solver.solve(problem, a, torch.zeros(833, 100, dtype=D))
    assert found.converged.all()
    assert found.iterations.max() <= 80
    assert abs(found.value.mean() + 15.05) < 0.01  # the published mean optimum
    assert solver.certify(problem, a, found.b, found.dual).gap.max() < 1e-3


def test_cma_es_needs_no_gradient() -> None:
    class Kinked(Rosenbrock):
        def objective(self, b: Tensor, a: Tensor) -> Tensor:
            return super().objective(b.detach(), a) + (b.detach()[:, 0] - a[:, 0]).abs()

    a, b = valleys(10)
    torch.manual_seed(0)
    found = CMAES().solve(Kinked(), a, b)
    assert found.converged.all()
    torch.testing.assert_close(found.b, torch.cat([a, a**2], 1), atol=1e-4, rtol=0)
    assert (found.value <= Kinked().objective(b, a)).all()


def test_cma_es_walks_out_of_infinity_and_keeps_rows_apart() -> None:
    class Half:
        def objective(self, b: Tensor, a: Tensor) -> Tensor:
            return torch.where(b[:, 0] > 0, ((b - 1) ** 2).sum(1), torch.nan) + 0 * a[:, 0]

    a = torch.tensor([[0.0], [math.nan], [0.0]], dtype=D)
    torch.manual_seed(0)
    found = CMAES().solve(Half(), a, torch.full((3, 2), 0.1, dtype=D))
    assert found.status.tolist() == [0, Status.DIVERGED, 0]
    torch.testing.assert_close(found.b[[0, 2]], torch.ones(2, 2, dtype=D), atol=1e-4, rtol=0)


class Waves:
    """b² + a (1 − cos 5b) summed: a minimum 0 at 0 and many others."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (0.1 * b**2 + a * (1 - (5 * b).cos())).sum(1)


def test_multistart_finds_what_one_start_misses() -> None:
    a = 0.2 + torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=D)
    b = torch.full((12, 1), 2.6, dtype=D)
    torch.manual_seed(0)
    one = LBFGS().solve(Waves(), a, b)
    found = MultiStart(LBFGS(), starts=100, spread=3.0).explore(Waves(), a, b)
    assert (one.value > 0.1).all()
    assert found.best.converged.all()
    torch.testing.assert_close(found.best.value, torch.zeros(12, dtype=D), atol=1e-9, rtol=0)
    assert found.values.shape == (12, 100)
    torch.testing.assert_close(found.values[:, 0], one.value)
    torch.testing.assert_close(found.share, (found.values < 1e-6).double().mean(1))
    assert (found.share < 0.5).all()
    assert (found.best.evaluations > 100).all()
    seen: list[Tensor] = []
    MultiStart(LBFGS(), starts=3).solve(Waves(), a, b, trace=lambda count, b, best: seen.append(best))
    assert seen[-1].shape == (12,)


def test_scipy_agrees() -> None:
    pytest.importorskip("scipy")
    a, b = valleys(4)
    found = SciPy().solve(Rosenbrock(), a, b)
    assert found.converged.all()
    torch.testing.assert_close(found.b, LBFGS().solve(Rosenbrock(), a, b).b, atol=1e-5, rtol=0)
    assert SciPy().solve(Rosenbrock(), a[:0], b[:0]).b.shape == (0, 2)


@pytest.mark.parametrize(
    "solver", [MultiStart(LBFGS(), starts=2), CMAES(), ADMM(), Anderson(), FISTA()], ids=lambda s: type(s).__name__
)
def test_empty_batches(solver: Solver) -> None:
    problem, a, b = programs(3, 8, shared=False)
    problem.smooth, problem.prox, problem.update = problem.objective, lambda b, t, a: b, lambda b, a: b
    found = solver.solve(problem, QuadraticProgram(*(leaf[:0] for leaf in a)), b[:0])
    assert found.b.shape == (0, 8)
    assert found.status.shape == (0,)


class Circle:
    """The point of the unit circle right of x ≥ y + ½ that is nearest to ``a``."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return ((b - a) ** 2).sum(1)

    def equality(self, b: Tensor, a: Tensor) -> Tensor:
        return (b * b).sum(1, keepdim=True) - 1

    def inequality(self, b: Tensor, a: Tensor) -> Tensor:
        return b[:, 1:] - b[:, :1] + 0.5


def test_augmented_lagrangian_on_a_circle() -> None:
    a = torch.tensor([[2.0, 0.1], [1.0, -1.0], [0.3, 2.0], [math.nan, 0.0]], dtype=D)
    found = AugmentedLagrangian().solve(Circle(), a, torch.tensor([[0.5, -0.5]], dtype=D).repeat(4, 1))
    assert found.status.tolist() == [0, 0, 0, Status.DIVERGED]
    # Inactive inequality: the projection on the circle. Active: where the line y = x − ½ cuts it.
    cut = torch.tensor([(1 + math.sqrt(7)) / 4, (math.sqrt(7) - 1) / 4], dtype=D)
    best = torch.stack([a[0] / a[0].norm(), a[1] / a[1].norm(), cut])
    torch.testing.assert_close(found.b[:3], best, atol=1e-4, rtol=0)


class Wavy(DC3):
    """DC3's non-convex family: sin b in place of b in the linear term."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (0.5 * (b @ self.p) * b + self.q * b.sin()).sum(1)

    def equality(self, b: Tensor, a: Tensor) -> Tensor:
        return b @ self.a[:50].T - a

    def inequality(self, b: Tensor, a: Tensor) -> Tensor:
        return b @ self.a[50:].T - self.h


def test_augmented_lagrangian_on_the_wavy_programs_of_dc3() -> None:
    problem = Wavy()
    a = problem.x[-40:]
    found = AugmentedLagrangian().solve(problem, a, torch.zeros(40, 100, dtype=D))
    assert found.converged.all()
    assert problem.equality(found.b, a).abs().max() < 1e-5
    assert problem.inequality(found.b, a).max() < 1e-5
    assert abs(found.value.mean() + 11.59) < 0.2  # IPOPT's published mean over all 833


def test_augmented_lagrangian_names_what_it_misses() -> None:
    with pytest.raises(TypeError, match="than Bowl has: equality or inequality"):
        AugmentedLagrangian().solve(Bowl(), *bowls())


@pytest.mark.parametrize(
    "solver", [FISTA(), ProjectedGradient(), ADMM(), Anderson(), Newton(), AugmentedLagrangian()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_order_and_company_do_not_matter(solver: Solver) -> None:
    problem, a, b = programs(9, 8, shared=True)
    problem.smooth, problem.prox = problem.objective, lambda b, t, a: b.clamp(-1, 1)
    problem.project = lambda b, a: b.clamp(-1, 1)
    problem.update = lambda b, a: 0.5 * b.cos() + 0.1 * a.q
    problem.equality = lambda b, a: b.sum(1, keepdim=True) - 1
    found = solver.solve(problem, a, b)
    assert found.converged.all()
    order = torch.tensor([4, 8, 0, 2, 6, 1, 3, 5, 7])
    permuted = solver.solve(problem, QuadraticProgram(*(leaf[order] for leaf in a)), b[order])
    torch.testing.assert_close(permuted.b, found.b[order], atol=2e-6, rtol=0)
    parts = [slice(0, 4), slice(4, 9)]
    apart = [solver.solve(problem, QuadraticProgram(*(leaf[part] for leaf in a)), b[part]).b for part in parts]
    torch.testing.assert_close(torch.cat(apart), found.b, atol=2e-6, rtol=0)


def random_points(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=D)


@pytest.mark.parametrize(
    ("prox", "penalty"),
    [(proximal.l1, lambda x: x.abs().sum((1, 2))), (proximal.group, lambda x: x.norm(dim=2).sum(1))],
    ids=["l1", "group"],
)
def test_a_proximal_map_minimizes(prox: object, penalty: object) -> None:
    b, t = random_points(5, 4, 3), torch.tensor([0.1, 0.5, 1.0, 2.0, 100.0], dtype=D)

    def total(x: Tensor) -> Tensor:
        return penalty(x) + ((x - b) ** 2).sum((1, 2)) / (2 * t)

    x = prox(b, t)
    for scale in (1e-3, 0.1, 1.0):
        for other in (x + scale * random_points(5, 4, 3), x * (1 - scale), x + scale * (b - x)):
            assert (total(x) <= total(other) + 1e-12).all()
    assert (x[4] == 0).all()


@pytest.mark.parametrize(
    ("project", "inside"),
    [
        (proximal.simplex, lambda z: torch.softmax(z, 1)),
        (proximal.ball, lambda z: z / (1 + z.norm(dim=1, keepdim=True))),
        (lambda b: proximal.box(b, -0.5, 1.0), lambda z: 0.25 + 0.75 * z.tanh()),
    ],
    ids=["simplex", "ball", "box"],
)
def test_a_projection_is_the_nearest_point(project: object, inside: object) -> None:
    b = random_points(50, 6)
    x = project(b)
    torch.testing.assert_close(project(x), x)
    # x is nearest in a convex set just if no point y of it makes an acute angle: (b − x)·(y − x) ≤ 0.
    for y in inside(10 * random_points(40, 6)):
        assert (((b - x) * (y - x)).sum(1) <= 1e-12).all()


def test_portfolios_on_the_simplex() -> None:
    class Portfolio(Programs):
        def project(self, b: Tensor, a: object) -> Tensor:
            return proximal.simplex(b)

    problem, a, b = programs(10, 8, shared=False)
    problem.__class__ = Portfolio
    found = ProjectedGradient().solve(problem, a, b)
    assert found.converged.all()
    assert (found.b >= 0).all()
    torch.testing.assert_close(found.b.sum(1), torch.ones(10, dtype=D))
    grad = (a.P @ found.b.unsqueeze(2)).squeeze(2) + a.q
    # At the optimum the gradient is least, and alike, where there is weight.
    least = grad.amin(1, keepdim=True)
    assert ((grad - least) * found.b).sum(1).max() < 1e-5


class Sphere(NamedTuple):
    centres: Tensor
    heights: Tensor


class SoftDistance:
    """−γ log Σ exp(−c_i / γ), c_i = ½ d(b / |b|, centre_i)² + height_i on the sphere, plus (|b| − 1)²."""

    def objective(self, b: Tensor, a: Sphere) -> Tensor:
        length = b.norm(dim=1, keepdim=True)
        x = (b / length).unsqueeze(1)
        angle = torch.atan2(torch.linalg.cross(a.centres, x.expand_as(a.centres)).norm(dim=2), (a.centres * x).sum(2))
        costs = 0.5 * angle**2 + a.heights
        return -0.5 * (-costs / 0.5).logsumexp(1) + (length[:, 0] - 1) ** 2


def test_multistart_finds_the_global_minimum_on_the_sphere() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(30, 4, 3, generator=g, dtype=D), dim=2)
    a = Sphere(centres, 0.7 * torch.rand(30, 4, generator=g, dtype=D))
    k = torch.arange(4000, dtype=D) + 0.5
    polar, turn = torch.acos(1 - k / 2000), math.pi * (1 + 5**0.5) * k
    grid = torch.stack([turn.cos() * polar.sin(), turn.sin() * polar.sin(), polar.cos()], 1)
    best = torch.empty(30, dtype=D)
    for i in range(30):
        here = Sphere(centres[i : i + 1].expand(4000, 4, 3), a.heights[i : i + 1].expand(4000, 4))
        best[i] = SoftDistance().objective(grid, here).min()
    torch.manual_seed(0)
    found = MultiStart(LBFGS(), starts=32).explore(SoftDistance(), a, torch.ones(30, 3, dtype=D))
    assert found.best.converged.all()
    assert (found.best.value <= best + 1e-9).all()
    assert (found.share > 0).all()
    one = LBFGS().solve(SoftDistance(), a, torch.ones(30, 3, dtype=D))
    assert (one.value > found.best.value + 1e-3).any()


@pytest.mark.parametrize("solver", [LBFGS(), LBFGS(dense=0), Newton()], ids=["bfgs", "lbfgs", "newton"])
def test_logistic_regression_as_scikit_learn(solver: Solver) -> None:
    from sklearn.linear_model import LogisticRegression

    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g, dtype=D)
    odds = torch.sigmoid(torch.randn(6, 5, generator=g, dtype=D) @ x.T)
    labels = (torch.rand(6, 60, generator=g, dtype=D) < odds).to(D)

    class Logistic:
        def objective(self, b: Tensor, a: Tensor) -> Tensor:
            z = b @ x.T
            return (torch.nn.functional.softplus(z) - a * z).sum(1) + 0.5 * (b * b).sum(1)

    found = solver.solve(Logistic(), labels, torch.zeros(6, 5, dtype=D))
    assert found.converged.all()
    fits = [LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10).fit(x.numpy(), y.numpy()).coef_ for y in labels]
    torch.testing.assert_close(found.b, torch.from_numpy(np.concatenate(fits)), atol=1e-5, rtol=0)


def test_admm_traces_its_objective() -> None:
    problem, a, b = programs(6, 8, shared=True)
    seen: list[tuple[int, Tensor]] = []
    for solver, first in ((ADMM(polish=False), 11), (ADMM(), 1)):
        seen.clear()
        found = solver.solve(problem, a, b, trace=lambda count, b, best: seen.append((count, best)))
        assert [count for count, _ in seen] == [first + 10 * i for i in range(len(seen))]
        torch.testing.assert_close(seen[-1][1], found.value)
    torch.testing.assert_close(ADMM().solve(problem, a, b).value, found.value, atol=1e-5, rtol=0)


class Small:
    """A problem in small units: its objective, and the parts of it, times 1e-6."""

    def __init__(self, problem: object) -> None:
        self.problem = problem
        for name in ("objective", "smooth"):
            if part := getattr(problem, name, None):
                setattr(self, name, lambda b, a, part=part: 1e-6 * part(b, a))

    def __getattr__(self, name: str) -> object:
        return getattr(self.problem, name)

    def prox(self, b: Tensor, t: Tensor, a: Tensor) -> Tensor:
        return self.problem.prox(b, 1e-6 * t, a)

    def residuals(self, b: Tensor, a: Tensor) -> Tensor:
        return 1e-3 * self.problem.residuals(b, a)


class Fit:
    """½ ‖(10 (y − x²), a − x)‖²."""

    def residuals(self, b: Tensor, a: Tensor) -> Tensor:
        return torch.stack([10 * (b[:, 1] - b[:, 0] ** 2), a[:, 0] - b[:, 0]], 1)

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.residuals(b, a).square().sum(1) / 2


CIRCLE = torch.tensor([[2.0, 0.1], [1.0, -1.0], [0.3, 2.0]], dtype=D), torch.tensor([[0.5, -0.5]], dtype=D).repeat(3, 1)
UNITS = {
    "lbfgs": (LBFGS(dense=0), Rosenbrock(), valleys()),
    "bfgs": (LBFGS(), Rosenbrock(), valleys()),
    "bfgs, float32": (LBFGS(), Bowl(), bowls(dtype=torch.float32)),
    "gradient descent": (GradientDescent(lr=0.5, steps=3000), Bowl(), bowls()),
    "newton": (Newton(), Rosenbrock(), valleys()),
    "gauss-newton": (GaussNewton(), Fit(), valleys()),
    "fista": (FISTA(), Lasso(), Lasso().data()),
    "projected": (ProjectedGradient(), Boxed(), bowls()),
    "augmented lagrangian": (AugmentedLagrangian(), Circle(), CIRCLE),
    "scipy": (SciPy(), Rosenbrock(), [leaf[:3] for leaf in valleys()]),
}


@pytest.mark.parametrize("name", list(UNITS))
def test_objectives_in_small_units_are_solved_as_well(name: str) -> None:
    if name == "scipy":
        pytest.importorskip("scipy")
    solver, problem, (a, b) = UNITS[name]
    large = solver.solve(problem, a, b)
    if isinstance(solver, GradientDescent):
        solver = GradientDescent(lr=1e6 * solver.lr, steps=solver.steps)
    small = solver.solve(Small(problem), a, b)
    assert large.converged.all()
    assert small.converged.all()
    assert not small.idle.any()
    torch.testing.assert_close(small.b, large.b, atol=2e-3, rtol=0)
    torch.testing.assert_close(1e6 * small.value, large.value, atol=2e-5, rtol=0)


def test_a_row_that_has_nothing_left_to_do_is_idle() -> None:
    a, b = valleys()
    b[:20] = torch.cat([a, a**2], 1)[:20]
    found = LBFGS().solve(Rosenbrock(), a, b)
    assert found.idle.tolist() == [i < 20 for i in range(40)]
    again = LBFGS().solve(Rosenbrock(), a, found.b)  # from what it can tell from a minimum no better
    assert again.converged.all()


class Curve:
    """a ≈ b₀ exp(−b₁ t) at 30 times t."""

    def residuals(self, b: Tensor, a: Tensor) -> Tensor:
        return b[:, :1] * (-b[:, 1:] * torch.linspace(0, 3, a.shape[1], dtype=D)).exp() - a

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.residuals(b, a).square().sum(1) / 2


class Backward(torch.autograd.Function):
    """The identity, without a forward derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class OneWay(Curve):
    def residuals(self, b: Tensor, a: Tensor) -> Tensor:
        return super().residuals(Backward.apply(b), a)


def test_the_jacobian_is_that_of_either_mode() -> None:
    g = torch.Generator().manual_seed(0)
    b, a = 1 + torch.rand(5, 2, generator=g, dtype=D), torch.randn(5, 30, generator=g, dtype=D)
    for problem, forward in ((Curve(), True), (OneWay(), False)):
        r, j = gauss_newton.jacobian_of(problem, b, a)
        assert (type(problem) not in gauss_newton._REVERSE) == forward
        torch.testing.assert_close(r, problem.residuals(b, a))
        times = torch.linspace(0, 3, 30, dtype=D)
        fall = (-b[:, 1:] * times).exp()
        torch.testing.assert_close(j, torch.stack([fall, -b[:, :1] * times * fall], 2))
        assert GaussNewton().solve(problem, problem.residuals(b, 0 * a), b + 0.1).converged.all()
