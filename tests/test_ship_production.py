"""Shards: the same files from any number of processes, whole or not there, whatever is killed."""

import hashlib
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run
from test_checkpoints import FIT, refusal

import amortized
from amortized.cli.app import main
from amortized.cli.ship import checkpoint_of
from amortized.shipping.production import share


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--data.num_val=200", "--run_folder=run"])
    return max((folder / "run" / "checkpoints").glob("step=*.ckpt"))


def solve(ckpt, out, *more, contexts=1000):
    return [
        "solve",
        f"--ckpt_path={ckpt}",
        f"--contexts={contexts}",
        "--shard_size=128",
        f"--out={out}",
        "--tol=0.5",
        *more,
    ]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("shard-*"))}


def test_any_number_of_processes_write_the_same_files(ckpt):
    main(solve(ckpt, "one", "--batch_size=50"))
    for part in ("2/3", "0/3", "1/3"):
        main(solve(ckpt, "three", "--batch_size=50", f"--shards={part}"))
    assert digests("one") == digests("three")
    assert len(digests("one")) == 2 * 8
    shard = dict(np.load("one/shard-000007.npz"))
    assert {name: len(column) for name, column in shard.items()} == dict.fromkeys(
        ("b", "objective", "certificate", "path", "violation", "evaluations", "unlike"), 1000 - 7 * 128
    )
    found = json.loads(Path("three/summary.json").read_text())
    assert found["contexts"] == sum(found["paths"].values()) == found["finite"] == 1000
    assert json.loads(Path("one/manifest.json").read_text())["shards"] == 8


def test_a_shard_is_what_solve_says_of_its_contexts(ckpt):
    main(solve(ckpt, "out", "--with_contexts=true", contexts=100))
    shard = dict(np.load("out/shard-000000.npz"))
    solver = amortized.load(ckpt)
    answer = solver.solve(torch.from_numpy(shard["a"]), tol=0.5, batch_size=4096)
    assert np.array_equal(answer.b.numpy(), shard["b"])
    assert np.array_equal(answer.certificate.numpy(), shard["certificate"])
    main(solve(ckpt, "other", "--with_contexts=true", contexts=300))
    again = np.concatenate([np.load(path)["a"] for path in sorted(Path("other").glob("*.npz"))])
    assert len(np.unique(again, axis=0)) == 300  # none twice
    for split in ("val", "test"):
        held = solver.data.batch(split, 0).numpy()
        assert not (again[:, None] == held).all(2).any()


@pytest.mark.parametrize(
    ("kills", "contexts"), [(1, 2_000), pytest.param(3, 100_000, marks=pytest.mark.slow)], ids=["once", "three times"]
)
def test_a_run_killed_loses_nothing_and_does_nothing_twice(ckpt, kills, contexts):
    main(solve(ckpt, "whole", contexts=contexts))
    whole, draw = digests("whole"), random.Random(0)
    for _ in range(kills):
        run = Run(solve(ckpt, "killed", contexts=contexts))
        before = len(digests("killed"))
        run.wait_for(lambda before=before: len(digests("killed")) > before + 2)
        time.sleep(0.1 * draw.random())
        run.kill()
        assert all(np.load(path)["b"].shape for path in Path("killed").glob("shard-*.npz"))  # each is whole
    done = {name: Path("killed", name).stat().st_mtime_ns for name in digests("killed")}
    notes = [name for name in done if name.endswith(".json")]
    main(solve(ckpt, "killed", contexts=contexts))
    assert digests("killed") == whole
    assert all(Path("killed", name).stat().st_mtime_ns == done[name] for name in notes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_preempted_leaves_whole_shards_alone(ckpt, number):
    job = solve(ckpt, "out", contexts=50_000)
    run = Run(job)
    run.wait_for(lambda: digests("out"))
    run.signal(number)
    assert run.wait() == 128 + number, run.output()
    names = {path.name for path in Path("out").iterdir()}
    shards = {name.removesuffix(".npz") for name in names if name.endswith(".npz")}
    assert 0 < len(shards) < 391
    assert not [name for name in names if name.endswith("unfinished")]
    assert {path.stem for path in Path("out").glob("shard-*.json")} <= shards


def test_what_is_damaged_is_found_and_made_anew(ckpt):
    main(solve(ckpt, "out"))
    whole = digests("out")
    path = Path("out/shard-000003.npz")
    path.write_bytes(path.read_bytes()[:-100])
    main(solve(ckpt, "out"))
    assert digests("out") != whole
    main(solve(ckpt, "out", "--verify=true"))
    assert digests("out") == whole


def test_a_finite_set_and_a_file_have_so_many_contexts(ckpt, capsys):
    np.save("a.npy", np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32))
    main(solve(ckpt, "out", "--predict=a.npy", "--batch_size=100", "--with_contexts=true", contexts=300))
    got = np.concatenate([np.load(path)["a"] for path in sorted(Path("out").glob("*.npz"))])
    assert np.array_equal(got, np.load("a.npy"))
    assert "has 300 contexts; asked for 301" in refusal(capsys, *solve(ckpt, "more", "--predict=a.npy", contexts=301))


def test_a_context_with_nan_is_named(ckpt, capsys):
    a = np.zeros((300, 3), np.float32)
    a[[140, 290], 1] = np.nan
    np.save("a.npy", a)
    main(solve(ckpt, "out", "--predict=a.npy", contexts=300))
    told = [line for line in capsys.readouterr().out.splitlines() if "NaN" in line]
    assert told == [f"not solved, as there is NaN in the context: row {row} (NaN in its context)" for row in (140, 290)]


def test_what_does_not_fit_is_refused_in_one_line(ckpt, capsys):
    main(solve(ckpt, "out", contexts=10))
    assert "their tol is 0.5, given 0.25; name another --out" in refusal(
        capsys, *solve(ckpt, "out", "--tol=0.25", contexts=10)
    )
    assert "--shards is i/n" in refusal(capsys, *solve(ckpt, "new", "--shards=3/3"))
    assert "--contexts must be at least 1" in refusal(capsys, *solve(ckpt, "new", contexts=0))
    assert "tol must be positive" in refusal(capsys, *solve(ckpt, "new", "--tol=0"))
    assert "which model?" in refusal(capsys, "solve", "--contexts=1", "--out=new")
    assert "there is no trained model of vae_fashion" in refusal(
        capsys, "solve", "-c", "vae_fashion", "--contexts=1", "--out=new"
    )
    assert "holds a Quadratic, sphere asks for a Sphere" in refusal(capsys, *solve(ckpt, "new", "-c", "sphere"))


def test_the_config_of_a_run_says_which_model(ckpt, monkeypatch):
    monkeypatch.chdir(ckpt.parent.parent.parent)
    assert checkpoint_of("run/config.yaml", None).name == ckpt.name


def test_torchrun_and_slurm_say_which_share_it_is(monkeypatch):
    assert share(None) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "5")
    assert share(None) == (2, 5)
    for name, value in (("ID", 7), ("COUNT", 4), ("MIN", 5)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert share(None) == (2, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share(None) == (1, 3)
    assert share("0/9") == (0, 9)
