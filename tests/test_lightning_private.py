"""What is used of Lightning's private side, name by name: a new version that changes one fails here first."""

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from toy import Gaussians, Quadratic

from amortized.lightning_private import (
    CommandLine,
    begun_run,
    between_steps,
    hand_over_metrics,
    launches_processes,
    log_from_step,
    logs_now,
    set_run,
    trainer_of,
    validate,
    validates_now,
)

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class Kept(Logger):
    """Keeps what is logged, with its step."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Watch(Callback):
    """What the functions say after each training batch."""

    def __init__(self):
        self.steps, self.validations = [], 0

    def on_train_batch_end(self, trainer, *args):
        said = {"logs": logs_now(trainer), "between": between_steps(trainer), "validates": validates_now(trainer)}
        self.steps.append(said)

    def on_validation_end(self, trainer, *args):
        self.validations += not trainer.sanity_checking


def run(callbacks, **settings):
    return Trainer(
        **QUIET | {"logger": False, "enable_checkpointing": False, "check_val_every_n_epoch": None} | settings,
        callbacks=callbacks,
    )


def test_what_happens_at_a_step():
    watch = Watch()
    trainer = run(watch, max_steps=4, val_check_interval=4, log_every_n_steps=2, accumulate_grad_batches=2)
    trainer.fit(Quadratic(), Gaussians(num_val=8))
    assert [step["between"] for step in watch.steps] == [False, True] * 4
    assert [step["validates"] for step in watch.steps] == [False, False, False, True] * 2
    assert [step["logs"] for step in watch.steps][1::2] == [False, True] * 2
    assert watch.validations == 2


def test_a_validation_can_be_made_up_for_and_training_goes_on():
    class Again(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                validate(trainer)
                assert trainer.training

    watch = Watch()
    trainer = run([watch, Again()], max_steps=5, val_check_interval=3)
    trainer.fit(Quadratic(), Gaussians(num_val=8))
    assert watch.validations == 2
    assert trainer.global_step == 5


def test_metrics_are_handed_over_before_the_step_ends():
    class Early(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, *args):
            assert not trainer.logger.lines
            hand_over_metrics(trainer)
            self.seen = trainer.logger.lines[-1][1]

    early = Early()
    trainer = run([early], max_steps=1, limit_val_batches=0, log_every_n_steps=1, logger=Kept())
    trainer.fit(Quadratic(), Gaussians())
    assert "train/loss" in early.seen


def test_the_step_at_which_is_logged_can_be_set():
    trainer = run([], max_steps=2, logger=Kept())
    log_from_step(trainer, 7)
    trainer.test(Quadratic(), Gaussians(num_test=8), verbose=False)
    assert {step for step, _ in trainer.logger.lines} == {7}


def test_a_module_may_have_no_trainer():
    module = Quadratic()
    assert trainer_of(module) is None
    trainer = run([], max_steps=1, limit_val_batches=0)
    trainer.fit(module, Gaussians())
    assert trainer_of(module) is trainer


@pytest.mark.parametrize(("strategy", "launches"), [("auto", False), ("ddp_fork", True)])
def test_who_launches_processes(strategy, launches):
    assert launches_processes(run([], strategy=strategy, devices=2 if launches else 1)) is launches


def test_a_run_of_wandb_is_held_by_its_logger(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    assert begun_run(logger) is None
    began = logger.experiment
    assert begun_run(logger) is began
    set_run(logger, None)
    assert begun_run(logger) is None
    began.finish()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LightningCLI, "_parser"),
        (LightningCLI, "_parse_ckpt_path"),
        (LightningCLI, "_run_subcommand"),
    ],
)
def test_what_is_overridden_or_called_is_there(owner, name):
    assert callable(getattr(owner, name))


def test_the_steps_of_the_command_line_have_public_names():
    called = []

    class Line(CommandLine):
        def read_checkpoint(self):
            called.append("read_checkpoint")

        def run_command(self, command):
            called.append(self.parser_of(command).prog)

    Line(Quadratic, Gaussians, args=["test"], save_config_callback=None, seed_everything_default=False)
    assert called[0] == "read_checkpoint"
    assert called[1].endswith("test")
