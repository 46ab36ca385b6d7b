"""Values that are not finite, and data outside a likelihood's support: the run stops there and says so, or leaves them out."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from runs import Run, last_checkpoint, metrics
from torch import nn
from toy import Gaussians, LateNaN, Quadratic, Sharp

from amortized import AmortizedModule, ProblemError
from amortized.cli.app import main
from amortized.contract import check_support
from amortized.finite import FiniteUpdates
from amortized.losses.hard_contexts import HardContexts

STEPS = 8


def fit(module, data, **settings):
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    made = Trainer(
        **{"accelerator": "cpu", "max_steps": STEPS, "limit_val_batches": 0, **dict.fromkeys(off, False), **settings}
    )
    made.fit(module, data)
    return made


FAULTS = {
    "context": (Quadratic, {}, {}),
    "objective": (Sharp, {"fault": "nan"}, {"value": 7}),
    "infinite": (Sharp, {"fault": "inf"}, {"value": 7}),
    "gradient": (Sharp, {"fault": "gradient"}, {"value": 7}),
}
SAID = {
    "context": r"batch 5, row 3: the loss \(ObjectiveLoss\) is nan, and its context holds NaN",
    "objective": r"batch 5, row 3: the loss \(ObjectiveLoss\) is nan\.",
    "infinite": r"batch 5, row 3: the loss \(ObjectiveLoss\) is -?inf\.",
    "gradient": r"batch 5, row 3: the gradient, while the loss \(ObjectiveLoss\) is \d",
}


def case(fault, K=1, model=(), **data):
    torch.manual_seed(0)
    cls, settings, more = FAULTS[fault]
    module = cls(**settings, **dict(model))
    return module, LateNaN(batch_size=16, batches_per_step=K, **more, **data)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_training_stops_at_the_batch_and_names_the_row(fault, K):
    """Inside a step of several batches, too; what was learned before is there, to the last bit."""
    module, data = case(fault, K)
    with pytest.raises(ProblemError, match=SAID[fault] + r".*not_finite: skip"):
        fit(module, data)
    torch.manual_seed(0)
    clean = Quadratic()
    fit(clean, Gaussians(batch_size=16), max_steps=5)
    for p, q in zip(module.parameters(), clean.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_without_the_row_and_counts_it(fault, K):
    module, data = case(fault, K, {"not_finite": "skip", "batch_norm": True})
    trainer = fit(module, data, log_every_n_steps=1)
    skipped = [float(trainer.callback_metrics[f"train/skipped_{what}"]) for what in ("rows", "updates")]
    assert skipped == ([0, 1] if fault == "gradient" else [1, 0])
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_the_update_without_a_row_is_that_of_the_other_rows():
    module, data = case("context", model={"not_finite": "skip"})
    fit(module, data, max_steps=6)
    rest = [row for row in range(16) if row != 3]

    class Others(LateNaN):
        def batch(self, split, number, device="cpu"):
            a = super().batch(split, number, device)
            return a[rest] if split == "train" and number == 5 else a

    torch.manual_seed(0)
    other = Quadratic()
    fit(other, Others(batch_size=16), max_steps=6)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_an_update_that_is_skipped_moves_nothing_not_even_by_momentum():
    weights = []
    for steps in (5, 6):
        module, data = case("gradient", model={"not_finite": "skip"})
        fit(module, data, max_steps=steps)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_a_batch_without_a_good_row_is_no_update():
    module, data = case("context", model={"not_finite": "skip"})
    data.sample = lambda n, generator: torch.rand(n, 3, generator=generator) * (torch.nan if data.position >= 2 else 1)
    module._checked = True
    trainer = fit(module, data, log_every_n_steps=1, max_steps=4)
    assert float(trainer.callback_metrics["train/skipped_updates"]) > 0
    assert all(p.isfinite().all() for p in module.parameters())


def test_where_looking_waits_for_the_device_no_parameter_is_touched_until_the_look(monkeypatch):
    """The way of a GPU: zeros in place of the gradient, on the device, and a look when metrics are logged."""
    monkeypatch.setattr(FiniteUpdates, "_later", lambda self, module: True)
    for fault in FAULTS:
        module, data = case(fault)
        with pytest.raises(ProblemError, match=SAID[fault]):
            fit(module, data, log_every_n_steps=7, max_steps=20)
        assert all(p.isfinite().all() for p in module.parameters())
    clean = []
    for later in (True, False):
        monkeypatch.setattr(FiniteUpdates, "_later", lambda self, module, later=later: later)
        torch.manual_seed(0)
        module = Quadratic(dropout=0.1)
        fit(module, Gaussians(batch_size=16))
        clean.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*clean)  # and what is finite is the same


def test_hard_contexts_are_not_spoilt_by_a_row():
    module, data = case("context", model={"not_finite": "skip", "loss": HardContexts(pool=2)})
    fit(module, data)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def args(action, folder, *more):
    settings = ["--data.batch_size=16", "--data.num_val=64", "--data.num_test=64", "--gap.solver=LBFGS"]
    settings += ["--gap.solver.steps=20", "--trainer.max_steps=12", "--trainer.val_check_interval=4"]
    settings += ["--trainer.check_val_every_n_epoch=null", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    settings += ["--checkpoint.every_n_steps=2", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    fit = ["fit", "--model=toy.Quadratic", f"--model.not_finite={action}", "--data=toy.LateNaN"]
    return [*fit, *settings, f"--run_folder={folder}", *more]


def test_the_run_ends_with_status_2_and_resumes_past_the_batch(capsys):
    with pytest.raises(SystemExit) as stop:
        main(args("stop", "run"))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: training met a value that is not finite in batch 5, row 3")
    good = last_checkpoint("run")
    assert good["global_step"] == 4
    with pytest.raises(SystemExit):  # the same batch comes again
        main(args("stop", "run", "--ckpt_path=run"))
    main(args("skip", "run", "--ckpt_path=run"))
    last = last_checkpoint("run")
    assert last["global_step"] == 12
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert [line["train/skipped_rows"] for line in metrics("run") if line["train/skipped_rows"]][-1] == "1.0"


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_processes_agree(action):
    """Batch 5 is that of the second process alone: both stop, or both go on with the same weights."""
    run = Run(args(action, "run", "--trainer.devices=2", "--trainer.strategy=ddp_fork"))
    code = run.wait(60)
    if action == "stop":
        assert code != 0
        assert "batch 5, row 3: the loss (ObjectiveLoss) is nan" in run.output()
        assert not list(Path("run/checkpoints").glob("step=*3.ckpt"))
        assert all(value.isfinite().all() for value in last_checkpoint("run")["state_dict"].values())
    else:
        assert code == 0, run.output()
        assert [line["train/skipped_rows"] for line in metrics("run") if line["train/skipped_rows"]][-1] == "1.0"
        assert last_checkpoint("run")["amortized_skipped"] == [1, 0]


@pytest.mark.parametrize("monitor", ["val/objective", "val/gap/mean"])
def test_a_validation_with_a_row_that_is_not_finite_is_never_the_best(monitor):
    """The model improves on the finite rows from then on, but fails on a hard one: best.ckpt stays."""
    more = [
        "--model=test_finite.Hard",
        "--data=toy.Gaussians",
        f"--checkpoint.monitor={monitor}",
        "--gap.max_fraction=1",
    ]
    more += ["--checkpoint.every_n_steps=4"]
    main([*args("stop", "run"), *more])
    lines = [line for line in metrics("run") if line["val/objective"]]
    values = [float(line["val/objective"]) for line in lines]
    assert values[0] == values[0]
    assert values[-1] != values[-1]
    assert float(lines[-1]["val/not_finite"]) > 0
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 4


class Hard(Quadratic):
    """After 4 steps the objective of a few hard rows is NaN in evaluation."""

    def objective(self, b, a):
        value = super().objective(b, a)
        late = not self.training and self._trainer is not None and self.trainer.global_step > 4
        return torch.where(a[:, 0] > 1.5, torch.nan, value) if late else value


class Bernoulli(AmortizedModule):
    def __init__(self, **kwargs):
        super().__init__(nn.Linear(3, 3), **kwargs)

    def support(self):
        return torch.distributions.constraints.unit_interval

    def objective(self, b, a):
        return nn.functional.binary_cross_entropy_with_logits(b, a, reduction="none").sum(1)


class Coins(Gaussians):
    """Coins, but in the splits of ``wrong`` they are Gaussian; in ``missing`` one is NaN."""

    def __init__(self, wrong: str = "", missing: str = "", **kwargs):
        super().__init__(**kwargs)
        self.wrong, self.missing = wrong, missing

    def batch(self, split, number, device="cpu"):
        a = super().batch(split, number, device)
        a = a if split == self.wrong else (a > 0).float() * (1 + 1e-7)
        if split == self.missing:
            a = a.clone()
            a[0, 0] = torch.nan
        return a


@pytest.mark.parametrize(
    ("command", "wrong"),
    [("fit", "train"), ("fit", "val"), ("fit", "test"), ("validate", "val"), ("predict", "predict")],
)
def test_data_outside_the_support_is_refused_with_their_range(command, wrong, capsys):
    given = [f"--data={__name__}.Coins", f"--data.wrong={wrong}", f"--model={__name__}.Bernoulli"]
    with pytest.raises(SystemExit) as stop:
        main([command, *args("stop", "run", *given)[1:], *([] if command == "fit" else ["--ckpt_path=untrained"])])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: Bernoulli allows contexts in [0, 1]; got values from -"), error


def test_missing_data_is_no_matter_of_the_support(capsys):
    main(
        [
            "predict",
            *args("stop", "run", f"--data={__name__}.Coins", "--data.missing=predict")[1:],
            "--ckpt_path=untrained",
        ]
    )
    assert "64 solutions" in capsys.readouterr().out


def test_images_of_another_range_are_refused_by_a_bernoulli_likelihood():
    """Those from 0 to 255."""
    from amortized.problems import VAE
    from amortized.problems.classification import Classification, Labelled

    vae = VAE.__new__(VAE)
    nn.Module.__init__(vae)
    for likelihood, allowed in (("bernoulli", False), ("gaussian", True)):
        vae.likelihood = likelihood
        if allowed:
            check_support(vae, 255 * torch.rand(4, 9))
        else:
            with pytest.raises(ProblemError, match=r"VAE allows contexts in \[0, 1\]; got values from"):
                check_support(vae, 255 * torch.rand(4, 9))
    model = Classification(nn.Linear(64, 10))
    check_support(model, Labelled(torch.rand(2, 64), torch.full((2, 10), 0.1)))
    with pytest.raises(ProblemError, match="target in Simplex; got values from 1 to 1"):
        check_support(model, Labelled(torch.rand(2, 64), torch.ones(2, 10)))


class Faulty(Quadratic):
    def __init__(self, error: str = "KeyError", **kwargs):
        super().__init__(**kwargs)
        self.error = error

    def objective(self, b, a):
        if self.error == "KeyError":
            return {}["radius"]
        return torch.sum(b, "rows") if self.error == "TypeError" else b @ a


@pytest.mark.parametrize("error", ["KeyError", "TypeError", "RuntimeError"])
def test_a_fault_in_the_objective_is_told_with_its_place(error, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args("stop", "run", f"--model={__name__}.Faulty", f"--model.error={error}", "--data=toy.Gaussians"))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    line = {"KeyError": "return {}[", "TypeError": "return torch.sum(", "RuntimeError": "return torch.sum("}[error]
    number = next(k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if line in text)
    assert re.search(rf"Faulty.objective fails .*{error}: .*test_finite.py, line {number}, in objective", said), said
    assert "AMORTIZED_DEBUG=1" in said
