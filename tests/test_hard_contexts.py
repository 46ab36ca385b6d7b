"""Training more often where the prediction is poor: unbiased, hard rows first, and exact when it is resumed."""

import copy
import random

import pytest
import torch
from runs import Run, last_checkpoint
from test_reliability import assert_same, fit_with_kills, recipe
from torch.nn.utils import parameters_to_vector
from toy import Gaussians, Quadratic

from amortized import HardContexts, IterateLoss, Loss, ObjectiveLoss, ProblemError, RegressionLoss
from amortized.cli.app import main
from amortized.contract import draws, value_and_grad
from amortized.solvers import LBFGS, GradientDescent

CPU = torch.device("cpu")


def gradient(model, loss):
    return parameters_to_vector(torch.autograd.grad(loss.mean(), list(model.parameters())))


def spread(n=64):
    """Contexts of very different hardness, their scales log-uniform."""
    return torch.randn(n, 3) * 10 ** (3 * torch.rand(n, 1) - 2)


def norms(model, a):
    return value_and_grad(model, model(a), a)[1].norm(dim=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Quadratic()


@pytest.fixture
def learned(model):
    """A loss that has seen what is hard."""
    loss = HardContexts()
    for _ in range(200):
        gradient(model, loss(model, spread(512)))
    return loss


def test_the_expected_gradient_is_that_of_the_plain_loss(model):
    a, loss = spread(), HardContexts(pool=4)  # which learns as it is asked
    plain = gradient(model, ObjectiveLoss()(model, a))
    found = torch.stack([gradient(model, loss(model, a)) for _ in range(1500)])
    error = found.std(0) / len(found) ** 0.5
    off = (found.mean(0) - plain) / (error + 1e-6 * plain.abs().max())
    assert off.square().mean().sqrt() < 2  # one, but parameters share their draws
    assert off.abs().max() < 5
    assert error.norm() < 0.1 * plain.norm()


def test_learns_the_norm_of_the_gradient(model, learned):
    a = spread(512)
    scores, norm = learned.scores(learned.features(a)), norms(model, a)
    assert torch.corrcoef(torch.stack([scores.log(), norm.log()]))[0, 1] > 0.9
    fresh = HardContexts()
    assert (fresh.scores(fresh.features(a)) == 1).all()


def test_draws_by_what_was_learned_lower_the_noise_of_the_gradient(model, learned):
    a, uniform = spread(512), copy.deepcopy(learned)
    uniform.mix = 1.0
    noise, plain_noise = (
        torch.stack([gradient(model, loss(model, a)) for _ in range(200)]).var(0).sum() for loss in (learned, uniform)
    )
    best = norms(model, a).mean().square() / norms(model, a).square().mean()
    assert best < 0.35
    assert noise < 0.5 * plain_noise


def test_hard_rows_are_drawn_more_often(model, learned):
    class Seen(Loss):
        rows = torch.zeros(64)

        def __call__(self, model, a):
            Seen.rows += (a[:, None] == pool).all(2).sum(0)
            return ObjectiveLoss()(model, a)

    pool = spread()[torch.argsort(torch.rand(64))]
    learned.loss, learned.pool = Seen(), 4
    p = learned.probabilities(learned.scores(learned.features(pool)))
    for _ in range(400):
        with torch.no_grad():  # and nothing is learned
            learned(model, pool)
    assert Seen.rows.sum() == 400 * 16
    assert (Seen.rows / 400 - 16 * p).abs().max() < 0.12  # four standard errors of a row drawn half the time
    hardest = norms(model, pool).argsort()
    assert Seen.rows[hardest[-16:]].sum() > 5 * Seen.rows[hardest[:16]].sum() > 0


def test_each_row_is_drawn_as_often_as_it_should_up_to_rounding():
    p = HardContexts().probabilities(torch.rand(1000))
    times = HardContexts().drawn(p, 2500).bincount(minlength=1000)
    assert ((times - 2500 * p).abs() < 1 + 1e-2).all()


def test_no_hard_row_is_a_plain_subset():
    p = HardContexts().probabilities(torch.zeros(12))
    assert torch.allclose(p, torch.full((12,), 1 / 12))
    assert len(HardContexts().drawn(p, 3).unique()) == 3


def test_weights_are_bounded_and_without_gradient(model, learned):
    a = spread(512).requires_grad_()
    p = learned.probabilities(learned.scores(learned.features(a)))
    assert not p.requires_grad
    assert (1 / (len(a) * p)).max() <= 1 / learned.mix + 1e-4
    with draws(0, CPU):
        index = learned.drawn(p, 64)
    with draws(0, CPU):
        got = gradient(model, learned(model, a))
    constant = (1 / (len(a) * p))[index].clone()
    assert torch.allclose(got, gradient(model, constant * ObjectiveLoss()(model, a.detach()[index])), rtol=1e-4)


@pytest.mark.parametrize("loss", [IterateLoss(), RegressionLoss(solver=LBFGS(20))], ids=["iterates", "regression"])
def test_learns_from_any_loss_of_any_model(loss):
    torch.manual_seed(0)
    model, hard = Quadratic(refine=GradientDescent(2, lr=0.1)), HardContexts(loss)
    for _ in range(50):
        hard(model, spread(128)).mean().backward()
    a = spread(256)
    scores = hard.scores(hard.features(a))
    assert torch.corrcoef(torch.stack([scores.log(), norms(model, a).log()]))[0, 1] > 0.7


def test_the_signal_is_of_the_rows_drawn_and_a_failure_still_shows():
    model = Quadratic(loss=HardContexts(pool=4))
    a = torch.randn(64, 3)
    assert model.amortized_step(a).shape == (16,)
    a[5] = torch.nan
    assert model.amortized_step(a).mean().isnan()  # as it would be without


def test_a_gradient_that_overflowed_teaches_nothing(model, learned):
    """As the first ones do in half precision, before the losses' scale is found."""
    before = learned.gram.clone(), learned.moment.clone()
    learned.learn(learned.features(torch.randn(4, 3)), torch.tensor([torch.inf, 1.0, torch.nan, 2.0]))
    assert torch.allclose(learned.gram, 0.98 * before[0])
    assert torch.allclose(learned.moment, 0.98 * before[1])


@pytest.mark.parametrize("wrong", [{"pool": 1}, {"mix": 0.0}, {"mix": 1.5}])
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


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (2, 4)])
def test_killed_and_resumed_is_bit_identical(processes, accumulate):
    args = [*recipe(accumulate, processes=processes), "--model.loss=HardContexts", "--model.loss.pool=2"]
    run = Run([*args, "--run_folder=whole"])
    assert run.wait() == 0, run.output()
    assert last_checkpoint("whole")["state_dict"]["loss.gram"].any()  # what is compared below
    assert fit_with_kills(args, kills=2, rng=random.Random(processes), length=0.4 * accumulate * processes)
    assert_same("killed", "whole")


def test_what_it_learned_matters_to_training_alone():
    args = [*recipe(), "--run_folder=run", "--trainer.max_steps=7", "--model.loss=HardContexts"]
    main(args)
    plain = ["test", *recipe()[1:], "--ckpt_path=run", "--run_folder=plain"]
    main([*plain, "--model.loss=ObjectiveLoss"])
    main(["fit", *recipe()[1:], "--trainer.max_steps=7", "--run_folder=other"])
    main(["test", *recipe()[1:], "--ckpt_path=other", "--run_folder=hard", "--model.loss=HardContexts"])
