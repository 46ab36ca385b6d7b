"""Runs that are killed or told to stop, and resumed, are bit for bit those that were not."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import Run, last_checkpoint, metrics

STEPS = 120


def recipe(accumulate=1, workers=0, processes=1, data="toy.Gaussians", **model):
    args = [
        "fit",
        "--model=toy.Quadratic",
        "--model.noise=0.3",
        "--model.dropout=0.2",
        f"--data={data}",
        "--data.batch_size=16",
    ]
    args += [
        "--data.num_val=64",
        "--data.num_test=64",
        f"--data.num_workers={workers}",
        "--gap.solver=LBFGS",
        "--gap.max_fraction=1",
        "--gap.solver.steps=20",
    ]
    args += [
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=40",
        "--trainer.check_val_every_n_epoch=null",
    ]
    args += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--checkpoint.every_n_steps=7"]
    args += [
        f"--trainer.accumulate_grad_batches={accumulate}",
        "--trainer.enable_progress_bar=false",
        "--budget.enabled=false",
    ]
    args += [f"--trainer.devices={processes}"] + (["--trainer.strategy=ddp_fork"] if processes > 1 else [])
    return args


def assert_same(folder, expected):
    """Loss curve, validations and weights, to the last bit."""
    got, want = metrics(folder), metrics(expected)
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for column in ("train/loss", "val/objective", "val/gap/mean", "test/gap/mean"):
        assert [line[column] for line in got] == [line[column] for line in want], column
    ours, theirs = last_checkpoint(folder), last_checkpoint(expected)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for name, weight in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], weight), name


def fit_with_kills(args, kills, rng, length):
    """Fit in ``folder``; kill -9 after random times, sometimes around the writing of a checkpoint; resume until it ends."""
    folder = Path("killed")
    killed = 0
    for attempt in range(kills + 1):
        resume = ["--ckpt_path=killed"] if any(folder.glob("checkpoints/*.ckpt")) else []
        run = Run([*args, "--run_folder=killed", *resume])
        if attempt == kills:
            assert run.wait() == 0, run.output()
            break
        if rng.random() < 0.4:  # just around a save
            before = {p.name for p in folder.glob("checkpoints/*")} | {p.name for p in folder.glob("checkpoints/.*")}
            run.wait_for(
                lambda before=before: (
                    {p.name for p in [*folder.glob("checkpoints/*"), *folder.glob("checkpoints/.*")]} - before
                )
            )
            time.sleep(rng.uniform(0, 0.01))
        else:
            run.wait_for(lambda: (folder / "config.yaml").exists())
            time.sleep(rng.uniform(0.05, length))
        killed += run.process.is_alive()
        run.kill()
    return killed


CASES = [(1, 0, 1), (4, 0, 1), (1, 2, 1), (4, 2, 1), (1, 0, 2), (4, 0, 2)]


def killed_and_resumed(accumulate, workers, processes, kills, seed):
    args = recipe(accumulate, workers, processes, data="toy.FiniteGaussians" if workers else "toy.Gaussians")
    run = Run([*args, "--run_folder=whole"])
    assert run.wait() == 0, run.output()
    killed = fit_with_kills(args, kills, random.Random(seed), length=0.4 * accumulate * processes)
    assert killed
    assert_same("killed", "whole")


@pytest.mark.parametrize("case", range(6), ids=["-".join(map(str, case)) for case in CASES])
def test_killed_and_resumed_is_bit_identical(case):
    killed_and_resumed(*CASES[case], kills=1 + case % 3, seed=case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [0, 1, 4, 5], ids=lambda case: "-".join(map(str, CASES[case])))
def test_killed_again_and_resumed_is_bit_identical(case):
    killed_and_resumed(*CASES[case], kills=3 - case % 3, seed=100 + case)


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_stop_saves_once_and_resumes_exactly(number, code, group, processes):
    args = recipe(accumulate=2, processes=processes)
    args[args.index("--checkpoint.every_n_steps=7")] = "--checkpoint.every_n_steps=1000"
    whole = Run([*args, "--run_folder=whole"], log="whole.txt")
    stopped = Run([*args, "--run_folder=stopped", f"--trainer.max_steps={STEPS}"])
    stopped.wait_for(lambda: Path("stopped/checkpoints/best.ckpt").exists())  # the first validation is over
    stopped.signal(number, group)
    told = time.monotonic()
    assert stopped.wait() == code, stopped.output()
    assert time.monotonic() - told < 10
    assert len(list(Path("stopped/checkpoints").glob("step=*.ckpt"))) == 1, stopped.output()
    assert "continue with --ckpt_path" in stopped.output()
    assert whole.wait() == 0, whole.output()
    resumed = Run([*args, "--run_folder=stopped", "--ckpt_path=stopped"])
    assert resumed.wait() == 0, resumed.output()
    assert_same("stopped", "whole")


@pytest.mark.parametrize("interval", [40, 60], ids=["second of three", "last"])
def test_told_to_stop_in_a_validation(interval):
    args = recipe()
    args[args.index("--checkpoint.every_n_steps=7")] = "--checkpoint.every_n_steps=1000"
    args += ["--gap.solver=GradientDescent", "--gap.solver.steps=1000", "--gap.solver.tol=0", "--gap.solver.lr=1e-6"]
    args += [f"--trainer.val_check_interval={interval}"]
    whole = Run([*args, "--run_folder=whole"])
    assert whole.wait() == 0, whole.output()
    stopped = Run([*args, "--run_folder=stopped"])
    stopped.wait_for(lambda: Path("stopped/checkpoints/best.ckpt").exists())
    time.sleep(interval / 100)  # the steps to the second validation take less, the validation takes longer
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(10) == 143, stopped.output()
    resumed = Run([*args, "--run_folder=stopped", "--ckpt_path=stopped"])
    assert resumed.wait() == 0, resumed.output()
    assert_same("stopped", "whole")
