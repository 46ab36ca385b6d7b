import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from toy import Pair, Quadratic

from amortized import (
    AmortizedModule,
    HardContexts,
    IterateLoss,
    LogObjectiveLoss,
    ObjectiveLoss,
    ProblemError,
    RegressionLoss,
)
from amortized.contract import row_hashes
from amortized.losses import MixtureLoss, SumLoss
from amortized.networks import MLP, Mixture
from amortized.solvers import LBFGS, GradientDescent, Solver


def test_objective_loss_is_the_objective_of_the_prediction():
    model, a = Quadratic(), torch.randn(6, 3)
    assert torch.equal(ObjectiveLoss()(model, a), model.objective(model(a), a))


def test_log_objective_loss_is_its_logarithm():
    model, a = Quadratic(), torch.randn(6, 3)
    value = model.objective(model(a), a)
    torch.testing.assert_close(LogObjectiveLoss()(model, a), value.log())


def test_iterate_loss_weighs_the_iterates():
    model, a = Quadratic(refine=GradientDescent(steps=2, lr=0.1)), torch.randn(6, 3)
    values = [model.objective(b, a) for b in model.iterates(a)]
    expected = (0.25 * values[0] + 0.5 * values[1] + values[2]) / 1.75
    assert torch.allclose(IterateLoss(decay=0.5)(model, a), expected)
    with pytest.raises(ValueError, match="decay must be in"):
        IterateLoss(decay=0)


def test_regression_to_solutions_in_the_data():
    class Known(Quadratic):
        def observe(self, a):
            return a.x

        def objective(self, b, a):
            return super().objective(b, a.x)

    model, a = Known(), Pair(torch.randn(6, 3), torch.randn(6, 3))
    assert torch.allclose(RegressionLoss(field="y")(model, a), (model(a) - a.y).square().mean(1))
    with pytest.raises(ProblemError, match="no field 'z'; it has x, y"):
        RegressionLoss(field="z")(model, a)


def test_regression_to_what_a_solver_finds_in_every_step():
    model, a = Quadratic(), torch.randn(6, 3)
    loss = RegressionLoss(solver=LBFGS(steps=50))
    assert torch.allclose(loss(model, a), (model(a) - 2 * a).square().mean(1), atol=1e-4)
    with pytest.raises(ProblemError, match="LBFGS converged on none of 6 contexts"):
        RegressionLoss(solver=LBFGS(steps=0))(model, a)


def test_what_was_a_cache_is_a_solution_set():
    with pytest.raises(ValueError, match="--out kept` and train on them by --data.solutions kept"):
        RegressionLoss(solver=LBFGS(), cache="kept")
    with pytest.raises(ProblemError, match="name the folder of a set by --data.solutions"):
        RegressionLoss()(Quadratic(), torch.randn(6, 3))


class Known(NamedTuple):
    x: torch.Tensor
    best: torch.Tensor
    """``(B, k, 3)``."""


class Several(Quadratic):
    def observe(self, a):
        return a.x


def test_of_several_solutions_the_nearest_counts():
    model = Several()
    x = torch.randn(4, 3)
    near, far = model.network(x).detach() + 0.1, torch.full((4, 3), 9.0)
    best = torch.stack([far, near, far.clone()], 1)
    best[:2, 2] = torch.nan  # two solutions alone
    loss = RegressionLoss(field="best")(model, Known(x, best))
    torch.testing.assert_close(loss, torch.full((4,), 0.01))
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ProblemError, match=r"shape \(4, 3, 2\), the network predicts \(4, 3\)"):
        RegressionLoss(field="best")(model, Known(x, best[..., :2]))


def test_a_sum_of_losses_predicts_once():
    class Watching(Quadratic):
        asked = 0

        def iterates(self, a):
            self.asked += 1
            return super().iterates(a)

    model, a = Watching(), torch.randn(6, 3)
    parts = [ObjectiveLoss(), LogObjectiveLoss(), IterateLoss()]
    expected = sum(w * part(model, a) for w, part in zip((1, 0.5, 2), parts, strict=True))
    before = model.asked
    torch.testing.assert_close(SumLoss(parts, [1, 0.5, 2])(model, a), expected)
    assert model.asked == before + 1
    torch.testing.assert_close(SumLoss(parts)(model, a), sum(part(model, a) for part in parts))
    with pytest.raises(ValueError, match="got 2 for 3 losses"):
        SumLoss(parts, [1, 2])
    with pytest.raises(ProblemError, match="ObjectiveLoss 6, HardContexts 3"):
        SumLoss([ObjectiveLoss(), HardContexts(pool=2)])(model, a)


def test_a_sum_keeps_what_its_losses_learn():
    assert {"parts.0.gram", "parts.0.moment"} <= SumLoss([HardContexts()]).state_dict().keys()


def test_rows_hash_by_their_bytes():
    a = torch.randn(1000, 4)
    pair = Pair(a, a.flip(0))
    assert len(row_hashes(pair).unique()) == 1000
    assert torch.equal(row_hashes(pair)[:10], row_hashes(Pair(a[:10], a.flip(0)[:10])))
    assert not torch.equal(row_hashes(pair), row_hashes(Pair(a.flip(0), a)))


def test_a_new_loss_needs_nothing_of_the_core():
    class Worst(ObjectiveLoss):
        def __call__(self, model, a):
            return super().__call__(model, a).max().expand(len(a))

    model = Quadratic(loss=Worst())
    assert model.amortized_step(torch.randn(5, 3)).unique().numel() == 1


def test_solver_is_abstract():
    with pytest.raises(TypeError):
        Solver()


class Roots(AmortizedModule):
    """``(b^2 - a^2)^2``: a context has the solutions a and -a; its target is one of them."""

    def observe(self, a):
        return a.x

    def objective(self, b, a):
        return (b.square() - a.x.square()).square().sum(1)


class Solved(NamedTuple):
    x: torch.Tensor
    target: torch.Tensor


def test_a_mixture_learns_one_of_several_solutions_where_regression_learns_their_mean():
    torch.manual_seed(0)
    x = 0.5 + torch.rand(512, 1)
    sign = torch.randint(0, 2, (512, 1)) * 2 - 1
    a, held_out = Solved(x, sign * x), Solved(x := 0.5 + torch.rand(256, 1), x)
    mixture = Roots(Mixture(MLP(1, 4, [32]), components=2), loss=MixtureLoss("target", sigma=0.2))
    one = Roots(MLP(1, 1, [32]), loss=RegressionLoss("target"))
    gap = {}
    for name, model in (("mixture", mixture), ("one", one)):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(300):
            optimizer.zero_grad()
            model.amortized_step(a).mean().backward()
            optimizer.step()
        gap[name] = float(model.objective(model(held_out), held_out).mean())
    assert gap["mixture"] < 0.02 < 0.5 < gap["one"]
    weight, b = mixture.network.mixture(held_out.x)
    torch.testing.assert_close(b[:, 0], -b[:, 1], atol=0.1, rtol=0)
    torch.testing.assert_close(weight.exp(), torch.full((256, 2), 0.5), atol=0.15, rtol=0)


def test_a_mixture_s_loss_by_hand():
    class Two(nn.Module):
        def mixture(self, a):
            return torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[[1.0], [3.0]]])

    model = Roots(Two())
    nan = float("nan")
    terms = [-math.log(0.25 * math.exp(-u / 2) + 0.75 * math.exp(-v / 2)) for u, v in ((1, 1), (0, 4))]
    for target, expected in (([2.0], terms[0]), ([1.0], terms[1]), ([[2.0], [1.0], [nan]], sum(terms) / 2)):
        a = Solved(torch.ones(1, 1), torch.tensor([target]))
        assert float(MixtureLoss("target", sigma=1.0)(model, a)) == pytest.approx(expected)
    with pytest.raises(ProblemError, match="needs a network of several predictions"):
        MixtureLoss("target")(Roots(MLP(1, 1)), a)
    with pytest.raises(ValueError, match=r"K = 3 solutions of n numbers with a weight each; got 4"):
        Mixture(MLP(1, 4), 3)(torch.ones(1, 1))
