"""The command line as its users drive it; wrong input gets one line that names the fault."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from amortized.cli import main, recipes

FAST = [
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=4",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
TOY = [
    "--model=toy.Quadratic",
    "--data=toy.Gaussians",
    "--data.num_val=32",
    "--data.num_test=32",
    "--budget.contexts=16",
    *FAST,
]


def error(args, capfd):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "Warning" not in line and "warn" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_run_writes_one_folder(capsys):
    main(["fit", *TOY, "--run_folder=run"])
    folder = Path("run")
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "pictures",
        "checkpoints",
        "report.html",
    }
    found = json.loads((folder / "results.json").read_text())
    groups = {"objective", "gap", "rows", "time", "decomposition", "solver"}  # this problem declares its optimum
    assert set(found) == groups
    assert set(found["gap"]) == {"mean", "median", "p95", "relative", "stderr", "noise", "rounding"}
    assert set(found["rows"]) == {"total", "converged", "diverged", "lost", "unbounded"}
    assert {"network", "solver", "equal_quality_ratio"} <= set(found["time"])
    assert found["rows"]["total"] == 32
    assert found["gap"]["mean"] == pytest.approx(found["objective"]["network"] - found["objective"]["solver"], rel=1e-5)
    assert found["objective"]["solver"] == pytest.approx(1, abs=1e-5)
    assert found["time"]["equal_quality_ratio"] > 0
    assert {p.name for p in (folder / "pictures").iterdir()} == {"curves.png", "gap.png", "budget.png"}
    assert "amortization gap, mean" in capsys.readouterr().out
    assert [p for p in Path().iterdir() if p.name not in ("run",)] == []


def test_checkpoints_do_not_write_the_recipe_out_anew(monkeypatch):
    dumped = []
    dump = LightningArgumentParser.dump

    def counted(self, *args, **kwargs):
        dumped.append(self)
        return dump(self, *args, **kwargs)

    monkeypatch.setattr(LightningArgumentParser, "dump", counted)
    counts = []
    for every in (4, 1):
        main(["fit", *TOY, f"--run_folder={every}", "--checkpoint.every_n_steps", str(every), "--budget.enabled=false"])
        counts.append(len(dumped))
        dumped.clear()
    assert len(list(Path("1/checkpoints").glob("step=*.ckpt"))) > 1
    assert counts[0] == counts[1] > 0


def test_all_commands_in_one_process_from_the_recorded_config():
    main(["fit", *TOY, "--run_folder=run"])
    for command in ("validate", "test", "predict"):
        main([command, "-c", "run/config.yaml", "--ckpt_path=run", f"--run_folder={command}"])
    predictions = np.load("predict/predictions.npz")
    assert predictions["b"].shape == predictions["decoded"].shape == (32, 3)
    assert predictions["objective"].shape == (32,)
    assert (
        json.loads(Path("test/results.json").read_text())["gap"]
        == json.loads(Path("run/results.json").read_text())["gap"]
    )


def test_predict_for_contexts_of_a_file(capfd):
    main(["fit", *TOY, "--run_folder=run"])
    contexts = torch.randn(5, 3)
    np.save("contexts.npy", contexts.numpy())
    predict = ["predict", "-c", "run/config.yaml", "--ckpt_path=run", "--run_folder=predict"]
    main([*predict, "--data.predict=contexts.npy"])
    found = np.load("predict/predictions.npz")
    assert np.allclose(found["objective"], ((found["b"] - 2 * contexts.numpy()) ** 2).sum(1) + 1, atol=1e-5)
    np.save("wrong.npy", torch.randn(5, 4).numpy())
    capfd.readouterr()
    assert "contexts of shape ('B', 4); expected ('B', 3)" in error([*predict, "--data.predict=wrong.npy"], capfd)
    assert "no such file of contexts: missing.npy" in error([*predict, "--data.predict=missing.npy"], capfd)


def test_options_override_the_recipe_and_print_config_round_trips(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "vae_digits", "--model.eval_samples=7", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["eval_samples"] == 7
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "-c", "mine.yaml", "--print_config"])
    again = yaml.safe_load(capsys.readouterr().out)
    assert again == config


WRONG = [
    (["fit", "-c", "vae_digit"], "no recipe 'vae_digit' (did you mean vae_digits"),
    (["fit", "-c", "missing/file.yaml"], "no recipe 'missing/file.yaml'"),
    (["fit"], "arguments are required"),
    (["train"], "invalid choice: 'train'"),
    (["fit", "-c", "vae_digits", "--model=VEA"], "model: there is no class 'VEA' (did you mean VAE"),
    (["fit", "-c", "vae_digits", "--gap.solver=LBGFS"], "gap.solver: there is no class 'LBGFS' (did you mean LBFGS"),
    (["fit", "-c", "vae_digits", "--model.smples=3"], "Option 'smples' is not accepted (did you mean samples"),
    (["fit", "-c", "vae_digits", "--model.encoder.init_args.hiden=3"], "'hiden' is not accepted (did you mean hidden"),
    (["fit", "-c", "vae_digits", "--model.samples=abc"], "model: samples: Expected a <class 'int'>. Got value: abc"),
    (["fit", "-c", "vae_digits", "--trainer.no_such=3"], "no_such"),
    (
        ["fit", "-c", "vae_digits", *FAST, "--model.encoder.init_args.in_features=63"],
        "fails on contexts of shape (128, 64)",
    ),
    (
        ["fit", "-c", "vae_digits", *FAST, "--model.decoder.init_args.in_features=7"],
        "VAE.objective fails on b of shape (128, 16)",
    ),
    (["fit", *TOY, "--data.batch_size=0"], "data.batch_size must be at least 1; got 0"),
    (["test", *TOY, "--ckpt_path=none.ckpt"], "no such checkpoint: none.ckpt"),
    (["test", *TOY, "--ckpt_path=last"], "there is no good checkpoint under"),
]


@pytest.mark.parametrize(("args", "expected"), WRONG, ids=[expected[:40] for _, expected in WRONG])
def test_wrong_input_gets_one_line(args, expected, capfd):
    found = error(args, capfd)
    assert expected in found
    assert found.count("did you mean") <= 1


def test_a_folder_with_a_run_is_not_overwritten(capfd):
    main(["fit", *TOY, "--run_folder=run"])
    capfd.readouterr()
    assert "run holds a run: continue it with --ckpt_path run" in error(["fit", *TOY, "--run_folder=run"], capfd)


def test_a_broken_objective_is_told_in_one_line(capfd, tmp_path, monkeypatch):
    Path("broken.py").write_text(
        "from toy import Quadratic\n"
        "class Column(Quadratic):\n    def objective(self, b, a): return super().objective(b, a)[:, None]\n"
        "class Mixing(Quadratic):\n    def objective(self, b, a): return super().objective(b - b.mean(0), a)\n"
        "class Infinite(Quadratic):\n    def objective(self, b, a): return super().objective(b, a) + (b.sum(1) - 99).log()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, expected in (
        ("Column", "must return one value for each row, shape (256,); got (256, 1)"),
        ("Mixing", "mixes rows"),
        ("Infinite", "is nan in row"),
    ):
        assert expected in error(["fit", *TOY, f"--model=broken.{name}"], capfd)


def test_every_recipe_parses(capsys):
    assert recipes()
    for name in recipes():
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", name, "--print_config"])
        assert stop.value.code in (0, None)


def test_a_short_name_means_the_project_s_own_class(capsys):
    import zuko  # has an MLP as well

    assert zuko.nn.MLP
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "vae_digits", "--model.posterior=Flow", "--model.posterior.latent=4", "--print_config"])
    assert not end.value.code
    assert "class_path: amortized.networks.MLP" in capsys.readouterr().out
