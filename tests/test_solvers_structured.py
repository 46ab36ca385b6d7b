"""Solvers that use structure: what they find, against what is known or what outside solvers find."""

import math

import pytest
import torch
from test_solvers import Bowl, bowls
from torch import Tensor

from amortized.solvers import FISTA, Anderson, ProjectedGradient, Status

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
