"""What matters, again on a CUDA device; skipped, by name, where there is none."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from toy import FiniteGaussians, Gaussians, LateNaN, Pairs, Quadratic, Sharp

from amortized import ProblemError
from amortized.callbacks import measure_gap
from amortized.cli.app import main
from amortized.contract import draws, leaves
from amortized.evaluation.metric import AmortizationGap
from amortized.solvers import LBFGS, Adam, GradientDescent

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _random_state():
    state = torch.cuda.get_rng_state(DEVICE)
    yield
    torch.cuda.set_rng_state(state, DEVICE)


def problem(**kwargs):
    torch.manual_seed(0)
    return Quadratic(**kwargs).to(DEVICE).eval()


@pytest.mark.parametrize("cls", [Gaussians, Pairs])
def test_sampling_on_the_device_is_a_function_of_seed_split_and_number(cls):
    one, other = cls(batch_size=64), cls(batch_size=64)
    later = one.batch("train", 7, DEVICE)
    one.batch("train", 3, DEVICE)
    torch.randn(5, device=DEVICE)  # of another generator
    for x, y, z in zip(
        *(map(leaves, (later, other.batch("train", 7, DEVICE), other.batch("train", 8, DEVICE)))), strict=True
    ):
        assert x.device == DEVICE
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_finite_sets_and_evaluation_are_those_of_the_cpu():
    data, same = FiniteGaussians(batch_size=32), FiniteGaussians(batch_size=32)
    for split, number in (("val", 0), ("test", 1), ("test", data.num_batches("test") - 1)):
        here = data.batch(split, number, DEVICE)
        assert here.device == DEVICE
        assert torch.equal(here.cpu(), same.batch(split, number))
    sampled = Gaussians(eval_batch_size=64)
    assert torch.equal(sampled.batch("val", 1, DEVICE).cpu(), Gaussians(eval_batch_size=64).batch("val", 1))


def test_draws_leave_the_generator_as_it_was():
    expected = torch.cuda.get_rng_state(DEVICE)
    with draws(5, DEVICE):
        first = torch.randn(4, device=DEVICE)
    with draws(5, DEVICE):
        assert torch.equal(first, torch.randn(4, device=DEVICE))
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), expected)


@pytest.mark.parametrize(
    "solver",
    [GradientDescent(steps=200, lr=0.3), Adam(steps=500, lr=0.1), LBFGS(steps=50), LBFGS(steps=50, compile=True)],
)
def test_solvers_reach_the_optimum(solver):
    a = torch.randn(257, 3, device=DEVICE)
    found = solver.to(DEVICE).solve(problem(), a, torch.zeros_like(a))
    assert all(part.device == DEVICE for part in found[:-1])
    assert torch.allclose(found.value, torch.ones_like(found.value), atol=1e-4)
    assert torch.allclose(found.b, 2 * a, atol=1e-2)
    assert found.converged.float().mean() > 0.99


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gap_is_that_of_the_cpu(noise):
    module, a = problem(noise=noise), torch.randn(300, 3, device=DEVICE)
    means = {}
    for device in (DEVICE, torch.device("cpu")):
        module, a = module.to(device), a.to(device)
        metric = AmortizationGap().to(device)
        for part, index in zip(a.split(100), torch.arange(300, device=device).split(100), strict=True):
            rows, best = measure_gap(module, part, module(part), LBFGS(steps=50), index)
            assert best.device == device
            metric.update(rows)
        statistics = metric.compute()
        assert statistics["mean"].device == device
        assert float(statistics["total"]) == 300
        means[device.type] = float(statistics["mean"])
    # with noise the two sides draw different numbers
    assert means["cuda"] == pytest.approx(means["cpu"], rel=0.05 if noise else 1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_short_fit(precision):
    args = ["-c", "vae_digits", "--trainer.accelerator=gpu", "--trainer.devices=1", f"--trainer.precision={precision}"]
    args += ["--trainer.enable_progress_bar=false"]
    main(["fit", *args, "--trainer.max_steps=300", "--trainer.val_check_interval=150", "--run_folder=fit"])
    found = json.loads(Path("fit/results.json").read_text())
    assert found["rows"]["total"] == 360
    assert found["rows"]["diverged"] == 0
    assert found["rows"]["converged"] > 0.9
    assert -0.05 < found["gap"]["mean"] < 5
    assert found["objective"]["network"] < 26  # 27.7 without training
    assert found["time"]["network"] > 0
    for path in Path("fit/checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True, map_location="cpu")["state_dict"].values()
        assert all(weight.dtype == torch.float32 for weight in weights)
    for command in ("validate", "test", "predict"):
        main([command, *args, "--ckpt_path=fit", f"--run_folder={command}", "--budget.enabled=false"])
    assert Path("predict/predictions.npz").is_file()


def test_a_resumed_fit_is_the_same():
    args = [
        "fit",
        "--model=toy.Quadratic",
        "--model.noise=0.3",
        "--model.dropout=0.2",
        "--data=toy.Gaussians",
        "--data.num_val=64",
    ]
    args += [
        "--data.num_test=64",
        "--gap.solver=LBFGS",
        "--budget.enabled=false",
        "--trainer.accelerator=gpu",
        "--trainer.devices=1",
    ]
    args += [
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=20",
        "--trainer.check_val_every_n_epoch=null",
    ]
    main([*args, "--trainer.max_steps=40", "--run_folder=whole"])
    main([*args, "--trainer.max_steps=20", "--run_folder=parts"])
    main([*args, "--trainer.max_steps=40", "--run_folder=parts", "--ckpt_path=parts"])
    whole, parts = (
        torch.load(f"{name}/checkpoints/step=00000040.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, parts["state_dict"][name]), name


@pytest.mark.parametrize("fault", ["nan", "gradient"])
def test_training_stops_at_a_value_that_is_not_finite_without_waiting_for_it(fault):
    module = Sharp(fault)
    settings = {"accelerator": "gpu", "devices": 1, "max_steps": 40, "limit_val_batches": 0, "log_every_n_steps": 20}
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    with pytest.raises(ProblemError, match="batch 5, row 3"):
        Trainer(**settings, **dict.fromkeys(off, False)).fit(module, LateNaN(batch_size=16, value=7))
    assert all(p.isfinite().all() for p in module.parameters())
