"""What every problem must keep, and inherits by one line in the list below."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import map_leaves, num_rows, value_and_grad
from amortized.losses import FixedPointLoss, RegressionLoss, ZerothOrderLoss
from amortized.module import AmortizedModule
from amortized.networks import (
    MLP,
    ConvBlocks,
    ConvDecoder,
    ConvEncoder,
    DeepSet,
    LearnedInitialization,
    MessagePassing,
    Recurrent,
    ResidualMLP,
    SetMoments,
    SetTransformer,
)
from amortized.posteriors import DiagonalGaussian, Flow, FullGaussian
from amortized.problems import (
    ALISTA,
    LISTA,
    SLCP,
    VAE,
    BlackBoxInventory,
    CartPole,
    ChainStates,
    Classification,
    CloudPotential,
    CloudTransport,
    ConditionalFlow,
    ConvexDC3,
    ConvexPotential,
    CosineDictionary,
    DC3Contexts,
    DoubleIntegrator,
    Equilibrium,
    EquilibriumState,
    FactorMarkets,
    FewShotClassification,
    FewShotRegression,
    GaussianDictionary,
    GaussianLinear,
    GaussianLinearPosterior,
    GaussianPair,
    GaussianProcesses,
    GaussianProcessRegression,
    GeneratedImages,
    Glyphs,
    HistogramPotential,
    HistogramTransport,
    ImagePairs,
    Images,
    IntegratorStates,
    Inventory,
    InventoryContexts,
    LabelledDigits,
    LinearGaussian,
    LinearGaussianContexts,
    LotkaVolterra,
    MassChain,
    MixtureClouds,
    NeuralPosterior,
    NeuralProcess,
    NonconvexDC3,
    OperatingPoint,
    Patches,
    Pendulum,
    Policy,
    Portfolio,
    PowerFlow,
    PowerFlowContexts,
    PowerFlowLoss,
    Prototypes,
    Shapes,
    Simulations,
    Sinusoid,
    SinusoidContexts,
    SparseCoding,
    SparseSignals,
    Sphere,
    SphereContexts,
    StylePairs,
    StyleTransfer,
    SwingUp,
    SystemStates,
    Template,
    TwoMoons,
    Wasserstein2,
)
from amortized.problems.inference.evidence import AnnealedImportanceSampling
from amortized.problems.style import Stylization
from amortized.solvers import LBFGS, Box, Completion, Gauge, GradientDescent, LearnedUpdate, Sequence, Simplex
from amortized.testing import CHECKS, check_problem, equal


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


def moves_inside_the_cube(plan):
    return (plan.map > -1e-4).all() and (plan.map < 1 + 1e-4).all() and (plan.cost > -1e-6).all() and finite(plan.f)


def solved_potential():
    loss = RegressionLoss(field="conjugate")
    return Wasserstein2(ResidualMLP(2, 2), ConvexPotential(2, [8, 8]), conjugate=LBFGS(5), loss=loss)


def messages():
    return MessagePassing(["mean"], "covariance", 1, 8, 2)


def power_flow():
    network = OperatingPoint("case14", [16])
    return PowerFlow(network, refine=Completion(corrections=3), loss=PowerFlowLoss())


def within_physics(dispatch):
    return all(finite(x) for x in dispatch)


def simulations(simulator):
    return lambda **settings: Simulations(simulator(), **settings)


def flow_posterior(network, simulator, kind="spline"):
    return NeuralPosterior(network, ConditionalFlow(simulator.prior.dimension, 4, 2, [16], kind), simulator)


def few_shot(network, adapt="all", **settings):
    return FewShotRegression(network, Template(MLP(1, 1, [16, 16], "tanh"), adapt), **settings)


def step_sizes(features):
    return GradientDescent(2, 0.02, learn_lr=True, features=features)


def letters(network, adapt="last", **settings):
    return FewShotClassification(network, Template(ConvBlocks(28, 5, [8, 8, 8]), adapt), **settings)


def normal(q):
    return finite(q.mean) and (q.stddev > 0).all()


def swing_up(system):
    return SwingUp(Policy(system, horizon=20, proposals=2, hidden=[16]), system, horizon=20)


def of_system(system):
    return lambda **settings: SystemStates(system(), **settings)


def black_box():
    return BlackBoxInventory(MLP(9, 3), periods=20, loss=ZerothOrderLoss(0.3))


def positive(stock):
    return (stock >= 0).all()


def weak(forces):
    return (forces.abs() <= 10).all()


def sparse(refine):
    return SparseCoding(MLP(25, 50), GaussianDictionary(25, 50), refine=refine)


def sparse_signals(**settings):
    return SparseSignals(GaussianDictionary(25, 50), **settings)


def sparse_patches():
    return SparseCoding(MLP(64, 144), CosineDictionary(learn=True), patches=True, refine=LISTA(64, 144, 3))


def equilibrium_state():
    return EquilibriumState(MLP(64, 16), Equilibrium(64, 10, 16), loss=FixedPointLoss(2))


def representable(x):
    return finite(x.code) and finite(x.signal)


BOWLS, SUPPORT = ["centres", "offsets"], ["support_x", "support_y"]
CASES = {
    "sphere": Case(lambda: Sphere(MLP(16, 3)), SphereContexts, on_sphere),
    "sphere, set": Case(lambda: Sphere(SetTransformer(BOWLS, 4, 3)), SphereContexts, on_sphere),
    "sphere, refined": Case(lambda: Sphere(MLP(16, 3), refine=GradientDescent(2)), SphereContexts, on_sphere),
    "sinusoid": Case(lambda: Sinusoid(DeepSet(SUPPORT, 2, 321), 16), SinusoidContexts, finite),
    "MAML": Case(lambda: Sinusoid(LearnedInitialization(321), 16, refine=GradientDescent(2)), SinusoidContexts, finite),
    "Meta-SGD": Case(lambda: few_shot(LearnedInitialization(321), refine=step_sizes(321)), SinusoidContexts, finite),
    "ANIL": Case(lambda: few_shot(LearnedInitialization(17), "last", refine=GradientDescent(2, 0.02)), SinusoidContexts, finite),
    "FiLM": Case(lambda: few_shot(DeepSet(SUPPORT, 2, 66), "film"), SinusoidContexts, finite),
    "low rank": Case(lambda: few_shot(DeepSet(SUPPORT, 2, 264), "low_rank", refine=GradientDescent(2)), SinusoidContexts, finite),
    "prototypes": Case(lambda: letters(Prototypes(5)), Glyphs, finite),
    "prototypes, refined": Case(lambda: letters(Prototypes(5), refine=GradientDescent(2, 0.01)), Glyphs, finite),
    "Gaussian process": Case(lambda: GaussianProcessRegression(NeuralProcess(features=16, layers=2)), GaussianProcesses, normal),
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
    "transport": Case(lambda: HistogramTransport(HistogramPotential()), ImagePairs, moves_inside_the_cube),
    "transport, clouds": Case(lambda: CloudTransport(CloudPotential(2, 0.01)), MixtureClouds, moves_inside_the_cube),
    "conjugate": Case(lambda: Wasserstein2(MLP(2, 2), GaussianPair(2).known), GaussianPair, finite),
    "potential": Case(lambda: Wasserstein2(ResidualMLP(2, 2), ConvexPotential(2, [8, 8])), Shapes, finite),
    "potential, solved": Case(solved_potential, Shapes, finite),
    "Gaussian": Case(lambda: GaussianLinearPosterior(MLP(10, 65), FullGaussian(10)), simulations(GaussianLinear), in_support),
    "two moons": Case(lambda: flow_posterior(MLP(2, 4), TwoMoons()), simulations(TwoMoons), in_support),
    "SLCP": Case(lambda: flow_posterior(SetMoments(["x"], 2, 4), SLCP(), "affine"), simulations(SLCP), in_support),
    "lynxes": Case(lambda: flow_posterior(Recurrent(["x"], 2, 4), LotkaVolterra()), simulations(LotkaVolterra), in_support),
    "inventory": Case(lambda: Inventory(MLP(9, 3)), InventoryContexts, positive),
    "inventory, black box": Case(black_box, InventoryContexts, positive),
    "double integrator": Case(lambda: DoubleIntegrator(MLP(2, 20), refine=Gauge()), IntegratorStates, finite),
    "chain of masses": Case(lambda: MassChain(MLP(8, 60), refine=Sequence([Box(-1, 1), Gauge()])), ChainStates, finite),
    "pendulum": Case(lambda: swing_up(Pendulum()), of_system(Pendulum), weak),
    "cart-pole": Case(lambda: swing_up(CartPole()), of_system(CartPole), weak),
    "DC3": Case(lambda: ConvexDC3(ResidualMLP(50, 100, [16]), refine=Gauge()), DC3Contexts, finite),
    "DC3, not convex": Case(lambda: NonconvexDC3(ResidualMLP(50, 100, [16]), refine=Gauge()), DC3Contexts, finite),
    "portfolio": Case(lambda: Portfolio(messages(), refine=Simplex()), FactorMarkets, finite),
    "power flow": Case(power_flow, PowerFlowContexts, within_physics),
    "sparse codes": Case(lambda: sparse(LISTA(25, 50, 3)), sparse_signals, representable),
    "sparse codes, analytic": Case(lambda: sparse(ALISTA(3)), sparse_signals, representable),
    "sparse codes, dictionary learning": Case(sparse_patches, Patches, representable),
    "equilibrium": Case(lambda: Classification(Equilibrium(64, 10, 16)), LabelledDigits, on_simplex),
    "equilibrium's state": Case(equilibrium_state, Images, finite),
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


@pytest.mark.parametrize("check", CHECKS)
def test_every_problem(check, module, data):
    CHECKS[check](module, data)


def test_decoded_solutions_are_in_the_domain(case, module, data):
    a = data.batch("val", 0)
    with torch.no_grad():
        for b in (module(a), module.initial(a), 10 * torch.randn_like(module.initial(a))):
            assert case.valid(module.decode(b, a))


def test_a_copy_of_a_vae_estimates_the_evidence_of_its_own_decoder():
    model = vae(DiagonalGaussian(4), evidence=AnnealedImportanceSampling(3, 2, 2))
    CHECKS["copies_and_pickles"](model, Images())


class Wrong(Sphere):
    """Whose copies are the original; and which claims what it does not attain."""

    def __init__(self, **kwargs):
        super().__init__(MLP(16, 3), **kwargs)
        self.optimum = lambda a: super(Wrong, self).objective(self.initial(a), a) - self.network[0].bias.abs().sum()


def test_a_problem_of_ones_own_is_checked_by_name():
    check_problem(Sphere(MLP(16, 3)), SphereContexts())
    with pytest.raises(AssertionError, match="declared_optimum_is_attained: L-BFGS ends .* declare family_optimum"):
        check_problem(Wrong(), SphereContexts())
    with pytest.raises(Exception, match="pickle"):
        CHECKS["copies_and_pickles"](Wrong(), SphereContexts())


def test_another_seed_gives_other_contexts(case, data):
    other = case.data(batch_size=8, num_val=24, num_test=24, eval_batch_size=16, seed=1)
    assert not equal(data.batch("train", 0), other.batch("train", 0))


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
