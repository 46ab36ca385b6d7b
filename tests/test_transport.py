"""Optimal transport: against linear programs, known plans and dense sums; and the claim itself, that a learned start pays."""

from pathlib import Path

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from amortized import checkpoint
from amortized.contract import map_leaves, value_and_grad
from amortized.problems.transport import (
    CloudPotential,
    Clouds,
    CloudTransport,
    HistogramPotential,
    Histograms,
    HistogramTransport,
    ImagePairs,
    MixtureClouds,
    Transport,
    gaussian_potential,
)
from amortized.problems.transport.entropic import log_density
from amortized.solvers import LBFGS, Anderson

D = torch.float64


def grid(side=8, epsilon=0.01, **kwargs):
    return HistogramTransport(nn.Identity(), side=side, epsilon=epsilon, **kwargs)


def digits(count=16, dtype=D):
    return Histograms(*(part.to(dtype) for part in ImagePairs(num_val=count).contexts("val")))


def clouds(count=4, points=12, dimension=2):
    a = MixtureClouds(points=points, dimension=dimension, num_val=count).contexts("val")
    return Clouds(*(part.double() for part in a))


CASES = {
    "grid": lambda epsilon: (grid(epsilon=epsilon), digits()),
    "clouds": lambda epsilon: (CloudTransport(nn.Identity(), epsilon=epsilon), clouds()),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def exact_cost(C, alpha, beta):
    """``min <C, P>`` over plans of these marginals, as a linear program."""
    n, m = C.shape
    rows = torch.eye(n, dtype=D).repeat_interleave(m, 1)
    columns = torch.eye(m, dtype=D).repeat(1, n)
    found = linprog(
        C.flatten().numpy(),
        A_eq=torch.cat([rows, columns]).numpy(),
        b_eq=torch.cat([alpha, beta]).numpy(),
        method="highs",
    )
    assert found.success
    return found.fun


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_convolution_by_axes_is_the_dense_sum(epsilon, dtype):
    """For the potentials of a solution and for any others, with empty lines, in value and gradient."""
    module, a = grid(epsilon=epsilon).double(), digits()
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 30.0):
        f = scale * torch.randn(a.alpha.shape, generator=generator, dtype=D)
        u = log_density(f / epsilon, a.alpha)
        dense = Transport.log_convolve(module, u, a, epsilon)
        found = (
            grid(epsilon=epsilon).to(dtype).log_convolve(u.to(dtype).clamp_min(torch.finfo(dtype).min / 4), a, epsilon)
        )
        precision = torch.finfo(dtype).eps * (2000 + 8 * scale / epsilon)
        torch.testing.assert_close(found.double(), dense, rtol=0, atol=precision)
    b = f.to(dtype).requires_grad_()
    module.to(dtype).objective(b, Histograms(*(x.to(dtype) for x in a))).sum().backward()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize(("epsilon", "error"), [(1e-1, 1e-6), (1e-2, 1e-5), (1e-3, 1e-3), (1e-4, 0.1)])
def test_at_every_temperature_the_solution_is_that_of_a_linear_program_and_entropy(case, epsilon, error):
    """At 1e-4, 1/200 of the squared width of a pixel, Sinkhorn's algorithm is slow, but stays what it is."""
    module, a = case(epsilon)
    module.double()
    module.start = "annealed"
    solution = Anderson(steps=1000, memory=10, tol=error).solve(module, a, module.initial(a))
    assert solution.converged.all()
    plan, P = module.decode(solution.b, a), module.matrix(solution.b, a)
    alpha, beta = module.measures(a)
    C = module.costs(a).expand(len(P), -1, -1)
    torch.testing.assert_close(P.sum(2), alpha.weights)
    assert ((P.sum(1) - beta.weights).abs().sum(1) <= error).all()
    torch.testing.assert_close(plan.cost, (C * P).sum((1, 2)), rtol=1e-6, atol=1e-8)
    ratio = P / (alpha.weights.unsqueeze(2) * beta.weights.unsqueeze(1)).clamp_min(1e-300)
    primal = plan.cost + epsilon * torch.special.xlogy(P, ratio).sum((1, 2))
    torch.testing.assert_close(primal, -solution.value, rtol=0, atol=error / 2)
    for row in range(2):  # <C, P> <= value <= <C, P'> + epsilon H, for the program's P' of entropy H <= log 64
        least = exact_cost(C[row], alpha.weights[row], beta.weights[row])
        assert least * (1 - error) <= -solution.value[row] <= least + 4.2 * epsilon
        assert least - error / 2 <= plan.cost[row] <= -solution.value[row] + error / 2


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
def test_single_precision_finds_the_same_down_to_small_temperatures(case, epsilon):
    module, a = case(epsilon)
    module.start = "annealed"
    module.float()
    single = map_leaves(Tensor.float, a)
    rough = Anderson(steps=50, memory=5, tol=1e-6).solve(module, single, module.initial(single))
    assert rough.residual.isfinite().all()
    error = module.double().fixed_point_error(rough.b.double(), module.update(rough.b.double(), a), a)
    torch.testing.assert_close(rough.residual.double(), error, rtol=0.02, atol=2e-7 / epsilon)


def test_the_gradient_is_what_the_plan_misses_of_its_first_marginal(case):
    module, a = case(0.02)
    module.double()
    b = 0.05 * torch.randn(module.initial(a).shape, generator=torch.Generator().manual_seed(0), dtype=D)
    alpha, beta = module.measures(a)
    f, g = b, module.transform(b, a)
    scaled = (f.unsqueeze(2) + g.unsqueeze(1) - module.costs(a)) / module.epsilon
    P = alpha.weights.unsqueeze(2) * beta.weights.unsqueeze(1) * scaled.exp()
    torch.testing.assert_close(P.sum(1), beta.weights)
    missed = P.sum(2) - alpha.weights
    torch.testing.assert_close(value_and_grad(module, b, a)[1], missed)
    torch.testing.assert_close(module.fixed_point_error(b, module.update(b, a), a), missed.abs().sum(1))


def test_a_constant_and_points_without_mass_change_nothing(case):
    module, a = case(0.02)
    module.double()
    b = torch.randn(module.initial(a).shape, generator=torch.Generator().manual_seed(0), dtype=D)
    other = torch.where(module.measures(a)[0].weights > 0, b, 100 * b) + 3
    torch.testing.assert_close(module.objective(b, a), module.objective(other, a))
    torch.testing.assert_close(module.decode(b, a), module.decode(other, a))


def test_plain_and_accelerated_sinkhorn_and_lbfgs_agree(case):
    module, a = case(0.02)
    module.double()
    start = module.initial(a)
    plain, accelerated = (Anderson(steps=3000, memory=m, tol=1e-5).solve(module, a, start) for m in (0, 5))
    descent = LBFGS(2000, tol=1e-6).solve(module, a, start)
    for found in (plain, accelerated, descent):
        assert found.converged.all()
        torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-7)
        torch.testing.assert_close(module.decode(found.b, a).map, module.decode(plain.b, a).map, rtol=0, atol=1e-2)
    assert accelerated.iterations.double().mean() < 0.7 * plain.iterations.double().mean()


def test_gaussians_are_transported_in_closed_form():
    """On a cloud of many draws the potential of Gaussians is all but a fixed point, and its map is the known one."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 1500, 2, generator=generator, dtype=D)
    y = y @ torch.tensor([[1.5, 0.4], [0.4, 0.6]], dtype=D) + torch.tensor([3.0, -1.0], dtype=D)
    a = Clouds(x, y)
    gaussians, zeros = (
        CloudTransport(nn.Identity(), epsilon=0.5, start=start).double() for start in ("gaussians", "zeros")
    )
    error = [m.fixed_point_error(m.initial(a), m.update(m.initial(a), a), a) for m in (gaussians, zeros)]
    assert error[0] < 0.1 < 1 < error[1]


def test_translation_is_found_by_gaussians_at_once():
    a = clouds()
    a = Clouds(a.x, a.x + torch.tensor([0.3, -0.2], dtype=D))
    module = CloudTransport(nn.Identity(), epsilon=1e-4, start="gaussians").double()
    plan = module.decode(module.initial(a), a)
    torch.testing.assert_close(plan.map, a.y, rtol=0, atol=3e-3)
    torch.testing.assert_close(plan.cost, torch.full_like(plan.cost, 0.13), rtol=0, atol=1e-3)


def test_a_cloud_of_one_place_has_a_start():
    a = clouds()
    a = Clouds(a.x, torch.full_like(a.y, 0.25))
    module = CloudTransport(nn.Identity(), epsilon=0.01, start="gaussians").double()
    torch.testing.assert_close(module.decode(module.initial(a), a).map, a.y)


def test_what_was_not_in_the_cloud_is_carried_as_what_was():
    module, a = CASES["clouds"](0.02)
    module.double()
    b = Anderson(memory=5, tol=1e-8).solve(module, a, module.initial(a)).b
    torch.testing.assert_close(module.carry(b, a, a.x), module.decode(b, a).map)


def test_a_network_of_points_has_no_order():
    module = CloudTransport(CloudPotential(2, 0.02), epsilon=0.02).double()
    a = clouds()
    b = module(a)
    order = torch.randperm(12)
    torch.testing.assert_close(module(Clouds(a.x[:, order], a.y.flip(1))), b[:, order])
    assert module(Clouds(a.x[:, :5], a.y)).shape == (4, 5)


def test_the_way_between_two_histograms_keeps_the_mass():
    module, a = grid(epsilon=1e-3).double(), digits(4)
    b = Anderson(steps=2000, tol=1e-6).solve(module, a, module.initial(a)).b
    first, half, last = module.interpolate(b, a, [0.0, 0.5, 1.0])
    torch.testing.assert_close(first, a.alpha, rtol=0, atol=1e-3)
    torch.testing.assert_close(last, a.beta, rtol=0, atol=1e-3)
    middle = (half.unsqueeze(2) * module.points).sum(1)
    ends = [(w.unsqueeze(2) * module.points).sum(1) for w in a]
    torch.testing.assert_close(middle, (ends[0] + ends[1]) / 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"), [({"epsilon": 0.0}, "positive"), ({"start": "warm"}, "zeros"), ({"side": 1}, "side")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        grid(**settings)


@pytest.fixture(scope="module")
def trained():
    """The module of the reference checkpoint, and test pairs."""
    saved = checkpoint.load(Path(__file__).parent.parent / "checkpoints" / "transport_digits.ckpt")
    init = saved[checkpoint.RECIPE]["model"]["init_args"]
    network = HistogramPotential(**init["network"]["init_args"])
    module = HistogramTransport(network, side=init["side"], epsilon=init["epsilon"])
    module.load_state_dict(saved["state_dict"])
    return module.eval(), ImagePairs(num_test=128).contexts("test")


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize(("error", "zeros", "gaussians"), [(1e-2, 0.5, 0.6), (1e-3, 0.75, 0.8)])
def test_a_learned_start_saves_iterations(trained, error, zeros, gaussians, memory):
    """Mean iterations from the prediction, as a share of those from zero and from Gaussians."""
    module, a = trained
    with torch.no_grad():
        starts = [
            module(a),
            torch.zeros_like(a.alpha),
            gaussian_potential(a.alpha, module.points, a.beta, module.points, 0.01),
        ]
    found = [Anderson(steps=1000, memory=memory, tol=error).solve(module, a, b) for b in starts]
    assert all(solution.converged.all() for solution in found)
    learned, from_zeros, from_gaussians = (solution.iterations.double().mean() for solution in found)
    assert learned < zeros * from_zeros
    assert learned < gaussians * from_gaussians
