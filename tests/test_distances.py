"""Distances between solutions, by hand."""

import itertools
import math

import pytest
import torch

from amortized import ProblemError
from amortized.losses import KL, Angle, Chamfer, Euclidean, Matching

EVERY = [Euclidean(), Angle(), Angle(length=1), KL(), Matching(), Chamfer()]


@pytest.mark.parametrize("distance", EVERY, ids=lambda d: type(d).__name__)
def test_zero_at_the_solution_with_a_gradient_that_is_finite(distance):
    target = torch.randn(5, 4, 3)
    b = target.clone().requires_grad_()
    value = distance(b, target)
    assert value.shape == (5,)
    torch.testing.assert_close(value, torch.zeros(5), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(value.sum(), b)
    assert slope.isfinite().all()
    assert slope.abs().max() < 1e-3
    assert (distance(target + 0.1 * torch.randn(5, 4, 3), target) > 0).all()


def test_euclidean_is_the_mean_squared_difference():
    assert Euclidean()(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item() == 2.5


def test_the_angle_between_directions():
    b, target = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-3.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 3)
    angle = torch.tensor([math.pi / 2, math.pi / 4, math.pi])
    torch.testing.assert_close(Angle()(b, target), angle.square())
    off = torch.tensor([1.0, math.sqrt(2) - 1, 2.0])
    torch.testing.assert_close(Angle(length=0.5)(b, target), angle.square() + 0.5 * off.square())
    tiny = torch.tensor([[1.0, 1e-5]])
    torch.testing.assert_close(Angle()(tiny, target[:1]), torch.tensor([1e-10]), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        Angle(length=-1)


def test_kl_of_logits_whatever_is_added_to_them():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = float((p * (p / q).log()).sum())
    assert KL()((q.log() + 3)[None], (p.log() - 5)[None]).item() == pytest.approx(expected, rel=1e-5)
    none = torch.tensor([[0.0, 0.0, -torch.inf]])  # a class without probability
    assert KL()(torch.zeros(1, 3), none).item() == pytest.approx(math.log(1.5), rel=1e-5)


def test_matching_and_chamfer_do_not_see_the_order():
    target = torch.randn(7, 4, 2)
    b = target[:, torch.randperm(4)] + 0.01 * torch.randn(7, 4, 2)
    expected = [
        min(float((x[list(order)] - y).square().mean()) for order in itertools.permutations(range(4)))
        for x, y in zip(b, target, strict=True)
    ]
    torch.testing.assert_close(Matching()(b, target), torch.tensor(expected))
    torch.testing.assert_close(Matching()(b.flip(1), target), Matching()(b, target))
    torch.testing.assert_close(Chamfer()(b.flip(1), target), Chamfer()(b, target))


def test_chamfer_forgives_what_matching_does_not():
    b, target = torch.tensor([[[0.0], [0.0], [1.0]]]), torch.tensor([[[0.0], [1.0], [1.0]]])
    assert Chamfer()(b, target).item() == 0
    assert Matching()(b, target).item() == pytest.approx(1 / 3)
    torch.testing.assert_close(Chamfer()(target + 2, target), torch.tensor([((1 + 4 + 4) / 3 + (4 + 1 + 1) / 3) / 2]))


def test_sets_have_a_shape_and_a_size():
    with pytest.raises(ProblemError, match=r"shape \(B, n, d\); got \(2, 6\)"):
        Chamfer()(torch.zeros(2, 6), torch.zeros(2, 6))
    with pytest.raises(ProblemError, match="at most 6 elements; got 7: take Chamfer"):
        Matching()(torch.zeros(2, 7, 1), torch.zeros(2, 7, 1))
