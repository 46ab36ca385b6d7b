"""The table of ``docs/steps.md`` is what happens."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from toy import Gaussians, Quadratic

from amortized.callbacks import Checkpoint
from amortized.contract import ProblemError

COUNTED = ("context batches", "training steps", "updates", "scheduler", "validations after step", "checkpoints of step")


def table():
    lines = (Path(__file__).parent.parent / "docs" / "steps.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == "max_steps")
    head, _, *body = rows[start:]
    return [dict(zip(head, map(yaml.safe_load, row), strict=True)) for row in body]


class Counted(torch.optim.Adam):
    """Counts its steps."""

    updates = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.updates += 1
        return loss


class Count(Callback):
    """What the table says, counted where it happens, by process 0."""

    def __init__(self):
        self.validations = []

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.global_step)

    def on_fit_end(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir, "checkpoints")
        found = {
            "context batches": trainer.datamodule.position,
            "training steps": trainer.global_step,
            "updates": trainer.optimizers[0].updates,
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            "validations after step": " ".join(map(str, self.validations)),
            "checkpoints of step": " ".join(
                str(int(p.stem.removeprefix("step="))) for p in sorted(folder.glob("step=*.ckpt"))
            ),
        }
        if trainer.is_global_zero:
            Path("found.yaml").write_text(yaml.safe_dump(found))


def test_a_one_cycle_schedule_that_ends_before_training_is_refused_at_its_start():
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    schedule = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)  # noqa: E731
    data = Gaussians(batch_size=8, num_val=8, num_test=8)

    def fit(steps, **given):
        trainer = Trainer(max_steps=steps, accelerator="cpu", default_root_dir="run", **off)
        trainer.fit(Quadratic(scheduler=schedule), data, **given)
        return trainer

    with pytest.raises(ProblemError, match="ends at step 3 .* to step 4: write --model.scheduler.total_steps 4"):
        fit(4)
    fit(3).save_checkpoint("end.ckpt")
    with pytest.raises(ProblemError, match="cannot be prolonged: start anew from the weights, with --init_from RUN"):
        fit(4, ckpt_path="end.ckpt")


@pytest.mark.parametrize("row", table(), ids=lambda row: "-".join(map(str, list(row.values())[:6])))
def test_every_row_holds(row):
    off = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    names = ("max_steps", "limit_train_batches", "max_epochs", "accumulate_grad_batches", "devices")
    settings = {
        "accelerator": "cpu",
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    settings |= {"strategy": "ddp_fork"} if row["devices"] > 1 else {}
    trainer = Trainer(
        default_root_dir="run",
        callbacks=[Count(), Checkpoint(every_n_steps=5, keep=20)],
        **settings,
        **{name: row[name] for name in names},
        **dict.fromkeys(off, False),
    )
    module = Quadratic(
        optimizer=Counted, scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    )
    with mock.patch.dict(os.environ):  # Lightning leaves an address there
        trainer.fit(module, Gaussians(batch_size=8, num_val=8, num_test=8, batches_per_step=row["batches_per_step"]))
    found = yaml.safe_load(Path("found.yaml").read_text())
    assert {name: str(found[name]) for name in COUNTED} == {name: str(row[name]) for name in COUNTED}
