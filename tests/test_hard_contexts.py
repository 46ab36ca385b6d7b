"""Training more often where the prediction is poor: unbiased, hard rows first, and exact when it is resumed."""

import random

import pytest
import torch
from runs import Run
from test_reliability import assert_same, fit_with_kills, recipe
from torch.nn.utils import parameters_to_vector
from toy import Gaussians, Quadratic

from amortized import HardContexts, Loss, ObjectiveLoss, ProblemError
from amortized.problem import draws

CPU = torch.device("cpu")


def gradient(model, loss):
    return parameters_to_vector(torch.autograd.grad(loss.mean(), list(model.parameters())))


def spread(n=64):
    """Contexts of very different hardness, the scale of row i growing with i."""
    return torch.randn(n, 3) * torch.logspace(-2, 1, n)[:, None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Quadratic()


@pytest.mark.parametrize("score", ["gradient", "loss"])
@pytest.mark.parametrize("focus", [0.0, 0.5, 1.0])
def test_the_expected_gradient_is_the_one_stated(model, score, focus):
    a, loss = spread(), HardContexts(pool=4, score=score, focus=focus)
    p = loss.probabilities(loss.scores(model, a))
    stated = gradient(model, (len(a) * p) ** focus * ObjectiveLoss()(model, a))
    if focus == 0:
        assert torch.equal(stated, gradient(model, ObjectiveLoss()(model, a)))  # that of the plain loss
    found = torch.stack([gradient(model, loss(model, a)) for _ in range(1500)])
    error = found.std(0) / len(found) ** 0.5
    off = (found.mean(0) - stated) / (error + 1e-6 * stated.abs().max())
    assert off.square().mean().sqrt() < 2  # one, but parameters share their draws
    assert off.abs().max() < 5
    assert error.norm() < 0.1 * stated.norm()


@pytest.mark.parametrize("score", ["gradient", "loss"])
def test_a_pool_of_one_has_the_expected_gradient_of_a_larger_one(model, score):
    a, weighed, drawn = spread(), HardContexts(pool=1, score=score, focus=0.5), HardContexts(score=score, focus=0.5)
    p = drawn.probabilities(drawn.scores(model, a))
    assert torch.allclose(weighed(model, a), (len(a) * p) ** 0.5 * ObjectiveLoss()(model, a))
    assert torch.allclose(
        gradient(model, weighed(model, a)), gradient(model, (len(a) * p) ** 0.5 * ObjectiveLoss()(model, a))
    )


def test_draws_in_proportion_to_hardness_lower_the_noise_of_the_gradient(model):
    a = spread()
    hard, uniform = HardContexts(pool=4), HardContexts(pool=4, mix=1.0)
    noise = [
        torch.stack([gradient(model, loss(model, a)) for _ in range(200)]).var(0).sum() for loss in (hard, uniform)
    ]
    assert noise[0] < 0.5 * noise[1]


@pytest.mark.parametrize("score", ["gradient", "loss"])
def test_hard_rows_are_drawn_more_often(model, score):
    class Seen(Loss):
        rows = torch.zeros(64)

        def __call__(self, model, a):
            if torch.is_grad_enabled():
                Seen.rows += (a[:, None] == pool).all(2).sum(0)
            return ObjectiveLoss()(model, a)

    pool, loss = spread(), HardContexts(Seen(), pool=4, score=score)
    p = loss.probabilities(loss.scores(model, pool))
    Seen.rows.zero_()
    for _ in range(400):
        loss(model, pool)
    assert Seen.rows.sum() == 400 * 16
    assert (Seen.rows / 400 - 16 * p).abs().max() < 0.12  # four standard errors of a row drawn half the time
    assert Seen.rows[-16:].sum() > 5 * Seen.rows[:16].sum() > 0


def test_each_row_is_drawn_as_often_as_it_should_up_to_rounding():
    p = HardContexts().probabilities(torch.rand(1000))
    times = HardContexts().drawn(p, 2500).bincount(minlength=1000)
    assert ((times - 2500 * p).abs() < 1 + 1e-2).all()


def test_no_hard_row_is_a_plain_subset():
    p = HardContexts().probabilities(torch.zeros(12))
    assert torch.allclose(p, torch.full((12,), 1 / 12))
    assert len(HardContexts().drawn(p, 3).unique()) == 3


def test_weights_are_bounded_and_without_gradient(model):
    a, loss = spread(), HardContexts(pool=4, mix=0.25)
    a.requires_grad_()
    p = loss.probabilities(loss.scores(model, a))
    assert not p.requires_grad
    assert (1 / (len(a) * p)).max() <= 1 / 0.25 + 1e-4
    with draws(0, CPU):
        got = gradient(model, loss(model, a.detach()))
    with draws(0, CPU):
        index = loss.drawn(p, 16)
    constant = (1 / (len(a) * p))[index].clone()
    assert torch.allclose(got, gradient(model, constant * ObjectiveLoss()(model, a.detach()[index])), rtol=1e-4)


def test_the_signal_is_of_the_rows_drawn_and_a_failure_still_shows():
    model = Quadratic(loss=HardContexts(pool=4))
    a = torch.randn(64, 3)
    assert model.amortized_step(a).shape == (16,)
    a[5] = torch.nan
    assert model.amortized_step(a).mean().isnan()  # as it would be without


@pytest.mark.parametrize(
    "wrong", [{"pool": 0}, {"mix": 0.0}, {"focus": 1.5}, {"score": "gap"}, {"focus": 0.0, "pool": 1}]
)
def test_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=f"HardContexts: {next(iter(wrong))} must be"):
        HardContexts(**wrong)


def test_refuses_a_batch_smaller_than_the_pool(model):
    with pytest.raises(ProblemError, match="a batch of 3 contexts is too small"):
        HardContexts(pool=4)(model, torch.randn(3, 3))


def test_lowers_the_objective():
    torch.manual_seed(0)
    data, model = Gaussians(batch_size=64), Quadratic(loss=HardContexts(pool=4))
    optimizer, a = torch.optim.Adam(model.parameters(), 1e-2), Gaussians().contexts("val")
    before = model.objective(model(a), a).mean()
    for number in range(150):
        optimizer.zero_grad()
        model.amortized_step(data.batch("train", number)).mean().backward()
        optimizer.step()
    assert model.objective(model(a), a).mean() - 1 < 0.3 * (before - 1)


@pytest.mark.parametrize(("processes", "pool"), [(1, ["pool=2"]), (2, ["pool=1", "focus=0.5"])])
def test_killed_and_resumed_is_bit_identical(processes, pool):
    args = [*recipe(processes=processes), "--model.loss=HardContexts", *(f"--model.loss.{setting}" for setting in pool)]
    run = Run([*args, "--run_folder=whole"])
    assert run.wait() == 0, run.output()
    assert fit_with_kills(args, kills=2, rng=random.Random(processes), length=0.4 * processes)
    assert_same("killed", "whole")
