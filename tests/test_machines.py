"""Two machines that the kernel keeps apart train and solve as one does, launched by torchrun, by SLURM and by hand."""

import contextlib
import signal
from pathlib import Path

import pytest
from machines import Machine
from test_reliability import assert_same, recipe
from test_run_folders import slurm
from test_ship_production import ckpt, digests, solve

from amortized.cli.app import main

__all__ = ["ckpt", "slurm"]  # the fixtures

pytestmark = [pytest.mark.slow, pytest.mark.long]


@contextlib.contextmanager
def connected():
    both = []
    try:
        both.append(Machine(0))
        both.append(Machine(1, other=both[0]))
        yield both
    finally:
        for machine in both:
            machine.off()


@pytest.fixture
def machines():
    with connected() as both:
        yield both


def finish(tasks):
    for task in tasks:
        assert task.wait() == 0, task.output()


def torchrun(machines, *args):
    """The same command on each machine."""
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=machine0:29400"]
    return [machine.start("torch.distributed.run", *words, "-m", "amortized", *args) for machine in machines]


def srun(machines, job, *args):
    """A task on each machine, as SLURM starts it."""
    job = job | {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "machine[0-1]",
    }
    tasks = [job | {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number)} for number in range(2)]
    return [machine.start("amortized", *args, **task) for machine, task in zip(machines, tasks, strict=True)]


def test_torchrun_trains_as_on_one_machine_also_after_a_power_cut():
    main([*recipe(processes=2), "--run_folder=whole"])
    args = [*recipe(), "--trainer.num_nodes=2", "--run_folder=run", "--resume=auto"]
    with connected() as machines:
        tasks = torchrun(machines, *args)
        tasks[0].wait_for(lambda: list(Path("run/checkpoints").glob("step=*.sha256")))
    with connected() as machines:
        tasks = torchrun(machines, *args)
        finish(tasks)
    assert "takes run/checkpoints/step=" in tasks[0].output()
    assert_same("run", "whole")


def test_slurm_trains_as_on_one_machine_also_when_the_job_goes_back_into_the_queue(machines, slurm):
    main([*recipe(processes=2), "--run_folder=whole"])
    job = [*recipe(), "--trainer.num_nodes=2", "--run_folder=run", "--resume=auto", "--checkpoint.every_n_steps=1000"]
    tasks = srun(machines, slurm, *job)
    tasks[0].wait_for(lambda: Path("run/checkpoints/best.ckpt").exists())
    for task in tasks:
        task.signal(signal.SIGUSR1)
    assert [task.wait() for task in tasks] == [128 + signal.SIGUSR1] * 2, tasks[0].output()
    assert Path("told").read_text() == "requeue 123\n"
    finish(srun(machines, slurm, *job))
    assert_same("run", "whole")


def test_mass_production_writes_the_files_of_one_machine(machines, ckpt):
    main(solve(ckpt, "one"))
    shares = [solve(ckpt, "two", f"--shards={number}/2") for number in range(2)]
    finish([machine.start("amortized", *share) for machine, share in zip(machines, shares, strict=True)])
    assert digests("two") == digests("one")
    assert Path("two/summary.json").read_bytes() == Path("one/summary.json").read_bytes()
