"""Certificates: never below the true gap, exact where an active set is proven, and what they refuse."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from amortized.certificates import Duality, FixedPoint, Gradient
from amortized.contract import QuadraticProgram

D = torch.float64


class Programs:
    """Programs that are their own contexts."""

    def program(self, a: QuadraticProgram) -> QuadraticProgram:
        return a

    def objective(self, b: Tensor, a: QuadraticProgram) -> Tensor:
        return (0.5 * b * (a.P @ b.unsqueeze(2)).squeeze(2) + a.q * b).sum(1)


class Optimum(NamedTuple):
    program: QuadraticProgram
    x: Tensor
    value: Tensor


def known(size: int, rank: int = 5, n: int = 5, seed: int = 0, boxed: bool = True) -> Optimum:
    """Random programs made around their solutions: 2 equalities, 3 inequalities, and a box with both ends or with one."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=g, dtype=D)

    root, a = normal(n, rank), torch.cat([normal(5, n), torch.eye(n, dtype=D).expand(size, n, n)], 1)
    scale = 10 ** torch.empty(size, 1, dtype=D).uniform_(-2, 2, generator=g)  # of objectives
    p, x = root @ root.mT * scale.unsqueeze(2), normal(n)
    ax = (a @ x.unsqueeze(2)).squeeze(2)
    kind = torch.rand(size, 5 + n, generator=g, dtype=D)  # at the upper bound, at the lower, at neither
    up, low = kind < 0.15, (kind > 0.85) & boxed
    low[:, 2:5] = False
    y = (normal(5 + n).abs() * (up.to(D) - low.to(D))) * scale
    y[:, :2] = normal(2) * scale
    q = -(p @ x.unsqueeze(2) + a.mT @ y.unsqueeze(2)).squeeze(2)
    slack = torch.rand(size, 2, 5 + n, generator=g, dtype=D) + 0.01
    upper, lower = torch.where(up, ax, ax + slack[:, 0]), torch.where(low, ax, ax - slack[:, 1])
    upper[:, :2], lower[:, :2], lower[:, 2:5] = ax[:, :2], ax[:, :2], -math.inf
    if not boxed:
        lower[:, 5:] = -math.inf
    program = QuadraticProgram(p, q, a, lower, upper)
    return Optimum(program, x, Programs().objective(x, program))


@pytest.mark.parametrize(("rank", "boxed"), [(5, True), (5, False), (3, True)], ids=["strict", "one bound", "flat"])
def test_duality_is_never_below_the_true_gap_of_10000_programs(rank: int, boxed: bool) -> None:
    program, x, value = known(10000, rank, boxed=boxed)
    g = torch.Generator().manual_seed(1)
    off = 10 ** torch.empty(10000, 1, dtype=D).uniform_(-6, 0.5, generator=g)
    b = x + off * torch.randn(10000, 5, generator=g, dtype=D)
    gap = Programs().objective(b, program) - value
    rounding = 1e-14 * (value.abs() + (program.q * x).abs().sum(1))
    shares = []
    for steps in (1, 10):
        bound, dual = (getattr(Duality(steps), what)(Programs(), b, program) for what in ("bound", "dual"))
        assert (bound >= gap - rounding).all()
        assert bound.isfinite().all()
        apart = (bound - gap).abs() / (1 + value.abs())
        assert apart[dual.exact].max() < 1e-7  # the gap itself
        shares.append(dual.exact.double().mean())
    assert shares[0] > 0.1
    assert shares[1] > 0.75


def test_a_prediction_near_the_optimum_proves_its_active_set() -> None:
    program, x, value = known(500)
    b = x + 1e-6 * torch.randn(500, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    dual = Duality().dual(Programs(), b, program)
    assert dual.exact.double().mean() > 0.95
    torch.testing.assert_close(dual.x[dual.exact], x[dual.exact], atol=1e-8, rtol=1e-8)
    assert ((dual.value - value).abs() <= 1e-9 * (1 + value.abs()))[dual.exact].all()


def test_rows_keep_to_themselves_and_what_all_share_is_read_once() -> None:
    program, x, _ = known(20)
    clean = Duality().bound(Programs(), x + 0.1, program)
    p, q, a, lower, upper = (leaf.clone() for leaf in program)
    p[3], q[5], upper[7, 0] = math.nan, math.nan, math.nan
    p[9] = -p[9]  # not convex: nothing can be said
    bound = Duality().bound(Programs(), x + 0.1, QuadraticProgram(p, q, a, lower, upper))
    bad = torch.tensor([3, 5, 7, 9])
    fine = torch.ones(20, dtype=torch.bool).index_fill(0, bad, False)
    assert (bound[bad] == math.inf).all()
    torch.testing.assert_close(bound[fine], clean[fine])

    class Shared:
        def program(self, a: QuadraticProgram) -> QuadraticProgram:
            return a._replace(P=program.P[0], A=program.A[0])

    g = torch.Generator().manual_seed(1)
    moved = x @ program.A[0].mT - torch.einsum("bmn,bn->bm", program.A, x)
    lower, upper = program.lower + moved, program.upper + moved
    upper[:, :2] = lower[:, :2]
    alike = program._replace(
        P=program.P[:1].expand(20, 5, 5), A=program.A[:1].expand(20, 10, 5), lower=lower, upper=upper,
        q=-x @ program.P[0] + 0.1 * program.P[0].diagonal().mean() * torch.randn(20, 5, generator=g, dtype=D),
    )  # fmt: skip
    once, each = Duality().dual(Shared(), x, alike), Duality().dual(Programs(), x, alike)
    both = once.exact & each.exact  # ties between sets may be broken by rounding
    assert both.double().mean() > 0.5
    torch.testing.assert_close(once.value[both], each.value[both], atol=1e-8, rtol=1e-8)


def test_multipliers_that_a_problem_predicts_count() -> None:
    program, x, value = known(200)
    far = x + 3
    plain = Duality(steps=1)

    class Predicted(Programs):
        def dual(self, a: QuadraticProgram) -> Tensor:
            from amortized.solvers import ADMM

            return ADMM(tol=1e-9).solve(self, a, torch.zeros_like(a.q)).dual

    gap = Programs().objective(far, program) - value
    without, given = plain.bound(Programs(), far, program), plain.bound(Predicted(), far, program)
    assert (given <= without).all()
    assert ((given - gap).abs() <= 1e-5 * (1 + value.abs())).double().mean() > 0.95
    assert ((without - gap) > 1e-2).any()


def test_a_linear_program_without_both_bounds_has_an_infinite_bound_or_an_exact_one() -> None:
    zero, one = torch.zeros(2, 2, dtype=D), torch.ones(2, 2, dtype=D)
    a = QuadraticProgram(torch.zeros(2, 2, 2, dtype=D), one, torch.eye(2, dtype=D).expand(2, 2, 2), zero, one / 0)
    b = torch.tensor([[0.0, 0.0], [5.0, 7.0]], dtype=D)
    first, second = Duality(steps=1).bound(Programs(), b, a).tolist()
    assert abs(first) < 1e-8
    assert second == math.inf
    torch.testing.assert_close(Duality(steps=3).bound(Programs(), b, a), b.sum(1), atol=1e-6, rtol=0)


class Well:
    """½ Σ h b² − a b, of curvature h from 2 to 5; and b = (b + a) / 4."""

    h = torch.tensor([2.0, 3.0, 5.0], dtype=D)

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (self.h * b * b / 2 - a * b).sum(1)

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        return (b + a) / 4


def test_the_gradient_bounds_the_gap_of_a_strongly_convex_objective() -> None:
    b, a = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    gap = Well().objective(b, a) - Well().objective(a / Well.h, a)
    certificate = Gradient(strong_convexity=2.0)
    with torch.inference_mode():
        bound = certificate.bound(Well(), b, a)
    assert (bound >= gap).all()
    assert (bound <= 2.5 * gap).all()  # the condition number
    assert certificate.claim == "bound"
    residual = Gradient()
    torch.testing.assert_close(residual.bound(Well(), b, a), (Well.h * b - a).norm(dim=1))
    assert residual.claim == "residual"


def test_the_residual_bounds_the_distance_to_a_fixed_point() -> None:
    b, a = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    certificate = FixedPoint(contraction=0.25)
    torch.testing.assert_close(certificate.bound(Well(), b, a), (b - a / 3).norm(dim=1))
    assert (FixedPoint(contraction=0.5).bound(Well(), b, a) >= (b - a / 3).norm(dim=1)).all()
    torch.testing.assert_close(FixedPoint().bound(Well(), b, a), 0.75 * (b - a / 3).norm(dim=1))
    assert (certificate.claim, FixedPoint().claim, certificate.kind) == ("bound", "residual", "fixed point")


def test_a_certificate_names_what_it_misses_and_refuses_settings_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match="the duality certificate needs more of a problem than Well has: program"):
        Duality().bound(Well(), torch.zeros(1, 3), torch.zeros(1, 3))
    for make, given in ((Gradient, -1.0), (FixedPoint, 1.0), (Duality, 0)):
        with pytest.raises(ValueError, match=str(given)):
            make(given)
