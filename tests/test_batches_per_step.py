"""K context batches in one training step are K training steps, to the last bit."""

import pytest
import torch
from lightning import Trainer
from toy import Completed, FiniteGaussians, Gaussians, Quadratic

from amortized import ProblemError

STEPS, K = 12, 4


def fit(data, max_steps, batches_per_step, num_workers=0, **trainer):
    torch.manual_seed(0)
    module = Quadratic(optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01))
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    settings = {
        "max_steps": max_steps,
        "accelerator": "cpu",
        "limit_val_batches": 0,
        **dict.fromkeys(off, False),
        **trainer,
    }
    datamodule = data(batch_size=16, batches_per_step=batches_per_step, num_workers=num_workers)
    made = Trainer(**settings)
    made.fit(module, datamodule)
    return module, made, datamodule


CLIPS = [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]


@pytest.mark.parametrize("clip", CLIPS, ids=["unclipped", "norm", "value"])
@pytest.mark.parametrize("data", [Gaussians, FiniteGaussians])
def test_the_weights_are_those_of_single_steps(data, clip):
    single, _, one_by_one = fit(data, K * STEPS, 1, **clip)
    several, trainer, together = fit(data, STEPS, K, **clip)
    assert trainer.global_step == STEPS  # max_steps, callbacks and checkpoints count training steps
    assert together.position == one_by_one.position == K * STEPS
    start = Quadratic().state_dict()
    for name, weight in single.state_dict().items():
        assert torch.equal(several.state_dict()[name], weight), name
        assert not torch.equal(weight, start[name])


def test_clipping_changes_the_weights():
    free, clipped = (fit(Gaussians, STEPS, K, **clip)[0].state_dict() for clip in CLIPS[::2])
    assert any(not torch.equal(free[name], clipped[name]) for name in free)


def test_accumulated_gradients_are_refused():
    with pytest.raises(
        ProblemError, match=r"batches_per_step=4 makes 4 updates .* accumulate_grad_batches=1; there are 1 and 2"
    ):
        fit(Gaussians, STEPS, K, accumulate_grad_batches=2)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ProblemError, match=r"needs one process and accumulate_grad_batches=1; there are 2 and 1"):
        fit(Gaussians, STEPS, K)


@pytest.mark.parametrize("workers", [0, 2])
def test_contexts_that_are_completed_on_the_device_are_the_same(workers):
    whole, completed = fit(Gaussians, STEPS, K)[0], fit(Completed, STEPS, K, workers)[0]
    for x, y in zip(whole.parameters(), completed.parameters(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(Gaussians().batch("val", 0), Completed().batch("val", 0))
