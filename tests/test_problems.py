"""What every problem must keep, and inherits by one line in the list below."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from amortized.contexts import ContextDataModule
from amortized.module import AmortizedModule
from amortized.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    DeepSet,
    LearnedInitialization,
    Recurrent,
    SetMoments,
    SetTransformer,
    Stylization,
)
from amortized.posteriors import DiagonalGaussian, Flow, FullGaussian
from amortized.problem import (
    check_objective,
    draws,
    evaluate,
    is_random,
    leaves,
    map_leaves,
    num_rows,
    take,
    value_and_grad,
)
from amortized.problems import (
    SLCP,
    VAE,
    Classification,
    ConditionalFlow,
    GaussianLinear,
    GaussianLinearPosterior,
    GeneratedImages,
    Images,
    LabelledDigits,
    LinearGaussian,
    LinearGaussianContexts,
    LotkaVolterra,
    NeuralPosterior,
    Simulations,
    Sinusoid,
    SinusoidContexts,
    Sphere,
    SphereContexts,
    StylePairs,
    StyleTransfer,
    TwoMoons,
)
from amortized.solvers import LBFGS, GradientDescent, LearnedUpdate, Status


class Case(NamedTuple):
    """A problem to test: its module, its contexts, and whether a decoded solution is in its domain."""

    module: Any
    data: type[ContextDataModule]
    valid: Any


def finite(x):
    return x.isfinite().all()


def on_sphere(x):
    return torch.allclose(x.norm(dim=1), torch.ones(len(x)))


def in_unit_cube(x):
    return (x >= 0).all() and (x <= 1).all()


def on_simplex(x):
    return (x >= 0).all() and torch.allclose(x.sum(1), torch.ones(len(x)))


def finite_density(q):
    return finite(q.log_prob(q.mean))


def in_support(q):
    return finite(q.mean) and q.prior.contains(q.sample((5,))).all()


def vae(posterior, **kwargs):
    return VAE(MLP(64, posterior.features), MLP(4, 64), posterior, **kwargs)


def generated(**kwargs):
    torch.manual_seed(3)
    return GeneratedImages(MLP(4, 64), 4, **kwargs)


def conv_vae():
    return VAE(
        ConvEncoder(8, 8, [4, 8]), ConvDecoder(4, 8, [8, 4]), DiagonalGaussian(4), likelihood="gaussian", sigma=0.3
    )


def simulations(simulator):
    return lambda **settings: Simulations(simulator(), **settings)


def flow_posterior(network, simulator, kind="spline"):
    return NeuralPosterior(network, ConditionalFlow(simulator.prior.dimension, 4, 2, [16], kind), simulator)


BOWLS, SUPPORT = ["centres", "offsets"], ["support_x", "support_y"]
CASES = {
    "sphere": Case(lambda: Sphere(MLP(16, 3)), SphereContexts, on_sphere),
    "sphere, set": Case(lambda: Sphere(SetTransformer(BOWLS, 4, 3)), SphereContexts, on_sphere),
    "sphere, refined": Case(lambda: Sphere(MLP(16, 3), refine=GradientDescent(2)), SphereContexts, on_sphere),
    "sinusoid": Case(lambda: Sinusoid(DeepSet(SUPPORT, 2, 321), 16), SinusoidContexts, finite),
    "MAML": Case(lambda: Sinusoid(LearnedInitialization(321), 16, refine=GradientDescent(2)), SinusoidContexts, finite),
    "VAE": Case(lambda: vae(DiagonalGaussian(4)), Images, finite_density),
    "VAE, full": Case(lambda: vae(FullGaussian(4)), Images, finite_density),
    "VAE, flow": Case(lambda: vae(Flow(4, 2, 3)), Images, finite_density),
    "VAE, importance": Case(lambda: vae(DiagonalGaussian(4), importance=4, samples=2), Images, finite_density),
    "VAE, convolutional": Case(conv_vae, Images, finite_density),
    "SA-VAE": Case(lambda: vae(DiagonalGaussian(4), refine=GradientDescent(2, lr=0.01, learn_lr=True)), Images, finite_density),
    "IAVI": Case(lambda: vae(DiagonalGaussian(4), refine=LearnedUpdate(8, 2)), Images, finite_density),
    "VAE, generated": Case(lambda: vae(DiagonalGaussian(4), freeze_decoder=True), generated, finite_density),
    "linear": Case(lambda: LinearGaussian(MLP(10, 8), DiagonalGaussian(4)), LinearGaussianContexts, finite_density),
    "linear, full": Case(lambda: LinearGaussian(MLP(10, 14), FullGaussian(4)), LinearGaussianContexts, finite_density),
    "classification": Case(lambda: Classification(MLP(64, 10)), LabelledDigits, on_simplex),
    "Gaussian": Case(lambda: GaussianLinearPosterior(MLP(10, 65), FullGaussian(10)), simulations(GaussianLinear), in_support),
    "two moons": Case(lambda: flow_posterior(MLP(2, 4), TwoMoons()), simulations(TwoMoons), in_support),
    "SLCP": Case(lambda: flow_posterior(SetMoments(["x"], 2, 4), SLCP(), "affine"), simulations(SLCP), in_support),
    "lynxes": Case(lambda: flow_posterior(Recurrent(["x"], 2, 4), LotkaVolterra()), simulations(LotkaVolterra), in_support),
    "style": Case(lambda: StyleTransfer(Stylization(channels=(4, 8, 8), blocks=1, embedding=8)), StylePairs, in_unit_cube),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def data(case) -> ContextDataModule:
    return case.data(batch_size=8, num_val=24, num_test=24, eval_batch_size=16)


@pytest.fixture
def module(case) -> AmortizedModule:
    torch.manual_seed(0)
    return case.module()


def test_shapes(module, data):
    a = data.batch("train", 0)
    b = module(a)
    assert {len(leaf) for leaf in leaves(a)} == {8}
    assert b.shape == module.initial(a).shape
    assert b.is_floating_point()
    assert module.objective(b, a).shape == module.amortized_step(a).shape == (8,)
    nothing = take(a, slice(0, 0))
    assert module.objective(module.initial(nothing), nothing).shape == (0,)


def test_rows_do_not_mix(module, data):
    a = data.batch("train", 0)
    with torch.no_grad():
        b = module.network(module.observe(a))
        check_objective(module, b, a)
        check_objective(module, module.initial(a), a)
    some = torch.tensor([5, 2])
    random = is_random(module, b, a)
    predict = (lambda a: module.network(module.observe(a))) if random else module  # a refinement may draw, row by row
    torch.testing.assert_close(predict(a)[some], predict(take(a, some)), rtol=1e-3, atol=1e-5)
    if not random:
        torch.testing.assert_close(evaluate(module, b, a)[some], evaluate(module, b[some], take(a, some)))


def test_what_the_model_observes_is_a_context_of_as_many_rows(module, data):
    a = data.batch("train", 0)
    assert num_rows(module.observe(a)) == num_rows(a)


def test_gradients_reach_every_parameter(module, data):
    module.amortized_step(data.batch("train", 0)).mean().backward()
    without = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any() or not finite(p.grad))
    ]
    assert not without


def test_training_lowers_the_loss(module, data):
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    a, before = data.batch("train", 0), torch.tensor(0.0)
    for step in range(21):
        with draws(0, torch.device("cpu")):
            loss = module.amortized_step(a).mean()
        before = before if step else loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < before


def test_solver_never_worsens_a_row(module, data):
    module.eval()
    a = take(data.batch("val", 0), slice(0, 8))
    for start in (module.initial(a), module(a).detach()):
        with draws(0, torch.device("cpu")):
            solution = LBFGS(30).solve(module, a, start)
        assert solution.b.shape == start.shape
        assert not (solution.status == Status.DIVERGED).any()
        assert finite(solution.value)
        if not is_random(module, start, a):
            was = evaluate(module, start, a)
            assert (evaluate(module, solution.b, a) <= was + 1e-5 * was.abs()).all()
            assert (solution.value <= was + 1e-5 * was.abs()).all()


def test_declared_optimum_is_attained(module, data):
    if not hasattr(module, "optimum"):
        pytest.skip(f"{type(module).__name__} declares no optimum: none is known in closed form")
    a = map_leaves(lambda leaf: leaf.double(), data.batch("val", 0))
    module.double().eval()
    best = module.optimum(a)
    assert best.shape == (num_rows(a),)
    family = module.family_optimum(a) if hasattr(module, "family_optimum") else best
    assert (family >= best).all()
    solution = LBFGS(500).solve(module, a, module.initial(a))
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, family, rtol=1e-6, atol=1e-6)
    assert (module.objective(module(a), a) >= best - 1e-9).all()
    assert (module.objective(torch.randn_like(solution.b), a) >= best - 1e-9).all()


def test_decoded_solutions_are_in_the_domain(case, module, data):
    a = data.batch("val", 0)
    with torch.no_grad():
        for b in (module(a), module.initial(a), 10 * torch.randn_like(module.initial(a))):
            assert case.valid(module.decode(b, a))


def test_contexts_are_a_function_of_seed_split_and_number(case, data):
    again = case.data(batch_size=8, num_val=24, num_test=24, eval_batch_size=16)
    for split, number in (("train", 5), ("train", 0), ("val", 0), ("test", 1)):
        torch.manual_seed(number)
        assert equal(data.batch(split, number), again.batch(split, number))
    assert not equal(data.batch("train", 0), data.batch("train", 1))
    other = case.data(batch_size=8, num_val=24, num_test=24, eval_batch_size=16, seed=1)
    assert not equal(data.batch("train", 0), other.batch("train", 0))


def test_splits_are_disjoint(data):
    rows = {}
    for split in ("train", "val", "test"):
        a = data.contexts(split)
        a = data.batch(split, 0) if a is None else a
        rows[split] = {tuple(row) for row in torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves(a)], 1).tolist()}
    assert not rows["train"] & rows["val"]
    assert not rows["train"] & rows["test"]
    assert not rows["val"] & rows["test"]


def test_draws_a_picture(module, data, tmp_path):
    a = data.batch("val", 0)
    for n in (1, 6):
        part = take(a, slice(0, n))
        with torch.no_grad():
            figure = module.draw(part, {"network": module(part), "solver": module.initial(part)})
        if figure is not None:
            figure.savefig(tmp_path / "picture.png")
            assert (tmp_path / "picture.png").stat().st_size > 5000


def equal(a, other):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(other), strict=True))


def test_sphere_is_smooth_where_arccos_is_not():
    data, module = SphereContexts(num_val=64), Sphere(MLP(16, 3))
    a = data.contexts("val")
    for b in (a.centres[:, 0], -a.centres[:, 1], 1e-4 * a.centres[:, 2]):
        value, grad = value_and_grad(module, b, a)
        assert finite(value)
        assert finite(grad)


def test_sphere_is_solved_globally_from_the_lowest_centre():
    data, module = SphereContexts(num_val=256), Sphere(MLP(16, 3))
    a = data.contexts("val")
    found = LBFGS(200).solve(module, a, module.initial(a)).value
    many = map_leaves(lambda leaf: leaf.repeat_interleave(16, 0), a)
    starts = torch.randn(256 * 16, 3, generator=torch.Generator().manual_seed(0))
    lowest = LBFGS(200).solve(module, many, starts).value.view(256, 16).amin(1)
    assert (found < lowest + 1e-4).float().mean() > 0.97
    assert (lowest < found + 1e-4).float().mean() > 0.97


def test_sinusoid_solutions_are_weights_of_a_torch_module():
    data, module = SinusoidContexts(num_val=3, shots=5, queries=7), Sinusoid(LearnedInitialization(1761))
    a = data.contexts("val")
    b = 0.1 * torch.randn(3, 1761)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    for row, weights in enumerate(module.decode(b, a)):
        vector_to_parameters(weights, net.parameters())
        error = (net(a.query_x[row, :, None])[:, 0] - a.query_y[row]).square().mean()
        torch.testing.assert_close(error, module.objective(b, a)[row])


def test_sinusoid_hides_the_query_set_from_the_model():
    a = SinusoidContexts(num_val=4).contexts("val")
    module = Sinusoid(LearnedInitialization(1761), refine=GradientDescent(3))
    blank = a._replace(query_x=torch.zeros_like(a.query_x), query_y=torch.zeros_like(a.query_y))
    assert torch.equal(module(a), module(blank))


def test_sinusoids_of_every_scale_are_as_likely():
    a = SinusoidContexts(num_val=4000, queries=200, amplitude=(0.01, 1), log_uniform=True).contexts("val")
    amplitude = a.query_y.abs().amax(1)
    below = torch.stack([(amplitude < edge).float().mean() for edge in (10**-1.5, 0.1, 10**-0.5)])
    assert torch.allclose(below, torch.tensor([0.25, 0.5, 0.75]), atol=0.03)
    assert amplitude.min() > 0.009
    assert 0.95 < amplitude.max() <= 1


def test_classification_gap_is_the_divergence_from_the_target():
    module, a = Classification(MLP(64, 10)), LabelledDigits().contexts("val")
    b = module(a)
    divergence = torch.nn.functional.kl_div(b.log_softmax(1), a.target, reduction="none").sum(1)
    torch.testing.assert_close(module.objective(b, a) - module.optimum(a), divergence)
    assert torch.equal(module(a), module(a._replace(target=a.target.flip(1))))


def test_the_digits_are_split_once_for_all_seeds():
    sizes = {split: num_rows(LabelledDigits().contexts(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1257, "val": 180, "test": 360}
    assert equal(LabelledDigits(seed=1).contexts("test"), LabelledDigits().contexts("test"))


@pytest.mark.parametrize("network", [DeepSet, SetMoments, SetTransformer])
def test_sets_have_no_order(network):
    f = network(BOWLS, 4, 3)
    a = SphereContexts(num_val=5).contexts("val")
    torch.testing.assert_close(f(a), f(map_leaves(lambda leaf: leaf.flip(1), a)), rtol=1e-4, atol=1e-5)
    assert f(map_leaves(lambda leaf: leaf[:, :2], a)).shape == (5, 3)
