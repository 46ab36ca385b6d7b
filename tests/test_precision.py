"""``--trainer.precision 64-true`` and ``bf16-true``: contexts come in the run's precision, and recipes run in it."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from toy import Quadratic

from amortized import ContextDataModule
from amortized.cli import main
from amortized.evaluation.gap import measure_gap
from amortized.solvers import LBFGS

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "32-true": torch.float32}


class Marked(NamedTuple):
    x: torch.Tensor
    number: torch.Tensor


class Mixed(ContextDataModule):
    """Contexts with a leaf of integers, which stay integers."""

    def sample(self, n, generator):
        return Marked(torch.randn(n, 3, generator=generator), torch.arange(n))


class OfMarked(Quadratic):
    def observe(self, a):
        return a.x

    def objective(self, b, a):
        return (b - 2 * a.x).square().sum(1)


class Seen(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train = [leaf.dtype for leaf in batch]

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val = [leaf.dtype for leaf in batch]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("precision", DTYPES)
def test_contexts_come_in_the_precision_of_the_run(precision, workers):
    seen = Seen()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, val_check_interval=1, callbacks=[seen], precision=precision, **off
    )
    trainer.fit(OfMarked(), Mixed(batch_size=8, num_val=8, num_workers=workers))
    assert seen.train == seen.val == [DTYPES[precision], torch.int64]


def test_the_gap_of_a_module_in_half_precision_is_that_of_the_same_weights_in_float32():
    module = Quadratic().bfloat16()
    a = torch.randn(16, 3).bfloat16()
    b = module(a)
    rows, best = measure_gap(module, a, b, LBFGS(), torch.arange(16))
    expected, _ = measure_gap(Quadratic(), a.float(), b.float(), LBFGS(), torch.arange(16))
    assert best.dtype == torch.float32
    torch.testing.assert_close(rows.gap, expected.gap)
    torch.testing.assert_close(rows.gap, (b.double() - 2 * a.double()).square().sum(1), rtol=1e-4, atol=1e-4)
    assert next(module.parameters()).dtype == torch.bfloat16


RECIPES = [
    "vae_digits",
    "sinusoid",
    "sphere",
    "classify_digits",
    "inference_linear",
    "maml_sinusoid",
    "sinusoid_scales",
    "metasgd_sinusoid",
    "gp_regression",
    "glyphs",
]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in RECIPES[1:])]
)
def test_a_recipe_runs_in_it(recipe, precision):
    args = [
        "-c",
        recipe,
        f"--trainer.precision={precision}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    args += ["--data.num_val=16", "--data.num_test=16", "--gap.solver.init_args.steps=10"]
    args += ["--budget.contexts=4"] if precision == "bf16-true" else ["--budget.enabled=false"]
    steps = ["--data.batch_size=8", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["fit", *args, *steps, "--run_folder=run"])
    assert not [str(w.message) for w in caught if "picture" in str(w.message)]
    assert np.isfinite(json.loads(Path("run/results.json").read_text())["gap"]["mean"])
    main(["predict", *args, "--ckpt_path=run", "--run_folder=predict"])
    assert np.isfinite(np.load("predict/predictions.npz")["objective"].astype(float)).all()
