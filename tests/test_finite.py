"""Values that are not finite, and data outside a likelihood's support: the run stops there and says so, or leaves them out."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from runs import Run, last_checkpoint, metrics
from toy import Gaussians, LateNaN, Quadratic, Sharp

from amortized import AmortizedModule, ProblemError
from amortized.cli import main
from amortized.finite import FiniteUpdates
from amortized.hard_contexts import HardContexts

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
    data.sample = lambda n, generator: torch.full((n, 3), torch.nan if data.position >= 2 * 1 else 0.5)
    module._checked = True
    trainer = fit(module, data, log_every_n_steps=1, max_steps=4)
    assert float(trainer.callback_metrics["train/skipped_updates"]) > 0
    assert all(p.isfinite().all() for p in module.parameters())


def test_where_looking_waits_for_the_device_no_parameter_is_touched_until_the_look(monkeypatch):
    """The way of a GPU: zeros in place of the gradient, on the device, and a look when metrics are logged."""
    monkeypatch.setattr(FiniteUpdates, "_later", lambda self, module: True)
    for fault in FAULTS:
        module, data = case(fault)
        with pytest.raises(ProblemError, match="batch 5, row 3" if fault != "gradient" else "batch 0 to 6"):
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
