"""Each run has one folder of its own; runs start, go on and are tested from what is good in it, or say why not."""

import errno
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from runs import Run, last_checkpoint
from test_checkpoints import FIT, GOOD, LAST, MODEL, QUIET, fitted, flip, refusal, rewrite, seal, truncate
from test_reliability import assert_same, recipe

from amortized import checkpoint, disk, npz
from amortized.cli.app import main

__all__ = ["fitted"]  # the fixture


@pytest.fixture
def run(fitted):
    """The folder of a run of twenty steps."""
    shutil.copytree(fitted, "run")
    return Path("run")


# ---- one folder a run


def test_of_those_who_ask_at_once_each_gets_a_folder(tmp_path):
    start, made = threading.Barrier(20), []

    def ask():
        start.wait()
        made.append(disk.make_new(tmp_path / "runs" / "toy" / "20240101-000000"))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20
    assert all(folder.is_dir() for folder in made)


def test_five_runs_started_at_once_have_five_folders():
    args = [arg for arg in FIT if "max_steps" not in arg] + ["--trainer.max_steps=2", "--data.num_test=8"]
    runs = [Run([*args, f"--seed_everything={seed}"], log=f"log-{seed}.txt") for seed in range(5)]
    for run in runs:
        assert run.wait() == 0, run.output()
    folders = list(Path("runs/Quadratic").iterdir())
    assert len(folders) == 5
    assert {last_checkpoint(folder)[checkpoint.RECIPE]["seed_everything"] for folder in folders} == set(range(5))
    assert all((folder / "results.json").is_file() for folder in folders)


def launched(args, rank, port):
    """One of two processes that torchrun launches."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    args = [*args, "--trainer.devices=2", "--trainer.strategy=ddp"]
    return Run(args, log=f"log-{rank}.txt", **{name: str(value) for name, value in environment.items()})


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_processes_that_start_apart_have_one_folder(command, port):
    args = [command, "--model=toy.Filed", "--data=toy.FiniteGaussians", "--data.eval_batch_size=50", *QUIET]
    args += ["--trainer.max_steps=2"] if command == "fit" else ["--ckpt_path=untrained"]
    late = []
    for rank in range(2):
        late.append(launched(args, rank, port))
        time.sleep(1.2)  # so that they do not find the same time
    for run in late:
        assert run.wait() == 0, run.output()
    (folder,) = Path("runs/Filed").iterdir()
    if command == "predict":
        assert len(list((folder / "predictions").iterdir())) == 833


def test_processes_that_would_go_on_from_different_checkpoints_are_refused(port):
    """As on machines that do not share the disk: here the second looks for them in a folder of its own."""
    main([*FIT, "--run_folder=run", "--trainer.devices=2", "--trainer.strategy=ddp_fork"])
    together = [
        launched([*FIT, "--resume=auto", f"--run_folder={name}"], rank, port)
        for rank, name in enumerate(("run", "new"))
    ]
    told = "process 0 begins with step=00000020.ckpt of step 20, process 1 with no checkpoint: all need the same folder run"
    for each in together:
        assert each.wait() == 2, each.output()
        assert f"error: {told}, on a disk that their machines share\n" in each.output()


@pytest.mark.parametrize(
    "given", [["--run_folder=file/run"], ["--run_folder=file"], []], ids=["in a file", "a file", "runs"]
)
def test_a_folder_that_cannot_be_made_is_told(given, capsys):
    Path("file").write_text("")
    Path("runs").write_text("")
    assert "cannot be made (" in refusal(capsys, *FIT, *given)


def test_a_run_that_cannot_start_leaves_no_folder(capsys):
    assert "devices" in refusal(capsys, *FIT, "--trainer.devices=0")
    assert not list(Path("runs/Quadratic").iterdir())


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(run, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = GOOD.stat().st_size  # the last has its certificate too
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        error = refusal(capsys, *FIT, "--ckpt_path=run", "--trainer.max_steps=30")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error == "error: run/checkpoints/step=00000030.ckpt: File too large\n"
    assert checkpoint.newest("run").path == LAST
    assert not [path for path in Path("run/checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_told(number, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(npz, "write", fail)
    error = refusal(capsys, "predict", *MODEL, *QUIET, "--ckpt_path=untrained", "--run_folder=run")
    assert error == f"error: run: {os.strerror(number)}\n"


# ---- whole after a power cut


def test_content_is_on_the_disk_before_its_name_and_the_name_at_the_end(monkeypatch):
    """What a power cut would leave is never a name without its content; nor is a finished write lost."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle):
        events.append(("sync", os.path.realpath(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def named(path, to):
        events.append(("name", str(path.absolute()), str(Path(to).absolute())))
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    main([*FIT, "--run_folder=run"])
    written = {}
    for at, event in enumerate(events):
        if event[0] == "name" and event[2].endswith((".ckpt", ".sha256", "config.yaml")):
            _, source, to = event
            assert ("sync", source) in events[:at], to
            assert ("sync", str(Path(to).parent)) in events[at:], to
            written[Path(to).name] = at
    assert set(written) == {"config.yaml"} | {
        name for path in (GOOD, LAST) for name in (path.name, f"{path.name}.sha256")
    }
    assert written[LAST.name] < written[f"{LAST.name}.sha256"]
    for folder in (Path("run"), Path("run/checkpoints")):  # these names last, too
        assert ("sync", str(folder.absolute().parent)) in events


def test_no_moment_of_an_overwriting_save_leaves_a_checkpoint_that_is_refused(tmp_path, monkeypatch):
    path, replace = tmp_path / "best.ckpt", Path.replace
    checkpoint.save({"w": torch.zeros(2)}, path)
    seen = []

    def looked_at(source, to):
        seen.append(float(checkpoint.load(path)["w"][0]))
        result = replace(source, to)
        seen.append(float(checkpoint.load(path)["w"][0]))
        return result

    monkeypatch.setattr(Path, "replace", looked_at)
    checkpoint.save({"w": torch.ones(2)}, path)
    assert seen == [0, 1, 1, 1]


# ---- what is not finite is never saved


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_nan_is_not_saved_and_the_good_checkpoint_stays(what, processes, run, capsys):
    spoil = ["--trainer.callbacks=toy.Spoil", "--trainer.callbacks.step=20", f"--trainer.callbacks.what={what}"]
    args = [*FIT, *spoil, "--checkpoint.keep=1", "--run_folder=spoilt"]
    if processes == 1:
        error = refusal(capsys, *args)
        assert "step 20 is not saved" in error
        assert "the last good checkpoint is spoilt/checkpoints/step=00000010.ckpt" in error
    else:
        spoilt = Run([*args, "--trainer.devices=2", "--trainer.strategy=ddp_fork"])
        assert spoilt.wait(60) not in (0, None)
        assert "step 20 is not saved" in spoilt.output()
    assert [path.name for path in Path("spoilt/checkpoints").glob("*.ckpt")] == ["step=00000010.ckpt"]
    assert checkpoint.newest("spoilt").step == 10


@pytest.mark.parametrize(
    "good",
    [
        torch.eye(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True]),
        torch.tensor(3),
        "a word",
    ],
    ids=lambda good: str(getattr(good, "dtype", "str")),
)
def test_any_kind_of_tensor_can_be_saved(good, tmp_path):
    checkpoint.save({"state_dict": {"good": good}}, tmp_path / "good.ckpt")
    checkpoint.load(tmp_path / "good.ckpt")


# ---- a checkpoint of others


def test_names_to_rotate_that_are_not_ours_are_left_alone(run):
    folders = [Path("precious").absolute(), Path("run/precious"), Path("run/checkpoints/step=00000001.ckpt")]
    for folder in folders:
        folder.mkdir()
    Path("mine.ckpt").write_text("mine")
    names = [
        str(folders[0]),
        "../precious",
        "../../precious",
        "step=00000001.ckpt",
        "../../mine.ckpt",
        "",
        ".",
        LAST.name,
    ]

    def change(saved):
        (state,) = (state for name, state in saved["callbacks"].items() if name.startswith("Checkpoint"))
        state["saved"] = names

    rewrite(LAST, change)
    main([*FIT, "--ckpt_path=run", "--trainer.max_steps=30", "--checkpoint.keep=1"])
    assert all(folder.is_dir() for folder in folders)
    assert Path("mine.ckpt").read_text() == "mine"
    assert not LAST.exists()  # ours is rotated out
    assert checkpoint.newest("run").step == 30


@pytest.mark.parametrize("command", ["fit", "test"])
def test_nothing_is_imported_on_a_checkpoint_s_word(command, run, capsys, monkeypatch, tmp_path):
    Path("payload.py").write_text(
        "open('payload-ran', 'w')\nclass Quadratic: pass\nclass Adam: pass\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def change(name):
        def changed(saved):
            model = saved[checkpoint.RECIPE]["model"]
            model["class_path"] = f"payload.{name}"
            model["init_args"]["optimizer"]["class_path"] = "payload.Adam"

        return changed

    args = FIT if command == "fit" else [command, *MODEL, *QUIET, "--run_folder=other"]
    rewrite(LAST, change("Evil"))
    assert "it holds a Evil, the recipe asks for a Quadratic" in refusal(capsys, *args, f"--ckpt_path={LAST}")
    rewrite(LAST, change("Quadratic"))
    main([*args, f"--ckpt_path={LAST}"])
    assert "payload" not in sys.modules
    assert not Path("payload-ran").exists()


# ---- resuming


@pytest.mark.parametrize(
    "setting",
    ["--data.num_workers=1", "--data.num_test=16", "--data.eval_batch_size=8", "--model.compile=true"],
    ids=lambda setting: setting[2:],
)
def test_what_does_not_change_the_run_may_change(setting, run):
    main([*FIT, setting, "--ckpt_path=run"])


@pytest.mark.parametrize(
    "setting",
    ["--data.num_val=16", "--data.seed=1", "--model.optimizer.lr=1", "--trainer.gradient_clip_algorithm=norm"],
    ids=lambda setting: setting[2:],
)
def test_what_changes_the_run_is_named_and_nothing_false_said(setting, run, capsys):
    optimizer = ["--model.optimizer=torch.optim.Adam"] if "optimizer" in setting else []
    error = refusal(capsys, *FIT, *optimizer, setting, "--ckpt_path=run")
    assert f"{LAST} was trained with other settings: " in error
    assert setting[2:].split("=")[0].split(".")[-1] in error
    assert "good checkpoint" not in error
    truncate(LAST)  # the other one is good, though not for these settings
    error = refusal(capsys, *FIT, *optimizer, setting, f"--ckpt_path={LAST}")
    assert f"beside it, {GOOD} was trained with other settings" in error


def test_another_number_of_processes_is_refused(run, capsys):
    rewrite(LAST, lambda saved: saved.update({checkpoint.PROCESSES: 2}))
    error = refusal(capsys, *FIT, "--ckpt_path=run")
    assert f"{LAST} was trained on 2 processes, here are 1: go on with as many, or start" in error
    main([*FIT, f"--init_from={LAST}", "--run_folder=other"])
    assert last_checkpoint("other")[checkpoint.PROCESSES] == 1


def test_the_number_of_processes_is_kept():
    args = [*FIT, "--trainer.devices=2", "--trainer.strategy=ddp_fork", "--run_folder=two"]
    two = Run(args)
    assert two.wait() == 0, two.output()
    assert last_checkpoint("two")[checkpoint.PROCESSES] == 2


def test_another_network_is_told_in_one_line(run, capsys):
    rewrite(LAST, lambda saved: saved["state_dict"].update({"network.0.weight": torch.zeros(16, 4)}))
    expected = (
        f"{LAST}: the checkpoint is of another network: its network.0.weight has shape (16, 4), the model's (16, 3)"
    )
    assert expected in refusal(capsys, *FIT, f"--ckpt_path={LAST}")
    assert expected in refusal(capsys, "test", *MODEL, *QUIET, f"--ckpt_path={LAST}")
    rewrite(LAST, lambda saved: saved["state_dict"].pop("network.0.weight"))
    assert "it has no network.0.weight" in refusal(capsys, "test", *MODEL, *QUIET, f"--ckpt_path={LAST}")


def test_a_run_does_not_go_on_in_the_folder_of_another(run, capsys):
    shutil.copytree("run", "other")
    assert "other holds a run" in refusal(capsys, *FIT, "--ckpt_path=run", "--run_folder=other")


def test_resume_auto_starts_or_goes_on(capsys):
    args = [*FIT, "--resume=auto", "--run_folder=run"]
    main(args)
    assert "takes" not in capsys.readouterr().out
    main(["fit", "-c", "run/config.yaml", "--trainer.max_steps=30"])  # the setting is kept
    assert f"takes {LAST}, of step 20" in capsys.readouterr().out
    assert checkpoint.newest("run").step == 30


def test_resume_auto_does_not_start_over(run, capsys):
    args = [*FIT, "--resume=auto"]
    for rest in ([], ["--ckpt_path=run", "--run_folder=run"]):
        assert "--resume auto goes on in the folder that --run_folder names" in refusal(capsys, *args, *rest)
    for path in (GOOD, LAST):
        flip(path)
    assert f"there is no good checkpoint in run: {LAST} is damaged" in refusal(capsys, *args, "--run_folder=run")


# ---- SLURM


@pytest.fixture
def slurm(tmp_path):
    """The environment of a SLURM job, whose ``scontrol`` writes down what it was told."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    scontrol.chmod(0o755)
    names = {
        "JOB_ID": 123,
        "JOB_NAME": "train",
        "NTASKS": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
        "NODELIST": "node1",
    }
    job = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return job | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def test_a_slurm_job_is_put_back_and_goes_on_exactly(slurm):
    args = [*recipe(), "--checkpoint.every_n_steps=1000"]
    whole = Run([*args, "--run_folder=whole"], log="whole.txt", **slurm)
    same = [*args, "--run_folder=job", "--resume=auto"]
    job = Run(same, **slurm)
    job.wait_for(lambda: Path("job/checkpoints/best.ckpt").exists())
    job.signal(signal.SIGUSR1)
    assert job.wait() == 128 + signal.SIGUSR1, job.output()
    assert Path("told").read_text() == "requeue 123\n"
    assert not list(Path("job").glob("*hpc*"))
    assert whole.wait() == 0, whole.output()
    seal(shutil.copy("job/checkpoints/best.ckpt", Path("job/hpc_ckpt_1.ckpt")))  # as Lightning's own handling left it
    again = Run(same, **slurm)
    assert again.wait() == 0, again.output()
    assert Path("job/results.json").is_file()
    assert_same("job", "whole")


def test_without_resume_auto_a_job_is_not_put_back_to_start_over(slurm):
    job = Run([*recipe(), "--checkpoint.every_n_steps=5", "--run_folder=job"], **slurm)
    job.wait_for(lambda: list(Path("job").glob("checkpoints/step=*.ckpt")))
    job.signal(signal.SIGUSR1)
    assert job.wait() == 128 + signal.SIGUSR1, job.output()
    assert "stopped by SIGUSR1" in job.output()
    assert not Path("told").exists()


def test_a_job_whose_tasks_have_no_place_is_told(slurm, monkeypatch, capsys):
    for name, value in (slurm | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    assert "Use `--ntasks-per-node=2` instead" in refusal(capsys, *FIT)


def test_lightning_counts_its_slurm_checkpoints_right(tmp_path):
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    for number in (1, 2, 3):
        path = trainer._checkpoint_connector.hpc_save_path(tmp_path)
        assert Path(path).name == f"hpc_ckpt_{number}.ckpt"
        checkpoint.WholeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": number}, path)
    assert checkpoint.newest(tmp_path).step == 3


# ---- a trained model, or an untrained one that was asked for


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_without_a_checkpoint_the_run_s_own_newest_is_taken(command, run, capsys):
    truncate(LAST)
    for args in (["-c", "run/config.yaml", "--run_folder=out"], [*MODEL, *QUIET, "--run_folder=run"]):
        main([command, *args])
        out = capsys.readouterr().out
        assert f"not the newest checkpoint: {LAST} is damaged" in out
        assert f"takes {GOOD}, of step 10" in out


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_without_a_trained_model_it_is_refused(command, capsys):
    error = refusal(capsys, command, "-c", "vae_digits")
    assert f"{command} needs a trained model: give --ckpt_path" in error
    assert "the last run of vae_digits" in error
    assert not Path("runs").exists()


def test_an_untrained_network_is_tested_when_asked_for_and_replaces_nothing(run, capsys):
    results = (run / "results.json").read_bytes()
    error = refusal(capsys, "test", *MODEL, *QUIET, "--ckpt_path=untrained", "--run_folder=run")
    assert "run holds a trained run, whose results those of an untrained network would replace" in error
    main(["test", *MODEL, *QUIET, "--ckpt_path=untrained", "--run_folder=new"])
    assert (run / "results.json").read_bytes() == results
    assert Path("new/results.json").read_bytes() != results
    main(["test", "-c", "new/config.yaml"])  # it is in the recipe
    assert yaml.safe_load(Path("new/config.yaml").read_text())["ckpt_path"] == "untrained"


# ---- from weights alone


@pytest.mark.parametrize("source", ["run", LAST, "small.ckpt", "weights.ckpt"], ids=str)
def test_from_the_weights_alone_with_other_settings(source, run, capsys):
    checkpoint.strip(LAST, "small.ckpt")
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    torch.save(weights, "weights.ckpt")
    args = ["fit", "--model=toy.Quadratic", "--data=toy.FiniteGaussians", "--data.num_eval=32", *FIT[len(MODEL) + 1 :]]
    args += ["--gap.solver=LBFGS", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-12"]
    main([*args, f"--init_from={source}", "--run_folder=tuned"])
    path = LAST if source == "run" else source
    assert f"starts from the weights of {path} alone" in capsys.readouterr().out
    assert yaml.safe_load(Path("tuned/config.yaml").read_text())["init_from"] == str(path)
    tuned = last_checkpoint("tuned")
    assert tuned["global_step"] == 20
    for name, weight in weights.items():
        assert torch.allclose(tuned["state_dict"][name], weight, atol=1e-6), name
    main([*args, f"--init_from={source}", "--run_folder=tuned", "--ckpt_path=tuned"])  # what it goes on from wins
    assert "takes tuned/checkpoints/step=00000020.ckpt" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_named(run, capsys):
    error = refusal(capsys, *FIT, "--model.dim=4", "--data.dim=4", "--init_from=run", "--run_folder=tuned")
    assert f"--init_from {LAST}: the checkpoint is of another network: its network.0.weight has shape (16, 3)" in error
    assert "no such checkpoint: none.ckpt" in refusal(capsys, *FIT, "--init_from=none.ckpt")


def test_a_folder_keeps_the_settings_of_the_last_command_of_a_kind(run):
    before = Path("run/config.yaml").read_text()
    np.save("a.npy", np.zeros((2, 3), np.float32))
    for size in (7, 8, 9):
        more = ["--data.predict=a.npy", f"--data.eval_batch_size={size}"]
        main(["predict", "-c", "run/config.yaml", "--run_folder=run", *more])
    main(["test", "-c", "run/config.yaml", "--run_folder=run"])
    assert {path.name for path in run.glob("config*")} == {"config.yaml", "config-predict.yaml", "config-test.yaml"}
    assert Path("run/config.yaml").read_text() == before
    assert yaml.safe_load(Path("run/config-predict.yaml").read_text())["data"]["init_args"]["eval_batch_size"] == 9
