"""Deep equilibrium models: one state for each input, whose gradient is that of infinitely many layers."""

import copy

import pytest
import torch

from amortized.contexts.images import handwritten_digits
from amortized.contract import evaluate
from amortized.losses import FixedPointLoss
from amortized.networks import MLP
from amortized.problems import Classification, Equilibrium, EquilibriumState, Images, LabelledDigits
from amortized.solvers import Anderson


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
