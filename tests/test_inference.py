"""Posterior families, bounds, evidence and gaps, where the truth is known; and the files that images come from."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy import Quadratic

from amortized import Pretrained, checkpoint
from amortized.checkpoint import CheckpointError, sha256
from amortized.cli.app import main
from amortized.contexts import images
from amortized.contract import ProblemError, draws, evaluate
from amortized.evaluation.gap import measure_gap
from amortized.evaluation.metric import decomposition
from amortized.networks import MLP, ConvDecoder, ConvEncoder
from amortized.posteriors import DiagonalGaussian, Flow, FullGaussian, normal_points, standard_normal
from amortized.problems import VAE, Images, LinearGaussian, LinearGaussianContexts
from amortized.problems.inference.evidence import AnnealedImportanceSampling, ImportanceSampling
from amortized.problems.inference.linear_gaussian import loadings
from amortized.solvers import LBFGS, GradientDescent, LearnedUpdate

CPU = torch.device("cpu")
FAMILIES = {"diagonal": DiagonalGaussian, "full": FullGaussian, "flow": lambda d: Flow(d, 3, 5)}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param](4).double()


def coordinates(family, rows=3, scale=0.5):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(rows, family.features, generator=generator, dtype=torch.float64)


def noise(count, rows=3, latent=4):
    return normal_points(latent, count).double()[:, None].expand(-1, rows, -1)


def test_density_of_a_draw_is_that_of_the_distribution(family):
    b = coordinates(family)
    z, log_q = family.draw(b, noise(50))
    torch.testing.assert_close(family.distribution(b).log_prob(z), log_q)


def test_moments_are_those_of_the_draws(family):
    b = coordinates(family, scale=0.2)
    z, _ = family.draw(b, noise(2**14))
    q = family.distribution(b)
    torch.testing.assert_close(q.mean, z.mean(0), rtol=0.03, atol=0.03)
    torch.testing.assert_close(q.stddev, z.std(0), rtol=0.05, atol=0.03)


def test_zero_is_the_prior(family):
    z, log_q = family.draw(torch.zeros(3, family.features, dtype=torch.float64), noise(9))
    torch.testing.assert_close(z, noise(9))
    torch.testing.assert_close(log_q, standard_normal(noise(9)))


def test_divergence_in_closed_form_is_that_of_draws(family):
    b = coordinates(family)
    z, log_q = family.draw(b, noise(2**14))
    closed = family.divergence(b)
    if closed is None:
        pytest.skip(f"{type(family).__name__} has no divergence in closed form")
    torch.testing.assert_close(closed, (log_q - standard_normal(z)).mean(0), rtol=0.01, atol=0.02)


def test_a_full_covariance_is_recovered():
    family, b = FullGaussian(3), torch.randn(2, 9)
    z, _ = family.draw(b, torch.randn(100_000, 2, 3, generator=torch.Generator().manual_seed(0)))
    for row in range(2):
        covariance = family.distribution(b).covariance_matrix[row]
        torch.testing.assert_close(z[:, row].T.cov(), covariance, rtol=0.1, atol=0.1 * float(covariance.abs().max()))


def test_a_flow_bends_what_a_gaussian_cannot():
    """The density of a banana, z_2 given z_1 ~ N(z_1^2, 0.3^2): a Gaussian misses it by nats, a flow nearly fits it."""

    class Banana:
        def __init__(self, family):
            self.family, self.points = family, noise(512, 1, 2)

        def objective(self, b, a):
            z, log_q = self.family.draw(b, self.points.expand(-1, len(b), -1))
            x, y = z.unbind(-1)
            return (log_q + 0.5 * x**2 + 0.5 * ((y - x**2) / 0.3) ** 2 + np.log(2 * np.pi * 0.3)).mean(0)

    gaps = {}
    for name, family in (("full", FullGaussian(2)), ("flow", Flow(2, 4, 16))):
        family, a = family.double(), torch.zeros(1, 1, dtype=torch.float64)
        start = torch.zeros(1, family.features, dtype=torch.float64)
        gaps[name] = float(LBFGS(300).solve(Banana(family), a, start).value)
    assert gaps["full"] > 0.5
    assert -0.02 < gaps["flow"] < 0.1


# ---- the linear-Gaussian model


def linear(posterior, **kwargs):
    torch.manual_seed(0)
    return LinearGaussian(MLP(10, posterior.features, [16]), posterior, **kwargs).double().eval()


def sampled(posterior, **kwargs):
    """The same model as an ordinary VAE, whose bound is estimated from draws."""
    decoder = nn.Linear(4, 10, bias=False)
    decoder.weight.data = loadings(10, 4)
    torch.manual_seed(0)
    encoder = MLP(10, posterior.features, [16])
    kwargs = {"likelihood": "gaussian", "sigma": 0.5, "freeze_decoder": True, "eval_samples": 4096} | kwargs
    return VAE(encoder, decoder, posterior, **kwargs).double().eval()


def near(b):
    """What an encoder might predict."""
    return b + 0.2 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype)


@pytest.fixture
def contexts():
    return LinearGaussianContexts(num_test=64).contexts("test").double()


@pytest.mark.parametrize("posterior", [DiagonalGaussian(4), FullGaussian(4)])
def test_gaps_agree_with_the_closed_form(posterior, contexts):
    exact, a = linear(posterior), contexts
    with torch.no_grad():
        b = exact(a)
    rows, _ = measure_gap(exact, a, b, LBFGS(200), torch.arange(len(a)), decompose=True)
    terms = decomposition(rows)
    family, optimum = exact.family_optimum(a), exact.optimum(a)
    at = evaluate(exact, b, a)
    assert float(terms["amortization"]) == pytest.approx(float((at - family).mean()), abs=1e-6)
    assert float(terms["approximation"]) == pytest.approx(float((family - optimum).mean()), abs=1e-6)
    assert float(terms["total"]) == pytest.approx(float((at - optimum).mean()), abs=1e-6)
    assert abs(float(terms["solver"])) < 1e-6


def test_draws_of_half_precision_are_finite(contexts):
    model = sampled(DiagonalGaussian(4), eval_samples=16).bfloat16()
    many = contexts.bfloat16().repeat(256, 1)  # points within 2^-9 of 1 are 1 in bfloat16, their noise infinite
    assert model.objective(torch.zeros(len(many), 8, dtype=torch.bfloat16), many).isfinite().all()


@pytest.mark.parametrize("posterior", [DiagonalGaussian(4), FullGaussian(4)])
def test_gaps_from_draws_agree_with_the_closed_form(posterior, contexts):
    exact, model, a = linear(posterior), sampled(posterior), contexts
    b = near(LBFGS(200).solve(exact, a, exact.initial(a)).b)
    rows, _ = measure_gap(model, a, b, LBFGS(200, tol=1e-4), torch.arange(len(a)))
    truth = evaluate(exact, b, a) - exact.family_optimum(a)
    assert float(rows.gap.mean()) == pytest.approx(float(truth.mean()), abs=1e-3)
    approximation = rows.reference - exact.optimum(a)
    assert float(approximation.mean()) == pytest.approx(
        float((exact.family_optimum(a) - exact.optimum(a)).mean()), abs=1e-3
    )


def test_evidence_is_that_of_the_closed_form(contexts):
    exact, a = linear(DiagonalGaussian(4)), contexts
    best = LBFGS(200).solve(exact, a, exact.initial(a)).b
    truth = -exact.optimum(a)
    for estimate in (
        ImportanceSampling(20_000),
        ImportanceSampling(20_000, scale=1.3),
        AnnealedImportanceSampling(20, 5, 64),
    ):
        with draws(0, CPU):
            error = estimate(exact, a, best) - truth
        assert float(error.abs().mean()) < 0.05
        assert float(error.mean()) == pytest.approx(0, abs=0.02)


def test_annealing_from_the_prior_beats_importance_sampling_in_many_dimensions():
    model = LinearGaussian(MLP(30, 32), DiagonalGaussian(16), observed=30).double()
    a = LinearGaussianContexts(observed=30, latent=16, num_test=32).contexts("test").double()
    truth = -model.optimum(a)
    with draws(0, CPU):
        sampled = ImportanceSampling(20_000)(model, a, model.initial(a)) - truth
        annealed = AnnealedImportanceSampling(200, 5, 16)(model, a, model.initial(a)) - truth  # 16,000 evaluations
    assert float(sampled.mean()) < -5
    assert float(annealed.abs().mean()) < 1


def test_estimators_are_unbiased_for_the_evidence_itself(contexts):
    exact, a = linear(DiagonalGaussian(4)), contexts[:1].expand(4000, -1)
    b, truth = near(LBFGS(200).solve(exact, contexts[:1], exact.initial(contexts[:1])).b), -exact.optimum(a)
    for estimate in (ImportanceSampling(2), AnnealedImportanceSampling(3, 2, 2)):
        with draws(0, CPU):
            ratio = (estimate(exact, a, b.expand(4000, -1)) - truth).exp()
        assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / 4000**0.5)
        assert 0.05 < float(ratio.std()) < 5


def test_a_test_splits_the_gap_by_estimated_evidence(contexts):
    model = sampled(DiagonalGaussian(4), eval_samples=256, evidence=AnnealedImportanceSampling(100, 5, 32))
    exact, a = linear(DiagonalGaussian(4)), contexts[:32]
    with torch.no_grad():
        b = model(a)
    rows, _ = measure_gap(model, a, b, LBFGS(100, tol=1e-2), torch.arange(len(a)), decompose=True)
    terms = decomposition(rows)
    truth = float((exact.family_optimum(a) - exact.optimum(a)).mean())
    assert float(terms["approximation"]) == pytest.approx(truth, abs=0.05)


def test_bounds_tighten_with_importance_and_end_at_the_evidence(contexts):
    posterior, truth = DiagonalGaussian(4), linear(DiagonalGaussian(4)).optimum(contexts)
    best = LBFGS(200).solve(linear(posterior), contexts, torch.zeros(64, 8, dtype=torch.float64)).b
    means = []
    for K in (1, 5, 500):
        model = sampled(posterior, importance=K, eval_samples=2000 // K)
        with draws(0, CPU):
            means.append(float((evaluate(model, best, contexts) - truth).mean()))
    assert means[0] > means[1] + 0.05 > means[2] + 0.05
    assert means[2] == pytest.approx(0, abs=0.01)


def test_beta_weighs_the_divergence(contexts):
    posterior = DiagonalGaussian(4)
    b = 0.5 * torch.randn(64, 8, dtype=torch.float64)
    values = []
    for beta in (0.0, 1.0, 3.0):
        with draws(0, CPU):
            values.append(evaluate(sampled(posterior, beta=beta), b, contexts))
    torch.testing.assert_close(values[1] - values[0], posterior.divergence(b))
    torch.testing.assert_close(values[2] - values[0], 3 * posterior.divergence(b))


# ---- the model


def digits(**kwargs):
    torch.manual_seed(0)
    posterior = DiagonalGaussian(4)
    return VAE(MLP(64, 8, [16]), MLP(4, 64, [16]), posterior, **kwargs)


@pytest.mark.parametrize(
    ("pixels", "height", "shape"), [(64, None, (8, 8)), (12, None, (1, 12)), (12, 4, (4, 3)), (1, None, (1, 1))]
)
def test_images_of_any_shape_are_drawn(pixels, height, shape):
    model = VAE(MLP(pixels, 8, [4]), MLP(4, pixels, [4]), DiagonalGaussian(4), height=height)
    a = torch.rand(3, pixels)
    with torch.no_grad():
        figure = model.draw(a, {"network": model(a)})
    (axes,) = figure.axes
    height, width = shape
    shown = axes.images[0].get_array()
    assert shown.shape[1] == 3 * (width + 2)
    assert shown.shape[0] % (height + 2) == 0
    assert np.allclose(
        shown[1 : 1 + height, width + 3 : 2 * width + 3].ravel(), a[1]
    )  # the second image of the first line
    assert axes.get_aspect() == ("auto" if shape[0] == 1 else 1)


def test_a_frozen_decoder_does_not_train():
    model = digits(freeze_decoder=True)
    model.amortized_step(Images(batch_size=8).batch("train", 0)).mean().backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(p.grad is not None for p in model.network.parameters())


def test_inference_alone_on_what_a_trained_model_generates(capsys):
    weights = Path(__file__).parent.parent / "checkpoints" / "vae_digits.ckpt"
    decoder = [
        "{p}.class_path=Pretrained",
        "{p}.init_args.network.class_path=MLP",
        "{p}.init_args.network.init_args={{in_features: 8, out_features: 64, hidden: [128], activation: silu}}",
        f"{{p}}.init_args.checkpoint={weights}",
        "{p}.init_args.part=decoder",
    ]
    small = ["--trainer.max_steps=150", "--trainer.val_check_interval=150", "--model.scheduler=null"]
    main([
        "fit", "-c", "vae_digits", "--run_folder=run", *small, "--budget.enabled=false", "--trainer.enable_progress_bar=false",
        *("--model." + option.format(p="decoder") for option in decoder), "--model.freeze_decoder=true",
        "--data=GeneratedImages", "--data.latent=8", "--data.num_val=16", "--data.num_test=64",
        *("--data." + option.format(p="decoder") for option in decoder),
    ])  # fmt: skip
    trained = checkpoint.load(checkpoint.newest("run").path)["state_dict"]
    given = checkpoint.load(weights)["state_dict"]
    assert torch.equal(trained["decoder.network.0.weight"], given["decoder.0.weight"])
    assert not torch.equal(trained["network.0.weight"], given["network.0.weight"])
    found = json.loads(Path("run/results.json").read_text())
    assert found["rows"]["converged"] > 0.9
    assert found["gap"]["mean"] > 0


def test_a_trained_model_is_tested_with_its_evidence_estimated():
    weights = Path(__file__).parent.parent / "checkpoints" / "vae_digits.ckpt"
    evidence = ["--model.evidence=AnnealedImportanceSampling", "--model.evidence.steps=20", "--model.evidence.chains=8"]
    quick = ["--data.num_test=16", "--gap.solver.steps=30", "--budget.enabled=false", "--run_folder=run"]
    main(["test", "-c", "vae_digits", f"--ckpt_path={weights}", *evidence, *quick])
    terms = json.loads(Path("run/results.json").read_text())["decomposition"]
    assert 0 < terms["amortization"] < 0.5
    assert -0.1 < terms["approximation"] < 1
    assert terms["total"] == pytest.approx(terms["amortization"] + terms["approximation"] + terms["solver"])


def test_weights_that_do_not_fit_are_refused():
    weights = str(Path(__file__).parent.parent / "checkpoints" / "vae_digits.ckpt")
    with pytest.raises(CheckpointError, match="it has decoder, network"):
        Pretrained(MLP(8, 64), weights, "encoder")
    with pytest.raises(CheckpointError, match="other layers than MLP"):
        Pretrained(MLP(8, 64, [5]), weights, "decoder")


def test_semi_amortized_training_reaches_the_encoder_through_the_steps():
    a = Images(batch_size=8).batch("train", 0)
    grads = []
    for unroll in (None, 0):  # followed through the gradients of the steps, and not
        model = digits(refine=GradientDescent(3, lr=0.05, unroll=unroll))
        with draws(0, CPU):
            model.amortized_step(a).mean().backward()
        grads.append(model.network[0].weight.grad.clone())
    assert grads[0].any()
    assert grads[1].any()
    assert not torch.allclose(grads[0], grads[1])


def test_a_learned_update_starts_as_gradient_descent_and_learns():
    torch.manual_seed(0)
    problem, a = Quadratic(), torch.randn(64, 3)
    b = torch.randn(64, 3)
    update = LearnedUpdate(3, steps=2, lr=0.05, hidden=[32])
    plain = list(GradientDescent(2, lr=0.05).iterates(problem, a, b))
    for ours, theirs in zip(update.iterates(problem, a, b), plain, strict=True):
        assert float((ours - theirs).detach().norm() / (theirs - b).norm()) < 0.5
    optimizer = torch.optim.Adam(update.parameters(), 1e-2)
    for _ in range(300):
        loss = problem.objective(list(update.iterates(problem, a, torch.randn(64, 3)))[-1], a).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = evaluate(problem, list(update.iterates(problem, a, b))[-1], a)
    assert float(learned.mean()) < 0.2 * float(evaluate(problem, plain[-1], a).mean())
    assert not (update.solve(problem, a, b).value > evaluate(problem, b, a)).any()


def test_a_learned_update_refuses_other_solutions():
    problem = Quadratic()
    with pytest.raises(ValueError, match="solutions of 5 numbers; these have 3"):
        LearnedUpdate(5).solve(problem, torch.randn(2, 3), torch.randn(2, 3))


def test_settings_that_make_no_sense_are_refused():
    for kwargs in ({"sigma": 0.0}, {"beta": -1.0}, {"importance": 0}, {"likelihood": "poisson"}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            digits(**kwargs)
    with pytest.raises(ValueError, match="multiple of 4"):
        ConvDecoder(4, 30)
    with pytest.raises(ProblemError, match="family of Gaussians"):
        LinearGaussian(MLP(10, 8), Flow(4))


def test_convolutional_networks_have_the_shapes_they_say():
    assert ConvEncoder(28, 100)(torch.zeros(3, 784)).shape == (3, 100)
    assert ConvDecoder(50, 28)(torch.zeros(3, 50)).shape == (3, 784)
    assert ConvDecoder(50, 28)(torch.zeros(0, 50)).shape == (0, 784)


# ---- files


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A small set in MNIST's format, gzipped as published."""
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", 10_064), ("t10k", 32)):
        array = rng.integers(0, 256, (n, 28, 28), np.uint8)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(array), 1))
    return folder


def test_idx_files_are_found_in_the_root_and_by_the_environment(mnist, monkeypatch):
    direct = Images("mnist", root=str(mnist), batch_size=4)
    above = Images("mnist", root=str(mnist.parent), batch_size=4)
    monkeypatch.setenv("AMORTIZED_DATA", str(mnist.parent))
    by_name = Images("mnist", batch_size=4)
    by_name.prepare_data()
    sizes = {split: len(by_name.contexts(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 64, "val": 1024, "test": 32}
    for data in (direct, above):
        assert torch.equal(data.batch("train", 0), by_name.batch("train", 0))
    assert set(by_name.batch("train", 0).unique().tolist()) == {0.0, 1.0}
    grey = Images("mnist", binarise=False, batch_size=4).batch("train", 0)
    assert grey.dtype == torch.float32
    assert 0 <= float(grey.min()) < 0.1
    assert 0.9 < float(grey.max()) <= 1
    assert not torch.equal(by_name.batch("train", 0), by_name.batch("train", 16))  # the same images, drawn anew


def test_plain_idx_files_are_read_too(mnist):
    for path in list(mnist.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(Images("mnist", root=str(mnist)).contexts("test")) == 32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data[:60] + b"\x00" * 50 + data[110:], "damaged"),
        (lambda data: gzip.compress(b"<html>not found</html>"), "no IDX file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-5]), "says it holds"),
        (lambda data: data[:12] + b"\xff" * 40 + data[52:], "damaged"),
        (lambda data: gzip.compress(gzip.decompress(data)[:10]), "no IDX file"),
        (
            lambda data: gzip.compress(idx(np.zeros((4, 14, 14), np.uint8))),
            r"shape \(4, 14, 14\); mnist has images \(N, 28, 28\)",
        ),
        (lambda data: gzip.compress(idx(np.zeros(32, np.uint8))), r"shape \(32,\); mnist has images"),
    ],
)
def test_a_damaged_file_is_refused_by_name(mnist, damage, message):
    path = mnist / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProblemError, match=message) as error:
        Images("mnist", root=str(mnist)).contexts("test")
    assert str(path) in str(error.value)


def test_a_training_set_too_small_to_be_split_is_refused(mnist):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((6000, 28, 28), np.uint8))))
    data = Images("mnist", root=str(mnist))
    for split in ("train", "val"):
        with pytest.raises(ProblemError, match="holds 6000 images, of which the last 10,000 are for validation"):
            data.contexts(split)
    assert len(data.contexts("test")) == 32


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ProblemError, match="AMORTIZED_DATA") as error:
        Images("omniglot", root=str(tmp_path)).contexts("train")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="got 'cifar'"):
        Images("cifar")


def test_downloads_are_checked_and_kept_whole(mnist, monkeypatch):
    monkeypatch.delenv("AMORTIZED_DATA", raising=False)
    monkeypatch.setattr(images, "SYSTEM", mnist / "nowhere")
    monkeypatch.setitem(images.SOURCES, "mnist", mnist.as_uri())
    with pytest.raises(ProblemError, match="invalid hash"):
        Images("mnist").prepare_data()
    assert not [path for path in images.cache().rglob("*") if path.is_file()]
    for file in images.FILES["mnist"]:
        digest = sha256(mnist / f"{file}.gz")
        monkeypatch.setitem(images.SHA256, f"mnist/{file}", digest)
    data = Images("mnist")
    data.prepare_data()
    assert len(data.contexts("test")) == 32
    monkeypatch.setitem(images.SOURCES, "mnist", (mnist / "gone").as_uri())
    data.prepare_data()  # nothing is fetched twice
    with pytest.raises(ProblemError, match="could not be fetched"):
        images.download("mnist", "t10k-images-idx3-ubyte")


def test_omniglot_is_split_by_drawer(tmp_path):
    drawings = np.zeros((3, 20, 28, 28), np.uint8)
    drawings[..., 0, 0] = np.arange(20)  # the drawer's number
    np.savez(tmp_path / "omniglot_small_28.npz", images=drawings)
    data = Images("omniglot", root=str(tmp_path), binarise=False)
    drawers = {s: set((255 * data.batch(s, 0)[:, 0]).round().int().tolist()) for s in ("train", "val", "test")}
    assert drawers == {"train": set(range(16)), "val": {16, 17}, "test": {18, 19}}
    path = tmp_path / "omniglot_small_28.npz"
    whole = path.read_bytes()
    for content in (b"PK no archive", b"", whole[:-50], whole[:300] + b"\xff" + whole[301:]):
        path.write_bytes(content)
        with pytest.raises(ProblemError, match=r"no readable .npz file with an array 'images'$"):
            data.contexts("train")
    np.savez(path, images=np.array([{}]))
    with pytest.raises(ProblemError, match=r"no readable .npz file with an array 'images'$"):
        data.contexts("train")
