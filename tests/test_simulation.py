"""Simulation-based inference: priors, simulators, posteriors and their diagnostics, where the truth is known."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from amortized.cli.app import main
from amortized.contract import ProblemError, check_objective
from amortized.networks import MLP, Recurrent
from amortized.posteriors import DiagonalGaussian, FullGaussian
from amortized.problems.simulation import (
    SLCP,
    ConditionalFlow,
    GaussianLinear,
    GaussianLinearPosterior,
    JointPrior,
    LogNormalPrior,
    LotkaVolterra,
    NeuralPosterior,
    NormalPrior,
    Recorded,
    Simulation,
    Simulations,
    Simulator,
    TwoMoons,
    UniformPrior,
)
from amortized.problems.simulation.diagnostics import band, c2st, coverage, deviation, ranks
from amortized.solvers import LBFGS

PRIORS = {
    "normal": (NormalPrior, torch.distributions.Normal, [1.0, -2.0], [0.5, 3.0]),
    "log-normal": (LogNormalPrior, torch.distributions.LogNormal, [0.2, -3.0], [0.5, 1.0]),
    "uniform": (UniformPrior, torch.distributions.Uniform, [-1.0, 5.0], [1.0, 25.0]),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prior_of(name):
    if name == "joint":
        return JointPrior([prior_of(part) for part in PRIORS])
    cls, _, first, second = PRIORS[name]
    return cls(first, second)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_are_those_of_torch(name):
    prior, (_, cls, first, second) = prior_of(name), PRIORS[name]
    truth = cls(torch.tensor(first), torch.tensor(second))
    theta = prior.sample(20_000, generator())
    assert prior.contains(theta).all()
    torch.testing.assert_close(prior.log_prob(theta), truth.log_prob(theta).sum(1), rtol=1e-4, atol=1e-3)
    levels = truth.cdf(theta)
    assert (deviation(levels) < band(20_000, 1e-4)).all()


@pytest.mark.parametrize("name", [*PRIORS, "joint"])
def test_coordinates_are_one_to_one_and_their_volume_is_right(name):
    prior = prior_of(name).double()
    u = torch.randn(7, prior.dimension, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(prior.inverse(prior(u)), u, rtol=1e-6, atol=1e-6)
    for row in u:
        jacobian = torch.autograd.functional.jacobian(prior, row)
        torch.testing.assert_close(prior.log_det(row), torch.linalg.slogdet(jacobian).logabsdet)


def test_no_probability_leaks_out_of_the_support():
    simulator = TwoMoons()
    module = NeuralPosterior(MLP(2, 4), DiagonalGaussian(2), simulator)
    b = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, -0.5, -0.5]])
    q = module.decode(b, None)
    theta = q.sample((2000,))
    assert simulator.prior.contains(theta).all()
    assert (q.log_prob(torch.full((1, 2, 2), 1.01)) == -math.inf).all()
    edges = torch.linspace(-1, 1, 401).double()
    middles = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(middles, middles)
    torch.testing.assert_close(q.mean, theta.mean(0), rtol=0.1, atol=0.05)
    module.double()
    mass = module.decode(b.double(), None).log_prob(grid[:, None]).exp().sum(0) * (edges[1] - edges[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(2).double(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_a_conditional_flow_draws_from_its_density(kind):
    torch.manual_seed(0)
    family = ConditionalFlow(2, 3, 2, [8], kind).double()
    b = torch.randn(2, 3, dtype=torch.float64)
    noise = torch.randn(50, 2, 2, dtype=torch.float64)
    z, log_q = family.draw(b, noise)
    torch.testing.assert_close(family.distribution(b).log_prob(z), log_q)


def test_no_coordinates_make_a_flow_a_point_mass():
    torch.manual_seed(0)
    module = NeuralPosterior(MLP(2, 4), ConditionalFlow(2, 4, 2, [16]), TwoMoons())
    a = Simulations(TwoMoons(), num_val=8, draws=0).contexts("val")
    solved = LBFGS(100).solve(module, a, module.initial(a)).value
    assert solved.isfinite().all()
    further = torch.stack([module.objective(1e6 * torch.randn(8, 4, generator=generator(k)), a) for k in range(20)])
    assert (further.amin(0) > solved - 5).all()


def test_gaussian_linear_draws_have_the_moments_of_the_posterior():
    simulator = GaussianLinear(3)
    a = Simulations(simulator, num_val=5).contexts("val")
    torch.testing.assert_close(a.draws.mean(1), a.x / 2)
    covariance = torch.stack([draws.T.cov(correction=0) for draws in a.draws])
    torch.testing.assert_close(covariance, 0.05 * torch.eye(3).expand(5, 3, 3), rtol=1e-4, atol=1e-6)
    # and the joint is that of the simulator: theta given x is the posterior too
    theta = simulator.prior.sample(20_000, generator())
    z = (theta - simulator.simulate(theta, generator(1)) / 2) / 0.05**0.5
    assert (deviation(torch.special.ndtr(z)) < band(20_000, 1e-4)).all()


def test_two_moons_draws_are_of_the_posterior():
    """Ranks of theta among draws of the true posterior are uniform, and a rejection sampler agrees."""
    simulator = TwoMoons()
    a = Simulations(simulator, num_val=2000).contexts("val")
    draws = a.draws.transpose(0, 1)
    assert (deviation(ranks(a.theta, draws, generator())) < band(2000, 1e-3)).all()
    u = simulator.prior.inverse(draws)
    assert deviation(coverage(simulator.prior.inverse(a.theta), u, generator())) < band(2000, 1e-3)
    theta = simulator.prior.sample(2_000_000, generator())
    x = simulator.simulate(theta, generator(1))
    near = theta[(x - a.x[0]).norm(dim=1) < 0.02]
    truth = simulator.posterior(a.x[:1], 2000, generator())[0]
    assert len(near) > 200
    torch.testing.assert_close(near.mean(0), truth.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(near.std(0), truth.std(0), rtol=0.1, atol=0)


def test_slcp_is_the_gaussian_of_its_parameters():
    theta = torch.tensor([[0.7, -2.9, -1.5, 0.8, 0.6]]).expand(50_000, 5)
    x = SLCP().simulate(theta, generator()).flatten(0, 1)
    s1, s2, r = 1.5**2, 0.8**2, math.tanh(0.6)
    covariance = torch.tensor([[s1**2, r * s1 * s2], [r * s1 * s2, s2**2]])
    torch.testing.assert_close(x.mean(0), theta[0, :2], rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.03, atol=0.01)


def test_lotka_volterra_converges_with_the_step():
    theta = LotkaVolterra().prior.sample(200, generator())
    coarse, fine = (LotkaVolterra(step).simulate(theta, generator(1)) for step in (0.05, 0.0125))
    off = (coarse - fine).abs().amax((1, 2))
    assert off.quantile(0.95) < 0.02  # of a noise of 0.1
    start = torch.tensor([30.0, 1.0]).log()
    assert (coarse[:, 0] - start).std() == pytest.approx(0.1, rel=0.1)


class Failing(Simulator):
    """One half of the line makes NaN."""

    def __init__(self):
        super().__init__(NormalPrior([0.0], [1.0]))

    def simulate(self, theta, generator):
        return torch.where(theta > 0, theta + torch.randn(theta.shape, generator=generator), torch.nan)


def test_failed_simulations_are_drawn_anew_and_counted():
    data = Simulations(Failing(), batch_size=1000)
    a = data.batch("train", 0)
    assert a.x.isfinite().all()
    assert (a.theta > 0).all()
    assert len(a.x) == 1000
    assert data.simulated - data.failed == 1000
    assert data.failed / data.simulated == pytest.approx(0.5, abs=0.05)
    assert torch.equal(a.x, Simulations(Failing(), batch_size=1000).batch("train", 0).x)
    again = Simulations(Failing())
    again.load_state_dict(data.state_dict())
    assert (again.simulated, again.failed) == (data.simulated, data.failed)


def test_a_simulator_that_always_fails_is_an_error():
    class Broken(Failing):
        def simulate(self, theta, generator):
            return theta * torch.nan

    with pytest.raises(ProblemError, match="Broken: 8 of 8 simulations are not finite"):
        Simulations(Broken(), batch_size=8).batch("train", 0)


def test_so_many_simulations_are_passed_through_again():
    data = Simulations(TwoMoons(), simulations=100, batch_size=50, seed=3)
    first, second, third = (data.batch("train", k) for k in range(3))
    rows = {tuple(row) for a in (first, second) for row in a.x.tolist()}
    assert len(rows) == 100
    assert {tuple(row) for row in third.x.tolist()} < rows
    assert data.simulated == 100
    assert torch.equal(first.x, Simulations(TwoMoons(), simulations=100, batch_size=50, seed=3).batch("train", 0).x)


def record(path, n=60, bad=3):
    theta = TwoMoons().prior.sample(n, generator())
    x = TwoMoons().simulate(theta, generator(1))
    x[:bad] = torch.nan
    np.savez(path, theta=theta.numpy(), x=x.numpy())
    return theta[bad:], x[bad:]


def test_simulations_from_a_file(tmp_path):
    theta, x = record("simulations.npz")
    recorded = Recorded(UniformPrior([-1.0, -1.0], [1.0, 1.0]), [2])
    data = Simulations(recorded, file="simulations.npz", num_val=10, num_test=20, batch_size=8)
    parts = {split: data.contexts(split) for split in ("train", "val", "test")}
    assert [len(part.x) for part in parts.values()] == [27, 10, 20]
    assert torch.equal(torch.cat([parts[split].x for split in ("val", "test", "train")]), x)
    assert torch.equal(parts["val"].theta, theta[:10])
    assert (data.simulated, data.failed) == (60, 3)


@pytest.mark.parametrize(
    ("settings", "prior", "message"),
    [
        ({"num_val": 40, "num_test": 20}, UniformPrior([-1.0, -1.0], [1.0, 1.0]), "has 57 good simulations, too few"),
        ({"num_val": 1, "num_test": 1}, UniformPrior([0.0, 0.0], [1.0, 1.0]), "outside the prior's support"),
        ({"num_val": 1, "num_test": 1}, NormalPrior([0.0], [1.0]), "expected"),
    ],
)
def test_files_that_do_not_fit_are_errors(settings, prior, message):
    record("simulations.npz")
    with pytest.raises(ProblemError, match=message):
        Simulations(Recorded(prior, [2]), file="simulations.npz", **settings).contexts("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformPrior([0.0], [0.0]), "below its high"),
        (lambda: NormalPrior([0.0], [-1.0]), "positive"),
        (lambda: NormalPrior([0.0, 1.0], [1.0]), "two numbers for each"),
        (lambda: LotkaVolterra(0.4), "divide 2.1"),
        (lambda: Simulations(TwoMoons(), simulations=5, file="x.npz"), "not both"),
        (lambda: NeuralPosterior(MLP(2, 4), DiagonalGaussian(3), TwoMoons()), "has 2 parameters"),
        (lambda: GaussianLinearPosterior(MLP(2, 4), ConditionalFlow(2, 4), 2), "family of Gaussians"),
    ],
)
def test_settings_that_cannot_be_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_network_sees_no_parameters():
    module = NeuralPosterior(MLP(2, 4), DiagonalGaussian(2), TwoMoons())
    a = Simulations(TwoMoons(), num_val=4).contexts("val")
    assert torch.equal(module(a), module(Simulation(a.x, -a.theta, -a.draws)))


def test_full_gaussian_is_the_posterior_at_the_minimum():
    module = GaussianLinearPosterior(MLP(4, 14), FullGaussian(4), 4).double()
    a = Simulations(GaussianLinear(4), num_val=6).contexts("val")
    a = Simulation(*(leaf.double() for leaf in a))
    solution = LBFGS(300).solve(module, a, module.initial(a))
    q = module.decode(solution.b, a)
    torch.testing.assert_close(q.mean, a.x / 2, rtol=0, atol=0.02)  # by 512 points
    torch.testing.assert_close(module.simulator.exact(a.x).entropy(), module.optimum(a))
    check_objective(module, solution.b, a)


def test_a_series_of_any_length_has_an_order():
    network = Recurrent(["x"], 2, 3)
    a = Simulations(LotkaVolterra(), num_val=4).contexts("val")
    assert network(a).shape == network(a._replace(x=a.x[:, :3])).shape == (4, 3)
    assert not torch.allclose(network(a), network(a._replace(x=a.x.flip(1))))


def test_diagnostics_see_what_is_wrong():
    """Calibrated draws pass; ones that are too narrow, or moved, do not."""
    n = 2000
    theta = torch.randn(n, 3, generator=generator())
    draws = torch.randn(200, n, 3, generator=generator(1))
    limit = band(n, 0.001)
    for scale, shift, good in ((1.0, 0.0, True), (0.7, 0.0, False), (1.0, 0.3, False)):
        made = scale * draws + shift
        assert bool((deviation(ranks(theta, made, generator(2))) < limit).all()) is good
        assert bool(deviation(coverage(theta, made, generator(2))) < limit) is good


def test_c2st_is_one_half_for_equals_only():
    p, q = (torch.randn(200, 2, generator=generator(seed)) for seed in (0, 1))
    assert c2st(p, q) == pytest.approx(0.5, abs=0.08)
    assert c2st(p, q + 3) > 0.9


SMALL = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 300, "val_check_interval": 100, "check_val_every_n_epoch": None, "enable_progress_bar": False,
        "callbacks": [{"class_path": "PosteriorDiagnostics", "init_args": {"draws": 64, "c2st": 1}}],
    },
    "model": {"class_path": "GaussianLinearPosterior", "init_args": {
        "dimension": 2, "posterior": {"class_path": "FullGaussian", "init_args": {"latent": 2}},
        "network": {"class_path": "MLP", "init_args": {"in_features": 2, "out_features": 5}}, "draws": 50}},
    "data": {"class_path": "Simulations", "init_args": {
        "simulator": {"class_path": "GaussianLinear", "init_args": {"dimension": 2}}, "num_val": 64, "num_test": 200}},
    "gap": {"solver": {"class_path": "LBFGS", "init_args": {"steps": 50}}},
    "budget": {"enabled": False},
}  # fmt: skip


def test_fit_test_and_predict_from_the_command_line(capsys):
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    main(["fit", "-c", "small.yaml", "--run_folder=run"])
    found = json.loads(Path("run/results.json").read_text())
    assert found["decomposition"]["approximation"] == pytest.approx(0, abs=1e-3)
    assert 0 < found["gap"]["mean"] < 0.1
    diagnostics = found["diagnostics"]
    assert diagnostics["calibrated"]
    assert diagnostics["contexts"] == 200
    assert diagnostics["c2st"] == pytest.approx(0.5, abs=0.06)
    assert diagnostics["predictive"] > 0.97  # a network sees what it predicts
    assert diagnostics["simulated"] >= 300 * 256
    assert "posteriors calibrated" in capsys.readouterr().out
    page = Path("run/report.html").read_text()
    assert "Calibration</h2>" in page
    assert "Posterior predictive check</h2>" in page
    for name in ("calibration", "predictive", "solutions"):
        assert Path(f"run/pictures/{name}.png").stat().st_size > 5000

    saved = torch.load("run/checkpoints/step=00000300.ckpt", weights_only=True)["state_dict"]
    assert saved["standardised"]
    torch.testing.assert_close(saved["scale"], torch.full((2,), 0.2**0.5), rtol=0.05, atol=0)  # variance 0.1 + 0.1

    x = torch.tensor([[0.4, -0.6], [0.0, 0.2]])
    np.savez("observed.npz", x=x.numpy())
    main(["predict", "-c", "run/config.yaml", "--ckpt_path=run", "--data.predict=observed.npz", "--run_folder=predicted",
          "--model.draws=4000"])  # fmt: skip
    written = np.load("predicted/predictions.npz")
    draws, density = (torch.from_numpy(written[f"decoded.{name}"]) for name in ("draws", "log_density"))
    assert draws.shape == (2, 4000, 2)
    assert np.isnan(written["objective"]).all()  # nobody knows theta
    torch.testing.assert_close(draws.mean(1), x / 2, rtol=0, atol=0.06)
    truth = GaussianLinear(2).exact(x).log_prob(draws.transpose(0, 1)).T
    assert (density - truth).abs().median() < 0.2


def test_the_simulator_of_the_docs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "simulation.md").read_text()
    Path("spring.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    command = next(line.split()[1:] for line in page.splitlines() if "spring.Spring" in line)
    small = ["--trainer.max_steps=10", "--trainer.val_check_interval=10", "--data.num_test=64", "--gap.solver.steps=3"]
    main([*command, *small, "--data.num_val=16", "--budget.enabled=false", "--trainer.enable_progress_bar=false"])
    found = json.loads(Path("runs/spring/results.json").read_text())
    assert found["diagnostics"]["c2st"] is None
    assert set(found["diagnostics"]["ranks"]) == {"frequency", "damping"}
    assert "posteriors calibrated" in capsys.readouterr().out


def test_another_simulator_in_the_data_is_an_error(capsys):
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "-c", "small.yaml", "--run_folder=run", "--data.simulator=TwoMoons"])
    assert "the model's is GaussianLinear, 2 parameters and x (2,); the data's is TwoMoons" in capsys.readouterr().err
