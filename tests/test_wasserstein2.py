"""Wasserstein-2 potentials: their conjugates against closed forms, what each loss learns, and the map between Gaussians."""

import pytest
import torch
from torch import nn

from amortized.contract import value_and_grad
from amortized.losses import FixedPointLoss, ObjectiveLoss, RegressionLoss
from amortized.networks import ResidualMLP
from amortized.problems.transport import ConvexPotential, Draws, GaussianPair, MongeMap, Shapes, Wasserstein2
from amortized.problems.transport.monge import draw_maps, monge, unexplained
from amortized.solvers import LBFGS

D = torch.float64
LOSSES = {
    "objective": ObjectiveLoss,
    "cycle": lambda: FixedPointLoss(0),
    "regression": lambda: RegressionLoss(field="conjugate"),
}


def train(module, data, updates, lr):
    optimizer = torch.optim.Adam(module.parameters(), lr, betas=(0.5, 0.5))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates, pct_start=0.1)
    for number in range(updates):
        loss = module.amortized_step(data.batch("train", number)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
        rates.step()
    return module.eval()


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_gaussian_potential_has_the_known_map_cost_and_conjugate(dimension):
    data = GaussianPair(dimension, pair=3, num_test=50_000)
    known, a = data.known.double(), Draws(*(part.double() for part in data.contexts("test")))
    carried = known.carry(a.x)
    torch.testing.assert_close(carried.mean(0), a.y.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(carried.mT.cov(), a.y.mT.cov(), rtol=0.05, atol=0.05)
    cost = (carried - a.x).square().sum(1).mean()
    torch.testing.assert_close(cost, torch.tensor(known.W2_squared, dtype=D), rtol=0.03, atol=0)
    torch.testing.assert_close(known.carry_back(carried), a.x)
    value = known(a.x) + known.conjugate(a.y)  # Fenchel and Young
    assert (value >= (a.x * a.y).sum(1) - 1e-9).all()
    torch.testing.assert_close(known(a.x) + known.conjugate(carried), (a.x * carried).sum(1))


def test_solver_finds_the_conjugate_and_its_point():
    data = GaussianPair(3, num_test=32)
    module, y = Wasserstein2(nn.Identity(), data.known).double(), data.contexts("test").y.double()
    found = LBFGS(200).solve(module, y, module.initial(y))
    torch.testing.assert_close(found.value, module.optimum(y), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.b, module.potential.carry_back(y), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.transport(found.b), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(module.update(found.b, y), found.b, rtol=0, atol=1e-5)


def test_convex_potentials_are_as_convex_as_they_say():
    torch.manual_seed(0)
    f = ConvexPotential(3, [16, 16], strong_convexity=0.3).double()
    f.root.data.zero_()
    x, y = 3 * torch.randn(2, 500, 3, dtype=D)
    t = torch.rand(500, 1, dtype=D)
    chord = t[:, 0] * f(x) + (1 - t[:, 0]) * f(y)
    apart = 0.3 / 2 * (t * (1 - t))[:, 0] * (x - y).square().sum(1)
    assert (f(t * x + (1 - t) * y) <= chord - apart + 1e-9).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_potential_learns_by_danskin_and_the_network_by_its_loss(loss):
    """The gradient is that of ``f(x) - f(x*)`` with ``x*`` held, and that of the loss with f held."""
    torch.manual_seed(0)
    a = Shapes(batch_size=16).batch("train", 0)
    module = Wasserstein2(
        ResidualMLP(2, 2, [8], "silu"), ConvexPotential(2, [8]), conjugate=LBFGS(50), loss=LOSSES[loss]()
    )
    module.amortized_step(a).mean().backward()
    solved = LBFGS(50).solve(module, a, module(a).detach()).b
    own = list(module.potential.parameters())
    expected = torch.autograd.grad((module.potential(a.x) - module.potential(solved)).mean(), own)
    torch.testing.assert_close([p.grad for p in own], list(expected))
    b = module(a)
    signal = {
        "objective": lambda: module.objective(b, a),
        "cycle": lambda: value_and_grad(module, b, a, create_graph=True)[1].square().sum(1),
        "regression": lambda: (b - solved).square().mean(1),
    }[loss]()
    expected = torch.autograd.grad(signal.mean(), list(module.network.parameters()))
    torch.testing.assert_close([p.grad for p in module.network.parameters()], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_the_conjugate_of_a_given_potential(loss):
    torch.manual_seed(0)
    data = GaussianPair(2, pair=1, batch_size=32, num_test=256)
    signal = RegressionLoss(solver=LBFGS(50, tol=1e-3)) if loss == "regression" else LOSSES[loss]()
    module = Wasserstein2(ResidualMLP(2, 2, [16], "silu"), data.known, loss=signal)
    a = data.contexts("test")
    before = unexplained(module(a).detach(), data.known.carry_back(a.y))
    train(module, data, 100, 0.03)
    assert unexplained(module(a).detach(), data.known.carry_back(a.y)) < min(2.0, before / 30)


def test_the_map_between_gaussians_is_found():
    """From draws alone; and what the maps leave unexplained is told."""
    torch.manual_seed(0)
    data = GaussianPair(2, batch_size=256, num_test=1024)
    module = train(Wasserstein2(ResidualMLP(2, 2, [32], "silu"), ConvexPotential(2, [16])), data, 800, 0.01)
    a = data.contexts("test")
    b = module(a).detach()
    solved = LBFGS(100).solve(module, a, b).b
    values = [module.dual_value(x, a) for x in (b, solved)]
    found = monge(a, module.transport(a.x), b, solved, values, data.known)
    assert max(found[f"uvp_{name}"] for name in ("forward", "network", "solver")) < 3
    assert abs(found["W2_squared_solver"] / found["W2_squared_known"] - 1) < 0.1
    figure = draw_maps(a, module.transport(a.x), b)
    assert [axes.get_title() for axes in figure.axes] == ["", "∇f(x)", "network(y)"]
    assert unexplained(a.y.mean(0).expand(len(a.y), -1), a.y) == pytest.approx(100, rel=0.01)


def test_solutions_of_a_potential_that_changes_are_not_remembered():
    with pytest.raises(ValueError, match=r"field: conjugate"):
        Wasserstein2(nn.Identity(), ConvexPotential(2), loss=RegressionLoss(solver=LBFGS(5)))
    Wasserstein2(nn.Identity(), ConvexPotential(2), freeze_potential=True, loss=RegressionLoss(solver=LBFGS(5)))


@pytest.mark.parametrize("shape", ["gaussian", "eight", "moons", "spiral", "checkerboard"])
def test_shapes_are_about_the_middle_and_of_size_one(shape):
    y = Shapes(target=shape, num_test=4000).contexts("test").y
    assert y.mean(0).abs().max() < 0.4
    assert 0.3 < y.std(0).min() <= y.std(0).max() < 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shapes(target="star"), "gaussian, eight, moons, spiral, checkerboard; got 'star'"),
        (lambda: GaussianPair(0), "at least 1; got 0"),
        (lambda: ConvexPotential(2, strong_convexity=0), "positive"),
        (lambda: MongeMap().setup(None, nn.Identity(), "test"), "Identity is none"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
