"""What ``predict`` writes: every row by its name, a bad one alone not a number, all processes into one folder."""

import csv
import errno
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning import Callback
from runs import Run
from test_cli import error
from torch.distributions import Normal
from toy import Pair, Quadratic

from amortized.callbacks.parts import Parts
from amortized.cli.app import main
from amortized.contexts import files

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
KEEPS_NOTHING = ["--trainer.callbacks=test_predictions.KeepsNothing"]
DIGITS = Path(__file__).parent.parent / "checkpoints" / "vae_digits.ckpt"


class Sums(NamedTuple):
    total: torch.Tensor
    sign: torch.Tensor


class Strict(Quadratic):
    """Does not stand NaN: not in contexts, not in solutions."""

    def objective(self, b, a):
        Normal(a, 1.0)
        return super().objective(b, a)

    def decode(self, b, a):
        Normal(b, 1.0)
        return Sums(b.sum(1), b.sign().long())


class Difference(Quadratic):
    def __init__(self, **kwargs):
        super().__init__(dim=3, **kwargs)

    def observe(self, a):
        return a.x - a.y

    def objective(self, b, a):
        return super().objective(b, self.observe(a))


class Slow(Quadratic):
    """Takes its time over each batch, so that it can be killed in the midst of them."""

    def decode(self, b, a):
        time.sleep(0.005)
        return b


class Filed(Quadratic):
    """A file for each row."""

    def save(self, decoded, paths):
        files = [path.with_suffix(".npy") for path in paths]
        for row, file in zip(decoded, files, strict=True):
            np.save(file, row.numpy())
        return files


class Ragged(Quadratic):
    """Decodes to shapes that depend on the context."""

    def decode(self, b, a):
        return b[:, : 1 + int(a[0, 0] > 1)]


class OwnFolder(Callback):
    """Each process has chosen a folder of its own, as processes launched at different seconds do."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank:
            trainer._default_root_dir = f"other-{trainer.global_rank}"


class KeepsNothing(Callback):
    """The trainer does not keep what is written."""

    def on_predict_end(self, trainer, pl_module):
        assert not any(trainer.predict_loop.predictions)


def predict(model, contexts, *options, data="toy.Gaussians"):
    """Of a network as it is drawn; with this very seed in each call."""
    if isinstance(contexts, Pair):
        np.savez("contexts.npz", **{k: v.numpy() for k, v in contexts._asdict().items()})
    elif contexts is not None:
        np.save("contexts.npy", contexts.numpy())
    given = [] if contexts is None else [f"--data.predict={next(Path().glob('contexts.*'))}"]
    main(
        [
            "predict",
            f"--model={model}",
            f"--data={data}",
            *given,
            "--ckpt_path=untrained",
            "--run_folder=out",
            *QUIET,
            *options,
        ]
    )
    return dict(np.load("out/predictions.npz")) if Path("out/predictions.npz").is_file() else None


def table():
    with Path("out/predictions.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_row_costs_nothing_but_itself(value):
    a = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    model = "test_predictions.Strict" if np.isnan(value) else "toy.Quadratic"
    good = predict(model, torch.cat([a[:2], a[3:]]))
    a[2, 1] = value
    why = r" \(NaN in its context\)" if np.isnan(value) else ""
    with pytest.warns(UserWarning, match=f"^1 of 6 is not finite: row 2{why}$"):
        found = predict(model, a)
    for key in good.keys() - {"name"}:
        assert np.array_equal(np.delete(found[key], 2, 0), good[key]), key
    assert not np.isfinite(found["objective"][2])
    assert all(np.isnan(found[key][2]).all() for key in found if key.startswith("decoded"))
    a[:] = value
    with pytest.warns(UserWarning, match="^6 of 6 are not finite: row " + ", ".join(f"{row}{why}" for row in range(6))):
        found = predict(model, a)
    assert not np.isfinite(found["objective"]).any()


def test_a_nan_pixel_among_six_digits():
    digits = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)).round()
    rows = {}
    for name in ("whole", "broken"):
        np.save("digits.npy", digits.numpy())
        main(
            [
                "predict",
                "-c",
                "vae_digits",
                f"--ckpt_path={DIGITS}",
                "--data.predict=digits.npy",
                "--run_folder=out",
                *QUIET,
            ]
        )
        rows[name] = dict(np.load("out/predictions.npz"))
        digits[5, 10] = torch.nan
    assert {"decoded.mean", "decoded.stddev"} < set(rows["whole"])
    for key in rows["whole"].keys() - {"name", "objective"}:
        assert np.allclose(rows["broken"][key][:5], rows["whole"][key][:5], rtol=1e-5, atol=1e-6), key
        assert np.isnan(rows["broken"][key][5]).all()
        assert np.isfinite(rows["whole"][key]).all()


def test_rows_are_named_and_have_their_contexts_on_request(capfd):
    a = Pair(*torch.randn(2, 6, 3))
    found = predict("test_predictions.Difference", a, "--data.eval_batch_size=4", *KEEPS_NOTHING, data="toy.Pairs")
    assert found["name"].tolist() == [f"{row:06d}" for row in range(6)]
    assert not [key for key in found if key.startswith("a")]
    a.y[1, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"^1 of 6 is not finite: row 1 \(NaN in y\)$"):
        found = predict("test_predictions.Difference", a, "--predictions.contexts=true", data="toy.Pairs")
    assert np.array_equal(found["a.x"], a.x.numpy())
    assert np.array_equal(found["a.y"], a.y.numpy(), equal_nan=True)
    found = predict(
        "toy.Quadratic", None, "--predictions.contexts=true", "--data.num_test=5", "--trainer.precision=bf16-mixed"
    )
    assert found["a"].shape == (5, 3)
    Path("out/predictions.npz").unlink()
    command = [
        "predict",
        "--model=test_predictions.Filed",
        "--data=toy.Gaussians",
        "--ckpt_path=untrained",
        *QUIET,
        "--predictions.contexts=true",
    ]
    assert "predictions.contexts: Filed writes each prediction as a file" in error(command, capfd)


def test_of_a_bad_row_no_file_is_written():
    a = torch.randn(3, 3)
    a[1] = torch.nan
    with pytest.warns(UserWarning, match="1 of 3 is not finite"):
        assert predict("test_predictions.Filed", a) is None
    assert sorted(file.name for file in Path("out/predictions").iterdir()) == ["000000.npy", "000002.npy"]
    rows = table()
    assert [row["file"] for row in rows] == ["000000.npy", "", "000002.npy"]
    assert rows[1]["objective"] == "nan"


def slow(contexts, folder, *options):
    """In 130 batches, 2 to a part: 65 parts."""
    model = ["--model=test_predictions.Slow", "--data=toy.Gaussians", f"--data.predict={contexts}"]
    return [
        "predict",
        *model,
        "--ckpt_path=untrained",
        f"--run_folder={folder}",
        "--data.eval_batch_size=3",
        *QUIET,
        *options,
    ]


def test_a_command_that_was_killed_goes_on_and_ends_with_the_same_bytes(capsys, monkeypatch):
    values = np.random.default_rng(0).normal(size=(388, 3)).astype(np.float32)
    values[[5, 300]] = np.nan
    np.save("a.npy", values)
    np.save("b.npy", values + 1)
    with pytest.warns(UserWarning, match="^2 of 388 are not finite: row 5 .NaN in its context., 300 "):
        main(slow("a.npy", "whole"))
    whole = Path("whole/predictions.npz").read_bytes()
    parts = Path("killed/predictions.parts")
    run = Run(slow("a.npy", "killed"))
    run.wait_for(lambda: len(list(parts.glob("[0-9]*.npz"))) > 10)
    run.kill()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.npz")}
    assert 10 < len(done) < 60
    assert all(len(np.load(path)["b"]) == 6 for path in done)  # each is whole
    assert not Path("killed/predictions.npz").exists()
    shutil.copytree("killed", "two")
    shutil.copytree("killed", "other")

    made, write = [], Parts.write

    def counted(self, part, batches):
        made.append(part)
        write(self, part, batches)

    monkeypatch.setattr(Parts, "write", counted)
    capsys.readouterr()
    main(slow("a.npy", "killed"))
    assert f"goes on: {len(done)} of 65 parts of the predictions are done" in capsys.readouterr().out
    assert sorted(made) == sorted({*range(65)} - {int(path.stem) for path in done})
    assert Path("killed/predictions.npz").read_bytes() == whole
    assert not parts.exists()

    again = Run(slow("a.npy", "two", "--trainer.devices=2", "--trainer.strategy=ddp_fork"))
    assert again.wait() == 0, again.output()
    assert re.search(f"goes on: {len(done)} of 65", again.output())
    assert Path("two/predictions.npz").read_bytes() == whole

    main(slow("b.npy", "other"))  # of other contexts: nothing there is of use
    assert "goes on" not in capsys.readouterr().out
    main(slow("b.npy", "fresh"))
    assert Path("other/predictions.npz").read_bytes() == Path("fresh/predictions.npz").read_bytes() != whole


def test_a_command_that_was_killed_after_its_last_part_puts_them_together(capsys, monkeypatch):
    def full(self, parts):
        raise OSError(errno.ENOSPC, "no space is left")

    whole = predict("toy.Quadratic", torch.ones(5, 3), "--data.eval_batch_size=2")
    expected = Path("out/predictions.npz").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "read", full)
        with pytest.raises(SystemExit):
            predict("toy.Quadratic", None, "--data.predict=contexts.npy", "--data.eval_batch_size=2")
    Path("out/predictions.npz").unlink()
    again = predict("toy.Quadratic", None, "--data.predict=contexts.npy", "--data.eval_batch_size=2")
    assert "goes on: 3 of 3 parts" in capsys.readouterr().out
    assert Path("out/predictions.npz").read_bytes() == expected
    assert whole.keys() == again.keys()


def test_memory_is_that_of_a_part(monkeypatch):
    """Of 500 batches, in parts of 7."""
    monkeypatch.setattr(files, "MEMORY", 0)  # the file is mapped
    np.save("a.npy", np.random.default_rng(0).normal(size=(1000, 2000)).astype(np.float32))
    sizes = ["--model.dim=2000", "--data.dim=2000", "--data.eval_batch_size=2", "--data.predict=a.npy"]
    tracemalloc.start()
    try:
        main(
            [
                "predict",
                "--model=toy.Quadratic",
                "--data=toy.Gaussians",
                "--ckpt_path=untrained",
                "--run_folder=out",
                *sizes,
                *QUIET,
            ]
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = Path("out/predictions.npz").stat().st_size
    assert size > 2 * 1000 * 2000 * 4
    assert peak < size / 4
    assert np.load("out/predictions.npz")["b"].shape == (1000, 2000)


def test_rows_of_other_shapes_in_other_batches_are_refused(capfd):
    np.save("a.npy", np.arange(6, dtype=np.float32).reshape(6, 1).repeat(3, 1))
    args = [
        "--model=test_predictions.Ragged",
        "--data=toy.Gaussians",
        "--data.predict=a.npy",
        "--data.eval_batch_size=2",
    ]
    told = error(["predict", *args, "--ckpt_path=untrained", *QUIET], capfd)
    assert "decoded is of shape (2, 2) in one batch, with rows of shape (1,) in another: decode must give rows" in told


@pytest.mark.parametrize("limit", ["--trainer.limit_predict_batches=2", "--trainer.fast_dev_run=1"])
def test_some_batches_alone(limit):
    np.save("contexts.npy", np.zeros((9, 3), np.float32))
    found = predict("toy.Quadratic", torch.zeros(9, 3), "--data.eval_batch_size=2", limit)
    assert found["name"].tolist() == [f"{row:06d}" for row in range(4 if "limit" in limit else 2)]


@pytest.mark.parametrize("model", ["Filed", "Difference"])
def test_processes_with_folders_of_their_own_write_into_that_of_the_first(model):
    data = ["--data=toy.FiniteGaussians"] if model == "Filed" else ["--data=toy.Pairs", "--data.num_test=833"]
    args = [
        "predict",
        f"--model=test_predictions.{model}",
        *data,
        "--ckpt_path=untrained",
        "--run_folder=out",
        *QUIET,
        "--data.eval_batch_size=100",
    ]
    args += ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.callbacks=test_predictions.OwnFolder"]
    run = Run(args)
    assert run.wait() == 0, run.output()
    assert not list(Path().glob("other-*"))
    if model == "Filed":
        names = [f"{row:06d}.npy" for row in range(833)]
        assert sorted(file.name for file in Path("out/predictions").iterdir()) == names
        assert [row["file"] for row in table()] == names
    else:
        assert np.load("out/predictions.npz")["b"].shape == (833, 3)
        main([arg.replace("=out", "=one") for arg in args if "trainer." not in arg] + QUIET)
        assert Path("out/predictions.npz").read_bytes() == Path("one/predictions.npz").read_bytes()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_batch_of_which_nothing_was_decoded_costs_itself_alone(bad):
    """All rows of one batch, the first or another, are not finite; or of all, then nothing is decoded at all."""
    values = torch.arange(6.0).reshape(6, 1).repeat(1, 3)
    values[slice(2 * bad, 2 * bad + 2) if bad < 2 else slice(None)] = torch.nan
    np.save("contexts.npy", values.numpy())
    options = ["--data.predict=contexts.npy", "--data.eval_batch_size=2", "--ckpt_path=untrained", "--run_folder=run"]
    main(["predict", "--model=toy.Quadratic", "--data=toy.Gaussians", "--trainer.accelerator=cpu", *options])
    found = np.load("run/predictions.npz")
    assert len(found["b"]) == len(found["objective"]) == len(found["name"]) == 6
    known = ~values.isnan().any(1).numpy()
    if bad == 2:
        assert "decoded" not in found
    else:
        assert (np.isfinite(found["decoded"]).all(1) == known).all()
