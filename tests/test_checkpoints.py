"""A checkpoint that is not whole, finite, harmless and of this recipe is refused in one line, and nothing in it runs."""

import os
import pickle
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from amortized import checkpoint
from amortized.callbacks.checkpoint import Interrupted
from amortized.cli.app import main
from amortized.cli.differences import differences, same_class

MODEL = [
    "--model=toy.Quadratic",
    "--data=toy.Gaussians",
    "--data.num_val=32",
    "--data.num_test=32",
    "--gap.solver=LBFGS",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
FIT = ["fit", *MODEL, *QUIET, "--trainer.max_steps=20", "--trainer.val_check_interval=20"]
FIT += ["--trainer.check_val_every_n_epoch=null", "--checkpoint.every_n_steps=10", "--checkpoint.monitor=null"]
GOOD, LAST = Path("run/checkpoints/step=00000010.ckpt"), Path("run/checkpoints/step=00000020.ckpt")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        main([*FIT, "--run_folder=run"])
    return folder


@pytest.fixture
def last(fitted):
    """The last of a run's two checkpoints, to be spoilt."""
    shutil.copytree(fitted, "run")
    return LAST


def test_a_run_killed_between_its_best_checkpoint_and_its_last_has_both_in_the_end(last):
    expected = torch.load(last, weights_only=True)["state_dict"]
    last.rename(last.with_name("best.ckpt"))
    main([*FIT, "--ckpt_path=run"])
    found = torch.load(last, weights_only=True)
    assert found["global_step"] == 20
    assert all(torch.equal(weight, expected[name]) for name, weight in found["state_dict"].items())


def refusal(capsys, *args):
    """The one line on standard error with which the command line refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert err.splitlines()[-1].startswith("error: "), err
    assert "Traceback" not in out + err
    return err


def seal(path):
    """Write the SHA-256 of a file as if it were meant to be so."""
    checkpoint.digest_path(path).write_text(f"{checkpoint.sha256(path)}  {path.name}\n")


def rewrite(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    seal(path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, offset=None):
    """Flip one bit: in the middle of the largest tensor, by default."""
    data = bytearray(path.read_bytes())
    if offset is None:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
        offset = largest.header_offset + 200 + largest.file_size // 2
    data[offset] ^= 1
    path.write_bytes(data)


def poison(path):
    rewrite(path, lambda saved: saved["state_dict"]["network.0.weight"].__setitem__((0, 0), float("nan")))


def poison_optimizer(path):
    rewrite(path, lambda saved: saved["optimizer_states"][0]["state"][1]["exp_avg"].fill_(float("nan")))


def poison_complex(path):
    weight = torch.full((2,), complex(0, float("inf")), dtype=torch.complex64)
    rewrite(path, lambda saved: saved["state_dict"].update({"phase": weight}))


def replace_by_pickle(path):
    path.write_bytes(pickle.dumps({"state_dict": Payload()}))
    seal(path)


def hide_payload(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"extra": Payload()}, path)
    seal(path)


def replace_by_text(path):
    path.write_text("<html>404</html>\n")
    seal(path)


def keep_weights_alone(path):
    checkpoint.save(torch.load(path, weights_only=True)["state_dict"], path)


def keep_a_tensor(path):
    torch.save(torch.zeros(3), path)
    seal(path)


def forget_recipe(path):
    rewrite(path, lambda saved: saved.pop(checkpoint.RECIPE))


def unsealed(spoil):
    """Spoil a checkpoint that came without its SHA-256."""

    def spoil_unsealed(path):
        checkpoint.digest_path(path).unlink()
        spoil(path)

    return spoil_unsealed


FAULTS = {
    "truncated": (truncate, "is damaged: it does not have the SHA-256"),
    "truncated, without digest": (unsealed(truncate), "is truncated"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "flipped": (flip, "is damaged: it does not have the SHA-256"),
    "flipped, without digest": (unsealed(flip), "does not have its checksum"),
    "flipped digest": (lambda path: flip(checkpoint.digest_path(path), 0), "is damaged"),
    "digest of noise": (lambda path: checkpoint.digest_path(path).write_bytes(b"\xff\x00\xfe"), "is damaged"),
    "nan": (poison, "is refused: network.0.weight holds NaN or infinite weights"),
    "nan, optimizer": (poison_optimizer, "is refused: 0.state.1.exp_avg of the optimizer's state holds NaN"),
    "infinite, complex": (poison_complex, "is refused: phase holds NaN or infinite weights"),
    "pickle": (
        replace_by_pickle,
        "is refused: it is a bare pickle, and loading it could run code",
    ),
    "payload": (hide_payload, "is refused: it holds more than tensors and plain values, and loading it could run code"),
    "text": (replace_by_text, "is no checkpoint file"),
    "weights alone": (keep_weights_alone, "does not say which recipe it is of"),
    "tensor": (keep_a_tensor, "is no checkpoint of a module: it holds no weights by name"),
    "no recipe": (forget_recipe, "does not say which recipe it is of"),
    "missing": (lambda path: path.unlink(), "no such checkpoint"),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("spoil", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_bad_checkpoint_is_refused_and_the_newest_good_one_named(spoil, fault, command, last, capsys):
    spoil(last)
    args = FIT if command == "fit" else ["test", *MODEL, *QUIET]
    error = refusal(capsys, *args, f"--ckpt_path={last}")
    assert str(last) in error
    assert fault in error
    assert error.endswith(f"the newest good checkpoint there is {GOOD}\n")
    assert not Path("payload-ran").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize("left", [b"", b"\n", bytes(80)], ids=["empty", "newline", "zeros"])
def test_a_digest_that_a_power_cut_emptied_counts_as_none(left, last):
    checkpoint.digest_path(last).write_bytes(left)
    assert checkpoint.load(last)["global_step"] == 20
    flip(last)
    with pytest.raises(checkpoint.CheckpointError, match="does not have its checksum"):
        checkpoint.load(last)


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_every_command_refuses(command, last, capsys):
    hide_payload(last)
    assert "could run code" in refusal(capsys, command, *MODEL, *QUIET, f"--ckpt_path={last}")
    assert not Path("payload-ran").exists()


def test_without_a_good_one_that_is_said(last, capsys):
    for path in (GOOD, last):
        truncate(path)
    assert "there is no good checkpoint beside it" in refusal(capsys, *FIT, f"--ckpt_path={last}")
    assert "there is no good checkpoint in run" in refusal(capsys, *FIT, "--ckpt_path=run")


def test_a_run_folder_means_its_newest_good_checkpoint(last, capsys):
    truncate(last)
    main([*FIT, "--ckpt_path=run"])
    assert torch.load(last, weights_only=True)["global_step"] == 20
    out = capsys.readouterr().out
    assert f"not the newest checkpoint: {last} is damaged" in out
    assert f"takes {GOOD}, of step 10" in out


def test_the_newest_is_that_of_the_last_step_not_that_written_last(last, capsys):
    shutil.copy(GOOD, "run/checkpoints/zzz.ckpt")  # written later, and last by name
    os.utime(GOOD)
    found = checkpoint.newest("run")
    assert (found.path, found.step, found.faults) == (last, 20, [])
    main(["test", *MODEL, *QUIET, "--ckpt_path=run", "--run_folder=tested"])
    assert f"takes {last}, of step 20" in capsys.readouterr().out


def test_of_another_recipe(last, capsys):
    error = refusal(capsys, "test", "-c", "vae_digits", f"--ckpt_path={last}")
    assert f"{last} is of another recipe: it holds a Quadratic, the recipe asks for a VAE" in error


def moved(value):
    """A recipe written before every module moved: ``amortized.networks.MLP`` was ``amortized.networks.old.place.MLP``."""
    if isinstance(value, dict):
        return {key: moved(part) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part) for part in value]
    path = isinstance(value, str) and re.fullmatch(r"((?:amortized|toy|torch)(?:\.\w+)*)\.(\w+)", value)
    return f"{path[1]}.old.place.{path[2]}" if path else value


NESTED = ["--model.refine=GradientDescent", "--model.loss=HardContexts", "--model.loss.loss=IterateLoss"]


def test_classes_may_move_and_nan_equals_nan():
    """Also those inside: refine, loss, optimizer."""
    main([*FIT, *NESTED, "--run_folder=nested"])
    path = Path("nested/checkpoints/step=00000020.ckpt")
    rewrite(path, lambda saved: saved.update({checkpoint.RECIPE: moved(saved[checkpoint.RECIPE])}))
    recipe = torch.load(path, weights_only=True)[checkpoint.RECIPE]
    assert recipe["model"]["init_args"]["refine"]["class_path"] == "amortized.solvers.old.place.GradientDescent"
    main([*FIT, *NESTED, f"--ckpt_path={path}", "--trainer.max_steps=21"])
    assert checkpoint.newest("nested").step == 21


def test_a_recipe_of_moved_classes_differs_where_it_does():
    saved = {
        "class_path": "amortized.problems.VAE",
        "init_args": {"beta": float("nan"), "encoder": {"class_path": "a.MLP"}},
    }
    given = {
        "class_path": "amortized.problems.inference.vae.VAE",
        "init_args": {"beta": float("nan"), "encoder": {"class_path": "b.MLP"}},
    }
    assert differences(saved, given, "model") == []
    given["init_args"]["encoder"]["class_path"] = "b.CNN"
    (line,) = differences(saved, given, "model")
    assert line == "model.init_args.encoder.class_path: the checkpoint has 'a.MLP', given 'b.CNN'"
    given["init_args"] |= {"beta": 1.0, "encoder": {"class_path": "b.MLP"}}
    assert differences(saved, given, "model") == ["model.init_args.beta: the checkpoint has nan, given 1.0"]
    # Both lead to a class, but not to the same one, whatever their last names.
    assert not same_class("amortized.problems.VAE", "amortized.problems.Sphere")


def test_settings_that_disagree_are_said(last, capsys):
    error = refusal(capsys, *FIT, "--model.dropout=0.5", f"--ckpt_path={last}")
    assert (
        f"{last} was trained with other settings: model.init_args.dropout: the checkpoint has 0.0, given 0.5" in error
    )
    assert "(-c run/config.yaml has them)" in error
    error = refusal(capsys, *FIT, "--data.batch_size=8", "--trainer.precision=64", f"--ckpt_path={last}")
    assert "data.init_args.batch_size: the checkpoint has 256, given 8 (and 1 more)" in error
    error = refusal(capsys, "test", *MODEL, *QUIET, "--model.noise=1", f"--ckpt_path={last}")
    assert "model.init_args.noise: the checkpoint has 0.0, given 1.0" in error


def test_how_it_was_trained_does_not_matter_to_a_test(last, capsys):
    main(["test", *MODEL, *QUIET, "--model.optimizer=torch.optim.SGD", f"--ckpt_path={last}", "--run_folder=tested"])
    assert Path("tested/results.json").is_file()


def test_a_checkpoint_that_passes_is_named(last, capsys):
    """The newest good one is of this recipe too."""
    poison(last)
    main([*FIT, "--model.dropout=0.5", "--run_folder=other"])
    shutil.copy("other/checkpoints/step=00000020.ckpt", "run/checkpoints/later.ckpt")
    error = refusal(capsys, *FIT, f"--ckpt_path={last}")
    assert error.endswith(f"the newest good checkpoint there is {GOOD}\n")


def test_a_stripped_checkpoint_is_tested_but_not_continued(last, capsys):
    small = Path("small.ckpt")
    checkpoint.strip(last, small)
    assert small.stat().st_size < last.stat().st_size
    assert set(torch.load(small, weights_only=True)) >= {"state_dict", checkpoint.RECIPE}
    for name, path in (("whole", last), ("small", small)):
        main(["test", *MODEL, *QUIET, f"--ckpt_path={path}", f"--run_folder={name}"])
    assert Path("whole/results.json").read_text() == Path("small/results.json").read_text()
    assert "holds no state of training: it can be tested, not continued" in refusal(
        capsys, *FIT, f"--ckpt_path={small}"
    )


def test_digest_is_what_sha256sum_reads(last):
    digest, name = checkpoint.digest_path(last).read_text().split()
    assert (digest, name) == (checkpoint.sha256(last), last.name)


def test_a_save_that_fails_leaves_the_old_one(last, monkeypatch):
    before = last.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save({}, last)
    assert last.read_bytes() == before
    assert {path.name for path in last.parent.iterdir()} == {
        name for path in (GOOD, LAST) for name in (path.name, f"{path.name}.sha256")
    }
    checkpoint.load(last)


def test_a_signal_during_a_save_stops_as_it_should_and_leaves_the_old_one(tmp_path, monkeypatch):
    path, weights = tmp_path / "some.ckpt", {f"w{k}": torch.zeros(100_000) for k in range(40)}
    checkpoint.save({"old": torch.ones(1)}, path)
    before = path.read_bytes()

    def told(*args):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        # in the middle of the records, where PyTorch's writer is at work
        patch.setattr(checkpoint.torch, "save", interrupted_save(told))
        with pytest.raises(Interrupted):
            checkpoint.save(weights, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["some.ckpt", "some.ckpt.sha256"]


def interrupted_save(told):
    """``torch.save``, which ``told`` breaks off in the tenth write."""
    save = torch.save

    class Broken:
        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            return told() if self.writes == 10 else self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    return lambda obj, file: save(obj, Broken(file))
