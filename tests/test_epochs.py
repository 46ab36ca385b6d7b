"""Contexts of training are one stream, whatever the epochs, processes, workers and resumes that it is cut into."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning import Callback, Trainer
from toy import FiniteGaussians, Gaussians, LazyGaussians, Quadratic

from amortized.callbacks import Checkpoint

STEPS, EPOCHS = 20, 4


class Record(Callback):
    """Writes down which batches training saw, a file for each process."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with Path(f"seen-{trainer.global_rank}").open("a") as file:
            for a in batch if isinstance(batch, list) else [batch]:
                file.write(f"{a[0, 0].item()!r}\n")


def fit(cls, folder="run", ckpt=None, batches_per_step=1, num_workers=0, **trainer):
    """20 training batches in 4 epochs."""
    torch.manual_seed(0)
    module = Quadratic(noise=0.3, dropout=0.2)
    data = cls(batch_size=8, num_val=16, num_test=16, batches_per_step=batches_per_step, num_workers=num_workers)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    settings = {"max_epochs": EPOCHS, "max_steps": -1, "limit_train_batches": STEPS // EPOCHS, "limit_val_batches": 0}
    settings |= {"accelerator": "cpu", "default_root_dir": folder, **dict.fromkeys(off, False), **trainer}
    made = Trainer(callbacks=[Record(), Checkpoint(every_n_steps=1, keep=STEPS)], **settings)
    made.fit(module, data, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return module, made


def seen(cls, rank=0):
    """The numbers of the batches that a process saw, since it was last asked."""
    path, data = Path(f"seen-{rank}"), cls(batch_size=8)
    number = {data.batch("train", k)[0, 0].item(): k for k in range(5 * STEPS)}
    found = [number.get(float(line)) for line in path.read_text().split()]
    path.unlink()
    return found


CASES = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": STEPS},
    "accumulated": {"accumulate_grad_batches": 2},
    "workers": {"num_workers": 2},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
    "validated": {"limit_val_batches": 1.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("cls", [Gaussians, FiniteGaussians, LazyGaussians])
def test_epochs_go_on_where_the_last_one_ended(cls, case):
    fit(cls, **case)
    assert seen(cls) == list(range(STEPS))


@pytest.mark.parametrize("workers", [0, 2])
def test_several_batches_in_a_step(workers):
    fit(Gaussians, batches_per_step=3, num_workers=workers)
    assert seen(Gaussians) == list(range(3 * STEPS))


@pytest.mark.parametrize("case", [{}, {"num_workers": 1}, {"accumulate_grad_batches": 2}], ids=str)
def test_two_processes_take_turns(case):
    with mock.patch.dict(os.environ):  # Lightning leaves an address there
        fit(FiniteGaussians, devices=2, strategy="ddp_fork", **case)
    assert seen(FiniteGaussians, 0) == list(range(0, 2 * STEPS, 2))
    assert seen(FiniteGaussians, 1) == list(range(1, 2 * STEPS, 2))


def test_batches_to_overfit_are_the_same_in_every_epoch():
    fit(Gaussians, overfit_batches=3, limit_train_batches=None)
    assert seen(Gaussians) == EPOCHS * [0, 1, 2]


VALIDATIONS = {
    "none": {},
    "across epochs": {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "each epoch": {"limit_val_batches": 1.0},
}


@pytest.mark.parametrize("case", VALIDATIONS.values(), ids=VALIDATIONS)
@pytest.mark.parametrize(("first", "second"), [(2, 3), (4, 7), (5, 6), (5, 10), (10, 12)])
def test_resumed_twice_at_any_epoch(first, second, case):
    """Also where an epoch has just ended, which Lightning alone repeats (one epoch too many after the second resume)."""
    whole, trainer = fit(Gaussians, **case)
    seen(Gaussians)
    fit(Gaussians, "resumed", f"run/checkpoints/step={first:08d}.ckpt", **case)
    assert seen(Gaussians) == list(range(first, STEPS))
    again, last = fit(Gaussians, "again", f"resumed/checkpoints/step={second:08d}.ckpt", **case)
    assert seen(Gaussians) == list(range(second, STEPS))
    assert last.global_step == trainer.global_step == STEPS
    assert last.current_epoch == EPOCHS
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_a_window_of_accumulated_gradients_ends_with_its_epoch():
    """Five batches in windows of two are three steps; resumed after the third, the second epoch begins."""
    whole, trainer = fit(FiniteGaussians, accumulate_grad_batches=2)
    assert trainer.global_step == 3 * EPOCHS
    seen(FiniteGaussians)
    again, _ = fit(FiniteGaussians, "again", "run/checkpoints/step=00000003.ckpt", accumulate_grad_batches=2)
    assert seen(FiniteGaussians) == list(range(STEPS // EPOCHS, STEPS))
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
