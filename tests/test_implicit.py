"""The end of a solver as a function of what its problem sees: against finite differences, unrolling, and closed forms."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from amortized import AmortizedModule
from amortized.contract import QuadraticProgram
from amortized.solvers import (
    ADMM,
    FISTA,
    LBFGS,
    Anderson,
    AugmentedLagrangian,
    GradientDescent,
    Implicit,
    MultiStart,
    Newton,
    ProjectedGradient,
    Solver,
)
from amortized.solvers.implicit import gmres, root

D = torch.float64


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Soft:
    """Σ log cosh(W b) + ½ ‖b‖² − aᵀ b, strictly convex and not quadratic; W may be trained."""

    def __init__(self, n: int = 4) -> None:
        self.w = points(6, n) / n**0.5

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.smooth(b, a)

    def smooth(self, b: Tensor, a: Tensor) -> Tensor:
        return (b @ self.w.T).cosh().log().sum(1) + (b * b / 2 - a * b).sum(1)

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        return a - (b @ self.w.T).tanh() @ self.w / 4


class Sparse(Soft):
    """The same with 0.3 ‖b‖₁."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.smooth(b, a) + 0.3 * b.abs().sum(1)

    def prox(self, b: Tensor, t: Tensor, a: Tensor) -> Tensor:
        return b.sign() * (b.abs() - 0.3 * t.unsqueeze(1)).clamp(min=0)


class Boxed(Soft):
    """The same in the box [−½, ½]."""

    def project(self, b: Tensor, a: Tensor) -> Tensor:
        return b.clamp(-0.5, 0.5)


SOLVERS = {
    "lbfgs": (LBFGS(tol=1e-11), Soft),
    "newton": (Newton(tol=1e-11), Soft),
    "starts": (MultiStart(LBFGS(tol=1e-11), starts=2), Soft),
    "anderson": (Anderson(tol=1e-12), Soft),
    "fista": (FISTA(tol=1e-10), Sparse),
    "projected": (ProjectedGradient(tol=1e-10), Boxed),
}


@pytest.mark.parametrize("name", list(SOLVERS))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    solver, kind = SOLVERS[name]
    problem, a = kind(), points(3, 4, seed=1).requires_grad_()
    weights = problem.w.clone().requires_grad_()

    def end(a: Tensor, w: Tensor) -> Tensor:
        problem.w = w
        (b,) = Implicit(solver).iterates(problem, a, torch.zeros(3, 4, dtype=D))
        return b

    assert torch.autograd.gradcheck(end, (a, weights), eps=1e-4, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    ("solver", "unrolled", "kind"),
    [
        (LBFGS(tol=1e-11), GradientDescent(lr=0.2, steps=400), Soft),
        (Anderson(tol=1e-12), Anderson(steps=200), Soft),
        (FISTA(tol=1e-10), FISTA(lr=0.2, steps=400, accelerate=False), Sparse),
    ],
    ids=["stationary", "fixed point", "proximal"],
)
def test_gradients_are_those_of_unrolling(solver: Solver, unrolled: Solver, kind: type) -> None:
    gradients = []
    for way in (Implicit(solver), unrolled):
        problem, a = kind(), points(5, 4, seed=1).requires_grad_()
        problem.w.requires_grad_()
        *_, b = way.iterates(problem, a, torch.zeros(5, 4, dtype=D))
        gradients.append(torch.autograd.grad((b * points(5, 4, seed=2)).sum(), (a, problem.w)))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-5)


class Layer:
    """½ bᵀPb + qᵀb within bounds on A b: a projection of −q where P = 1; all of it may be differentiated."""

    def __init__(self, p: Tensor, a: Tensor) -> None:
        self.p, self.a = p, a

    def program(self, a: QuadraticProgram) -> QuadraticProgram:
        return a._replace(P=self.p, A=self.a)

    def objective(self, b: Tensor, a: QuadraticProgram) -> Tensor:
        p = self.p if self.p.ndim == 3 else self.p.expand(len(b), *self.p.shape)
        return (b * (p @ b.unsqueeze(2)).squeeze(2) / 2 + a.q * b).sum(1)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("flat", [False, True], ids=["definite", "flat"])
def test_a_program_is_a_layer(own: bool, flat: bool) -> None:
    rows = (3,) if own else ()
    half, turn = points(*rows, 4, 3 if flat else 4), points(*rows, 3, 4, seed=1)
    box = torch.eye(4, dtype=D).expand(*rows, 4, 4)
    p, matrix = half @ half.mT, torch.cat([turn, box], -2)
    inside = 0.3 * points(3, 4, seed=2).tanh()
    at = (turn @ inside.unsqueeze(2)).squeeze(2)
    slack = torch.rand(3, 7, generator=torch.Generator().manual_seed(3), dtype=D)
    equal, q = at[:, :1], 2 * points(3, 4, seed=4)
    low = torch.cat([at[:, 1:2] - slack[:, :1], torch.full((3, 1), -math.inf, dtype=D), slack[:, 3:] - 1.4], 1)
    high = torch.cat([at[:, 1:] + slack[:, 1:3] / 5, 0.4 + slack[:, 3:]], 1)
    inputs = [x.clone().requires_grad_() for x in (half, matrix, q, equal, high)]

    def end(half: Tensor, matrix: Tensor, q: Tensor, equal: Tensor, high: Tensor) -> Tensor:
        layer = Layer(half @ half.mT, matrix)
        bounds = torch.cat([equal, low], 1), torch.cat([equal, high], 1)
        a = QuadraticProgram(p.expand(3, 4, 4), q, matrix.expand(3, 7, 4), *bounds)
        (b,) = Implicit(ADMM(tol=1e-11, rtol=0, steps=20000)).iterates(layer, a, torch.zeros(3, 4, dtype=D))
        return b

    b = end(*inputs)
    assert ((high - (matrix @ b.unsqueeze(2)).squeeze(2)[:, 1:]).abs() < 1e-8).any()  # something is active
    assert torch.autograd.gradcheck(end, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_a_constrained_solution_is_differentiable_at_its_end() -> None:
    class Disc(Soft):
        def equality(self, b: Tensor, a: Tensor) -> Tensor:
            return b[:, :2].sum(1, keepdim=True) - a[:, :1]

        def inequality(self, b: Tensor, a: Tensor) -> Tensor:
            return torch.stack([b[:, 2:].square().sum(1) - 0.04, b[:, 0] - 3], 1)

    problem, a = Disc(), (3 * points(3, 4, seed=1)).requires_grad_()
    layer = Implicit(AugmentedLagrangian(inner=Newton(), tol=1e-10))

    def end(a: Tensor) -> Tensor:
        (b,) = layer.iterates(problem, a, torch.zeros(3, 4, dtype=D))
        return b

    assert (problem.inequality(end(a), a)[:, 0].abs() < 1e-8).any()
    assert torch.autograd.gradcheck(end, a, eps=1e-5, atol=1e-5, rtol=1e-5, fast_mode=True)


def saved_bytes(way: Solver, problem: Soft, a: Tensor) -> int:
    """Memory that a graph holds for its backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        *_, b = way.iterates(problem, a, torch.zeros_like(a))
    assert b.requires_grad
    return sum(kept.values())


def test_memory_does_not_grow_with_steps() -> None:
    problem, a = Soft(), points(50, 4, seed=1).requires_grad_()
    few, many = (saved_bytes(Implicit(Anderson(steps=s, memory=0, tol=0.0)), problem, a) for s in (5, 100))
    assert few == many
    short, long = (saved_bytes(Anderson(steps=s, memory=0), problem, a) for s in (5, 100))
    assert long > 15 * short > 15 * few


def test_many_unknowns_by_products_as_few_by_a_factor() -> None:
    n = 130
    matrix = points(6, n, n) / n**0.5
    matrix = matrix @ matrix.mT + 0.2 * torch.eye(n, dtype=D)
    v = points(6, n, seed=1)
    u = gmres(lambda x: (matrix @ x.unsqueeze(2)).squeeze(2), v, products=500, tol=1e-10)
    torch.testing.assert_close(u, torch.linalg.solve(matrix, v), atol=1e-7, rtol=0)
    skew = matrix + points(6, n, n, seed=2) / n  # not symmetric
    v[2] = 0
    u = gmres(lambda x: (skew @ x.unsqueeze(2)).squeeze(2), v, products=500, tol=1e-10)
    torch.testing.assert_close(u, torch.linalg.solve(skew, v), atol=1e-7, rtol=0)

    theta = torch.ones(6, 1, dtype=D, requires_grad=True)
    w = root(lambda w: (matrix @ w.unsqueeze(2)).squeeze(2) - theta * v, torch.linalg.solve(matrix, v), products=500)
    (grad,) = torch.autograd.grad(w.sum(), theta)
    torch.testing.assert_close(grad.squeeze(1), torch.linalg.solve(matrix, v).sum(1), atol=1e-6, rtol=1e-6)


def test_a_singular_row_passes_nothing_on_and_touches_no_other() -> None:
    slope = torch.tensor([[1.0], [0.0], [2.0]], dtype=D)
    theta = torch.ones(3, 1, dtype=D, requires_grad=True)
    w = root(lambda w: slope * w - theta, torch.tensor([[1.0], [7.0], [0.5]], dtype=D))
    (grad,) = torch.autograd.grad(w.sum(), theta)
    assert grad.flatten().tolist() == [1.0, 0.0, 0.5]
    assert w.flatten().tolist() == [1.0, 7.0, 0.5]


def test_an_anchor_is_the_proximal_map_and_lets_the_start_learn() -> None:
    problem, a = Boxed(), points(3, 4, seed=1)
    start = points(3, 4, seed=2).requires_grad_()
    layer = Implicit(LBFGS(tol=1e-11), anchor=2.0)

    def end(start: Tensor) -> Tensor:
        (b,) = layer.iterates(problem, a, start)
        return b

    assert torch.autograd.gradcheck(end, start, eps=1e-4, atol=1e-6)
    b = end(start).detach().requires_grad_()
    (slope,) = torch.autograd.grad(problem.objective(b, a).sum(), b)
    torch.testing.assert_close(slope, 2 * (start - b).detach(), atol=1e-8, rtol=0)
    (without,) = Implicit(LBFGS()).iterates(problem, a, start)
    assert torch.autograd.grad(without.sum(), start, allow_unused=True) == (None,)  # only a start


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class First(nn.Linear):
    """Linear in the first part of a context."""

    def forward(self, a: Pair) -> Tensor:
        return super().forward(a.x)


class Equilibrium(AmortizedModule):
    """A deep equilibrium model: the fixed point of tanh(W b + x), fitted to y."""

    def __init__(self, refine: Solver) -> None:
        super().__init__(First(3, 3), refine=refine)
        self.w = nn.Parameter(torch.eye(3) / 2)

    def update(self, b: Tensor, a: Pair) -> Tensor:
        return (b @ self.w.T + a.x).tanh()

    def objective(self, b: Tensor, a: Pair) -> Tensor:
        return (b - a.y).square().sum(1)


def test_a_module_learns_through_its_refinement() -> None:
    torch.manual_seed(0)
    module = Equilibrium(Implicit(Anderson(tol=1e-6)))
    a = Pair(torch.randn(8, 3), 0.3 * torch.rand(8, 3))
    optimizer = torch.optim.Adam([module.w], lr=0.05)
    losses = []
    for _ in range(60):
        loss = module.amortized_step(a).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.inference_mode():
        assert torch.isfinite(module(a)).all()


def test_rows_without_a_solution_get_no_gradient() -> None:
    problem = Soft()
    a = points(4, 4, seed=1)
    a[2] = math.nan
    a.requires_grad_()
    (b,) = Implicit(LBFGS(tol=1e-9)).iterates(problem, a, torch.zeros(4, 4, dtype=D))
    (grad,) = torch.autograd.grad(b.nan_to_num().sum(), a)
    assert torch.isfinite(grad[[0, 1, 3]]).all()
    assert (grad[[0, 1, 3]] != 0).all()
    assert (grad[2].nan_to_num() == 0).all()


@pytest.mark.parametrize("wrong", [{"anchor": -1.0}, {"products": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="anchor must not be negative and products positive"):
        Implicit(LBFGS(), **wrong)
