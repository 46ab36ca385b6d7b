"""The field of constrained problems: the source's own numbers, and networks that know no order."""

import pytest
import torch
from torch import nn

from amortized.contract import ProblemError, evaluate, map_leaves, violation
from amortized.networks import MessagePassing, ResidualMLP
from amortized.problems import ConvexDC3, DC3Contexts, FactorMarkets, NonconvexDC3, Portfolio
from amortized.problems.constrained.dc3 import data
from amortized.solvers import ADMM, Gauge, ProjectedGradient, Simplex


def test_dc3_has_the_numbers_and_the_splits_of_the_source():
    contexts = {split: DC3Contexts().contexts(split) for split in ("train", "val", "test")}
    assert [len(a) for a in contexts.values()] == [8334, 833, 833]
    q = data().q
    assert [round(float(x), 6) for x in q[:3]] == [0.294665, 0.530587, 0.191521]  # numpy's generator, seed 17
    with pytest.raises(ProblemError, match="has the splits train, val and test; got 'other'"):
        DC3Contexts().contexts("other")


def test_the_mean_optimum_of_the_convex_family_is_the_known_one():
    module, a = ConvexDC3(nn.Identity()).double(), DC3Contexts().contexts("test").double()
    found = ADMM(tol=1e-7).solve(module, a, module.initial(a))
    assert found.converged.all()
    assert found.violation.max() < 1e-6
    assert float(found.value.mean()) == pytest.approx(-15.0468586, abs=2e-6)


def test_the_mean_of_the_other_family_is_the_best_known():
    module, a = NonconvexDC3(nn.Identity()).double(), DC3Contexts(num_test=48).contexts("test").double()
    found = ProjectedGradient(steps=300, tol=1e-5).solve(module, a, module.initial(a))
    assert found.violation.max() < 1e-7
    again = ProjectedGradient(steps=300, tol=1e-5).solve(module, a, torch.ones_like(found.b))
    torch.testing.assert_close(found.value, again.value, atol=1e-6, rtol=0)  # one minimum from either start
    assert float(found.value.mean()) == pytest.approx(-11.57, abs=0.05)  # of all 833 -11.592252: benchmarks.constrained


@pytest.mark.parametrize("kind", [ConvexDC3, NonconvexDC3])
def test_every_prediction_is_feasible_before_any_training(kind):
    torch.manual_seed(0)
    module, a = kind(ResidualMLP(50, 100, [32]), refine=Gauge()), DC3Contexts().contexts("test")
    with torch.no_grad():
        assert violation(module, module.network(a), a).max() > 1
        b = module(a)
    exactly = kind(nn.Identity()).double()
    assert violation(exactly, b.double(), a.double()).max() < 2e-6


def test_portfolio_is_the_same_problem_in_any_units_and_order():
    torch.manual_seed(0)
    module = Portfolio(MessagePassing(["mean"], "covariance", 1, 8, 2), refine=Simplex())
    a = FactorMarkets(num_test=16, assets=20).contexts("test")
    b = module(a)
    assert (b >= 0).all()
    torch.testing.assert_close(b.sum(1), torch.ones(16))
    scaled = a._replace(mean=2 * a.mean + 3, covariance=2 * a.covariance)
    torch.testing.assert_close(module(scaled), b, atol=1e-4, rtol=1e-3)
    order = torch.randperm(20)
    mixed = a._replace(mean=a.mean[:, order], covariance=a.covariance[:, order][:, :, order])
    torch.testing.assert_close(module(mixed), b[:, order], atol=1e-5, rtol=1e-4)
    assert module(map_leaves(lambda leaf: leaf, FactorMarkets(num_test=3, assets=7).contexts("test"))).shape == (3, 7)


def test_portfolio_as_a_program_and_by_projection():
    module = Portfolio(nn.Identity()).double()
    a = map_leaves(torch.Tensor.double, FactorMarkets(num_test=8, assets=12).contexts("test"))
    start = module.initial(a)
    program = ADMM(tol=1e-9).solve(module, a, start)
    projected = ProjectedGradient(steps=5000, tol=1e-9).solve(module, a, start)
    torch.testing.assert_close(program.value, projected.value, atol=1e-7, rtol=0)
    assert (program.value < evaluate(module, start, a)).all()
    with pytest.raises(ValueError, match="risk_aversion must be positive"):
        Portfolio(nn.Identity(), risk_aversion=0)
