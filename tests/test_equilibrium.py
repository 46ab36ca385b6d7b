"""Deep equilibrium models: one state for each input, whose gradient is that of infinitely many layers."""

import copy

import pytest
import torch

from amortized.contexts.images import handwritten_digits
from amortized.contract import evaluate
from amortized.losses import FixedPointLoss
from amortized.networks import MLP
from amortized.problems import Classification, Equilibrium, EquilibriumState, Images, LabelledDigits
from amortized.solvers import Anderson, LearnedAnderson


def model(features=12, tol=1e-10, **kwargs):
    torch.manual_seed(0)
    made = Equilibrium(64, 10, features, solver=Anderson(300, tol=tol), **kwargs).double()
    return made


def inputs(n=16):
    return handwritten_digits("test")[0][:n].double()


def test_the_map_contracts_and_has_one_fixed_point():
    f, a = model(), inputs()
    assert torch.linalg.matrix_norm(f.recurrent, 2) > 1
    assert float(torch.linalg.matrix_norm(f.matrix(), 2).detach()) == pytest.approx(0.95)
    found = [f.solve(a, start) for start in (None, 3 * torch.randn(16, 12).double())]
    assert all(solution.converged.all() for solution in found)
    torch.testing.assert_close(found[0].b, found[1].b, rtol=0, atol=1e-8)
    torch.testing.assert_close(f(a), f.outward(found[0].b))
    with pytest.raises(ValueError, match=r"contraction must be in \(0, 1\), or there may be no fixed point; got 1.2"):
        Equilibrium(64, 10, contraction=1.2)


@pytest.mark.parametrize("features", [12, 120])  # a factored Jacobian, and products with it
def test_the_gradient_is_that_of_very_many_layers(features):
    f, a = model(features), inputs(4).requires_grad_()
    unrolled, z = copy.deepcopy(f), f.initial(a)
    for _ in range(500):
        z = unrolled.update(z, a)
    wanted = torch.autograd.grad(unrolled.outward(z).square().sum(), [a, *unrolled.parameters()])
    found = torch.autograd.grad(f(a).square().sum(), [a, *f.parameters()])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_a_classifier_learns_through_its_equilibrium():
    torch.manual_seed(0)
    module, data = Classification(Equilibrium(64, 10, 32)), LabelledDigits(batch_size=128)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for k in range(60):
        loss = module.amortized_step(data.batch("train", k)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a = data.contexts("test")
    assert (module(a).argmax(1) == a.target.argmax(1)).float().mean() > 0.85
    assert module.network.solve(a.image).converged.all()


def test_a_learned_start_saves_applications_of_the_map():
    made = model(32)
    state = EquilibriumState(MLP(64, 32, [128, 128]), made, loss=FixedPointLoss(2)).double()
    data, a = Images(binarise=False, batch_size=128), inputs(128)
    optimizer = torch.optim.Adam(state.network.parameters(), 5e-3)
    for k in range(300):
        loss = state.amortized_step(data.batch("train", k).double()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    solver = Anderson(300, tol=1e-3)
    cold, warm = (solver.solve(state, a, b.detach()) for b in (state.initial(a), state(a)))
    assert cold.converged.all()
    assert warm.converged.all()
    assert warm.iterations.double().mean() < 0.75 * cold.iterations.double().mean()
    torch.testing.assert_close(evaluate(state, made.solve(a).b, a), torch.zeros(128).double(), atol=1e-15, rtol=0)
    assert not any(p.requires_grad for p in made.parameters())


class Affine:
    """``T(b; a) = M b + a``, M symmetric with eigenvalues in [-0.3, 0.97]."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(20, 20, generator=g).double())[0]
        self.m = (turn * torch.linspace(-0.3, 0.97, 20).double()) @ turn.mT

    def update(self, b, a):
        return b @ self.m + a

    def off(self, b, a):
        return (self.update(b, a) - b).norm(dim=1)


def test_learned_anderson_starts_as_anderson_and_learns_to_end_nearer():
    problem = Affine()
    g = torch.Generator().manual_seed(1)
    train, test = (torch.randn(256, 20, generator=g).double() for _ in range(2))
    start = torch.zeros_like(test)
    solver = LearnedAnderson(steps=8, memory=3, regularization=1e-12).double()
    b, points, residuals = start[0], [], []
    for _ in range(8):  # by hand
        f = problem.update(b, test[0]) - b
        dx, df = (torch.stack([v - u for u, v in zip(x[-4:], x[-4:][1:], strict=False)] or [0 * f], 1)
                  for x in ([*points, b], [*residuals, f]))  # fmt: skip
        points, residuals = [*points, b], [*residuals, f]
        b = b + f - (dx + df) @ torch.linalg.lstsq(df, f.unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(list(solver.iterates(problem, test[:1], start[:1]))[-1][0], b, rtol=1e-5, atol=1e-7)
    before = problem.off(list(solver.iterates(problem, test, start))[-1], test).mean()
    optimizer = torch.optim.Adam(solver.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        problem.off(list(solver.iterates(problem, train, start))[-1], train).mean().backward()
        optimizer.step()
    after = problem.off(list(solver.iterates(problem, test, start))[-1], test).mean()
    assert after < 0.9 * before
    with pytest.raises(ValueError, match="memory and regularization must be positive, got 0 and"):
        LearnedAnderson(memory=0)
