"""Sparse codes: solutions are the lasso's, short solvers start as the long ones, and what is learned saves their steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from amortized.contract import evaluate
from amortized.losses import FixedPointLoss
from amortized.networks import MLP, LearnedInitialization
from amortized.problems import ALISTA, LISTA, CosineDictionary, GaussianDictionary, Patches, SparseCoding, SparseSignals
from amortized.problems.coding.unrolled import analytic_weights
from amortized.solvers import FISTA, Anderson, Status, solver_for

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "lista.ckpt"


def coding(refine=None, **kwargs):
    return SparseCoding(LearnedInitialization(50), GaussianDictionary(25, 50), refine=refine, **kwargs)


def signals(n=32, **kwargs):
    data = SparseSignals(GaussianDictionary(25, 50), num_test=n, eval_batch_size=n, **kwargs)
    return data.contexts("test").double()


def test_solutions_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    problem, a = coding().double(), signals(8)
    assert isinstance(solver_for(problem), FISTA)
    found = FISTA(5000, tol=1e-9).solve(problem, a, problem.initial(a))
    assert found.converged.all()
    peer = linear_model.Lasso(alpha=0.005 / 25, fit_intercept=False, tol=1e-12, max_iter=100_000)
    for signal, b in zip(a.numpy(), found.b.numpy(), strict=True):
        np.testing.assert_allclose(b, peer.fit(problem.dictionary().numpy(), signal).coef_, atol=1e-6)


def test_solutions_are_the_fixed_points_of_ista():
    problem, a = coding().double(), signals(8)
    b = FISTA(5000, tol=1e-10).solve(problem, a, problem.initial(a)).b
    torch.testing.assert_close(problem.update(b, a), b, rtol=0, atol=1e-9)
    accelerated = Anderson(3000, tol=1e-9).solve(problem, a, problem.initial(a))
    assert accelerated.converged.all()
    torch.testing.assert_close(accelerated.b, b, rtol=0, atol=1e-5)


def test_lista_starts_as_ista_in_every_precision():
    for dtype in (torch.float32, torch.float64):
        problem, a = coding(LISTA(25, 50, 5, momentum=False)).to(dtype), signals().to(dtype)
        ista = FISTA(5, accelerate=False, lr=float(1 / problem.dictionary.curvature()))
        expected = [problem.initial(a), *ista.iterates(problem, a, problem.initial(a))]
        for b, other in zip(problem.iterates(a), expected, strict=True):
            assert b.dtype == dtype
            torch.testing.assert_close(b, other, rtol=1e-4, atol=1e-6)


def test_unrolled_layers_are_a_solver_that_claims_nothing():
    for refine in (LISTA(25, 50, 5), ALISTA(5)):
        problem, a = coding(refine).double(), signals()
        values = []
        start = torch.randn(32, 50).double()
        found = refine.solve(problem, a, start, trace=lambda n, b, value, into=values: into.append(value))
        assert (found.status == Status.LIMIT).all()
        assert len(values) == 5
        assert (torch.stack(values).diff(dim=0) <= 0).all()
        torch.testing.assert_close(found.value, evaluate(problem, found.b, a))
        solved = FISTA(5000, tol=1e-10).solve(problem, a, problem.initial(a))
        assert (refine.solve(problem, a, solved.b).residual < 1e-9).all()


def test_lista_says_for_which_dictionary_it_was_made():
    with pytest.raises(ValueError, match=r"LISTA was made for dictionaries \(25, 40\); this one is \(25, 50\)"):
        coding(LISTA(25, 40))(signals().float())
    with pytest.raises(ValueError, match="frequencies must be at least the side, 8; got 7"):
        CosineDictionary(8, 7)
    with pytest.raises(ValueError, match="weight must be positive; got 0"):
        coding(weight=0)
    with pytest.raises(ValueError, match="density must be in"):
        SparseSignals(GaussianDictionary(25, 50), density=0)


def test_analytic_weights_are_the_least_coherent():
    D = nn.functional.normalize(GaussianDictionary(25, 50)().double(), dim=0)
    W = analytic_weights(D)
    torch.testing.assert_close((W * D).sum(0), torch.ones(50).double())
    # Where it is least, the derivative of ‖Dᵀ w‖² is along the constraint's normal, d, alone.
    slope = D @ (D.T @ W)
    torch.testing.assert_close(slope, (slope * D).sum(0) * D, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dictionary", [GaussianDictionary(16, 40), CosineDictionary(8, 12)])
def test_atoms_have_unit_length_and_the_curvature_is_theirs(dictionary):
    D = dictionary()
    torch.testing.assert_close(D.norm(dim=0), torch.ones(D.shape[1]))
    torch.testing.assert_close(dictionary.curvature(), torch.linalg.matrix_norm(D, 2).square(), rtol=1e-4, atol=0)


def test_a_dictionary_that_learns_keeps_its_length_and_codes_better():
    data = Patches(batch_size=64, num_test=64)
    problem = SparseCoding(LearnedInitialization(81), GaussianDictionary(64, 81, learn=True), 0.02, refine=ALISTA(8))
    a = data.batch("test", 0)
    solver = FISTA(300, tol=1e-3)
    before = solver.solve(problem, a, problem.initial(a)).value.mean()
    optimizer = torch.optim.Adam(problem.parameters(), 0.01)
    for k in range(60):
        loss = problem.amortized_step(data.batch("train", k)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(problem.dictionary().norm(dim=0), torch.ones(81))
    assert solver.solve(problem, a, problem.initial(a)).value.mean() < 0.9 * before


def test_signals_are_as_dense_as_they_say():
    data = SparseSignals(GaussianDictionary(60, 50), density=0.2, num_test=2000)
    D, a = data.dictionary(), data.contexts("test")
    x = torch.linalg.lstsq(D, a.T).solution.T
    assert (x.abs() > 1e-4).float().mean() == pytest.approx(0.2, abs=0.01)
    noisy = SparseSignals(GaussianDictionary(60, 50), density=0.2, noise=0.1, num_test=2000).contexts("test")
    assert (noisy - a).std() == pytest.approx(0.1, abs=0.002)


def test_patches_have_no_mean_and_some_contrast():
    data = Patches(side=6, num_train=500, num_val=100, num_test=100)
    for split, n in (("train", 500), ("val", 100), ("test", 100)):
        a = data.contexts(split)
        assert a.shape == (n, 36)
        assert a.mean(1).abs().max() < 1e-5
        assert a.std(1).min() > 0.019
        assert torch.equal(a, Patches(side=6, num_train=500, num_val=100, num_test=100, seed=3).contexts(split))


def test_fixed_point_loss_teaches_a_start_for_ista():
    problem = SparseCoding(MLP(25, 50), GaussianDictionary(25, 50), loss=FixedPointLoss(5))
    data = SparseSignals(GaussianDictionary(25, 50), num_test=256)
    a = data.contexts("test")

    def residual():
        with torch.no_grad():
            return problem.amortized_step(a).mean()

    before, optimizer = residual(), torch.optim.Adam(problem.parameters(), 2e-3)
    for k in range(100):
        loss = problem.amortized_step(data.batch("train", k)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert residual() < 0.5 * before


def to_goal(problem, a, start, goal):
    """Steps of FISTA, its step size the best constant one, until the objective is at most ``goal`` ``(B,)``."""
    values = []
    solver = FISTA(1000, lr=float(1 / problem.dictionary.curvature()), tol=1e-8)
    solver.solve(problem, a, start, trace=lambda n, b, value: values.append(value))
    hit = torch.stack(values) <= goal
    return torch.where(hit.any(0), hit.int().argmax(0) + 1, 1000).double()


def test_sixteen_learned_layers_are_worth_a_hundred_steps_and_their_end_saves_four_fifths():
    module = SparseCoding.load_from_checkpoint(CHECKPOINT).double().eval()
    assert module.refine.steps == 16
    a = SparseSignals(GaussianDictionary(25, 50), num_test=256).contexts("test").double()
    with torch.no_grad():
        start = module(a)
    hundred = FISTA(100, lr=float(1 / module.dictionary.curvature()), tol=0).solve(module, a, module.initial(a))
    assert evaluate(module, start, a).mean() < hundred.value.mean()
    best = FISTA(5000, tol=1e-9).solve(module, a, module.initial(a)).value
    goal = best * (1 + 1e-6) + 1e-12
    cold, warm = (to_goal(module, a, b, goal).median() for b in (module.initial(a), start))
    assert warm <= cold / 5


def test_networks_of_any_kind_predict_codes():
    a = signals().float()
    module = SparseCoding(nn.Linear(25, 50), GaussianDictionary(25, 50), refine=ALISTA(4))
    code = module.decode(module(a), a)
    torch.testing.assert_close(code.signal, code.code @ module.dictionary().T)
