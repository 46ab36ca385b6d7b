"""``compile: true``: an update in one call, the same as without, or refused before the first one."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from torch._dynamo.utils import counters
from toy import Gaussians, LateNaN, Quadratic

from amortized import ProblemError
from amortized.solvers import GradientDescent

pytestmark = pytest.mark.filterwarnings("ignore:.*(LeafSpec|many workers)")


class Branching(Quadratic):
    """Not to be traced."""

    def objective(self, b, a):
        return super().objective(b, a) if float(b.sum()) < 1e9 else b.sum(1)  # the line that is told


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(module, data=None, ckpt_path=None, checkpoints=False, **settings):
    off = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = Trainer(
        **{"accelerator": "cpu", "max_steps": 4, "limit_val_batches": 0, **dict.fromkeys(off, False), **settings},
        enable_checkpointing=checkpoints,
        default_root_dir=".",
    )
    data = data or Gaussians(batch_size=16, batches_per_step=3)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def quadratic(cls=Quadratic, compile=True, optimizer=torch.optim.Adam, schedule=False, seed=0, **settings):
    torch.manual_seed(seed)
    one_cycle = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=4)  # noqa: E731
    scheduler = one_cycle if schedule else None
    return cls(optimizer=lambda p: optimizer(p, 0.01), scheduler=scheduler, compile=compile, **settings)


ADAMW = {"optimizer": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1), "schedule": True}
SGD = {"optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}
CASES = {
    "scheduled": (ADAMW, {"gradient_clip_val": 0.5}),
    "second derivatives": ({"refine": GradientDescent(steps=2, lr=0.01)}, {}),
    "SGD": (SGD, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "float64, fused": ({"optimizer": lambda p, lr: torch.optim.Adam(p, lr, fused=True)}, {"precision": "64-true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_without(case, capsys):
    model, settings = CASES[case]
    counters.clear()
    plain = quadratic(compile=False, **model)
    fit(plain, **settings)
    assert not counters["stats"]["unique_graphs"]
    module = quadratic(**model)
    trainer = fit(module, **settings)
    # Whatever the scheduler does; SGD's first step, which has no momentum yet, has a graph of its own.
    assert counters["stats"]["unique_graphs"] == (2 if case == "SGD" else 1)
    assert trainer.global_step == 4
    torch.testing.assert_close(weights(module), weights(plain))
    assert re.fullmatch(r"the update is compiled, in \d+\.\d s", capsys.readouterr().out.strip().splitlines()[-1])
    group = trainer.optimizers[0].param_groups[0]
    assert isinstance(group["lr"], float)  # as in any other checkpoint


def test_mixed_precision_trains():
    plain, module = quadratic(compile=False), quadratic()
    for one in (plain, module):
        fit(one, precision="bf16-mixed")
    torch.testing.assert_close(weights(module), weights(plain), atol=2e-3, rtol=0)


def test_a_resumed_run_is_the_same_to_the_last_bit():
    """Random numbers, momentum and schedule go on; without compile too, which changes rounding alone."""
    noisy = {"noise": 1.0, "dropout": 0.1, **ADAMW}
    whole = quadratic(**noisy)
    fit(whole)
    trainer = fit(quadratic(**noisy), max_steps=2)
    trainer.save_checkpoint("half.ckpt")
    resumed = quadratic(seed=1, **noisy)
    fit(resumed, ckpt_path="half.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    eager = quadratic(seed=1, compile=False, **noisy)
    assert fit(eager, ckpt_path="half.ckpt").global_step == 4


def test_what_cannot_be_compiled_is_trained_as_it_is():
    plain, module = quadratic(Branching, compile=False), quadratic(Branching)
    fit(plain)
    with pytest.warns(UserWarning, match="compile: true is left out: this cannot be compiled") as told:
        fit(module)
    (said,) = [str(w.message) for w in told if "left out" in str(w.message)]
    number = next(
        k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "the line that is told" in text
    )
    assert f"test_compiled_update.py, line {number}, in objective" in said
    assert "\n" not in said
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.parametrize("K", [1, 3])
def test_training_stops_at_the_batch_and_names_the_row(K):
    with pytest.raises(ProblemError, match=r"batch 5, row 3: the loss .* is nan, and its context holds NaN"):
        fit(quadratic(), LateNaN(batch_size=16, batches_per_step=K), max_steps=8)


class Watching(Callback):
    def on_before_optimizer_step(self, *args):
        """Wants the gradient."""


class Scaling(Quadratic):
    def configure_gradient_clipping(self, *args, **kwargs):
        """Clips otherwise."""


def cycled(p, lr):
    return torch.optim.SGD(p, lr, momentum=0.9)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ({}, {"accumulate_grad_batches": 2}, "needs one process .* accumulate_grad_batches=1; there are 1 .* and 2"),
        ({"not_finite": "skip"}, {}, "not_finite: skip looks at each gradient"),
        ({}, {"callbacks": [Watching()]}, "Watching.on_before_optimizer_step comes between"),
        ({"cls": Scaling}, {}, "Scaling.configure_gradient_clipping comes between"),
        ({"optimizer": cycled, "schedule": True}, {}, "cycle_momentum: false"),
    ],
)
def test_what_has_no_place_in_one_call_is_refused(model, settings, said):
    data = Gaussians(batch_size=16)
    with pytest.raises(ProblemError, match=said) as told:
        fit(quadratic(**model), data, **settings)
    assert "\n" not in str(told.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ProblemError, match="needs one process .*; there are 2"):
        fit(quadratic(), Gaussians(batch_size=16))
