"""The command line as its users drive it; wrong input gets one line that names the fault."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from amortized.cli.app import default_threads, main
from amortized.cli.parsing import full_names, full_options
from amortized.cli.recipes import recipes

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
    groups = {
        "objective",
        "gap",
        "rows",
        "time",
        "decomposition",
        "solver",
        "certificate",
    }  # this problem declares its optimum
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
    found = error([*predict, "--data.predict=wrong.npy"], capfd)
    assert "contexts of shape (5, 4); expected a float32 tensor of shape (B, 3)" in found
    assert "no such file of contexts: missing.npy" in error([*predict, "--data.predict=missing.npy"], capfd)
    Path("damaged.npz").write_bytes(b"PK no archive")
    assert "damaged.npz cannot be read" in error([*predict, "--data.predict=damaged.npz"], capfd)


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
    (["fit", "-c", "bomm.yaml"], "no recipe 'bomm.yaml' (did you mean bomb.yaml?): write the path of a YAML file"),
    (["fit"], "arguments are required"),
    (["train"], "invalid choice: 'train'"),
    (["fit", "-c", "vae_digits", "--model=VEA"], "model: there is no class 'VEA' (did you mean VAE"),
    (["fit", "-c", "vae_digits", "--gap.solver=LBGFS"], "gap.solver: there is no class 'LBGFS' (did you mean LBFGS"),
    (["fit", "-c", "vae_digits", "--model.smples=3"], "Option 'smples' is not accepted (did you mean samples"),
    (["fit", "-c", "vae_digits", "--model.encoder.init_args.hiden=3"], "'hiden' is not accepted (did you mean hidden"),
    (["fit", "-c", "vae_digits", "--model.samples=abc"], "model: samples: Expected a <class 'int'>. Got value: abc"),
    (["fit", "-c", "vae_digits", "--trainer.no_such=3"], "there is no option --trainer.no_such"),
    (["fit", "-c", "vae_digits", "--trainer.max_step", "5"], "--trainer.max_step (did you mean --trainer.max_steps"),
    (["fit", "-c", "vae_digits", "--wanbd", "offline"], "there is no option --wanbd (did you mean --wandb"),
    (
        ["fit", "-c", "vae_digits", "--model.optimizer.learning_rate=1"],
        "'learning_rate' is not accepted (did you mean lr?)",
    ),
    (["fit", "--model=faulty.Abstract", "--data=toy.Gaussians"], "faulty.Abstract is abstract: write objective(b, a)"),
    (["fit", "--model=AmortizedModule", "--data=toy.Gaussians"], "is abstract: write objective(b, a)"),
    (["fit", "--model=faulty.Missing", "--data=toy.Gaussians"], "module 'faulty' has no attribute 'Missing'"),
    (["fit", *TOY, "--model=faulty.Fails"], "faulty.py, line 7, in helper); AMORTIZED_DEBUG=1 shows"),
    (["fit", *TOY, "--model=faulty.Unmade"], "faulty.py, line 12, in __init__"),
    (["fit", *TOY, "--model=broken.Broken"], "NameError: name 'typo' is not defined (broken.py, line 4, in Broken)"),
    (["fit", *TOY, "--model=toy.Quadratic", "--model.refine=Gauge"], "model.refine: Gauge needs linear constraints"),
    (
        ["fit", *TOY, "--data.batch_size=100000000000"],
        "out of memory, where 1,117.6 GiB more were needed: asked for --data",
    ),
    (["fit", "-c", "bomb.yaml"], "YAML aliases (*name) are not read"),
    (["fit", "-c", "deep.yaml"], "nested more than 100 times"),
    (["fit", "-c", "vae_digits", "--data={a: &a [1], b: *a}"], "YAML aliases (*name) are not read"),
    (["fit", *TOY, "--wandb=offline", "--trainer.logger=false"], "--wandb offline and --trainer.logger false exclude"),
    (["fit", "--help", "trainr"], "no group of options 'trainr' (did you mean trainer?)"),
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


FAULTY = """
from torch import nn
from amortized import AmortizedModule
from toy import Quadratic

def helper(found):
    return found["x"]

class Unmade(Quadratic):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = [][1]

class Fails(Quadratic):
    def forward(self, a):
        return helper({})

    def amortized_step(self, a):
        return helper({})

class Abstract(AmortizedModule):
    pass
"""
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # 391 bytes; 9^9 values


@pytest.mark.parametrize(("args", "expected"), WRONG, ids=[expected[:40] for _, expected in WRONG])
def test_wrong_input_gets_one_line(args, expected, capfd):
    Path("faulty.py").write_text(FAULTY)
    Path("broken.py").write_text("from toy import Quadratic\n\nclass Broken(Quadratic):\n    steps = typo\n")
    Path("bomb.yaml").write_text(BOMB)
    Path("deep.yaml").write_text("model: " + "[" * 30_000)
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


def test_compile_without_a_compiler_is_told_and_left_out(monkeypatch):
    class InvalidCxxCompiler(RuntimeError):  # as torch._inductor.exc has it
        pass

    def no_compiler(*args, **kwargs):
        def compiled(a):
            raise RuntimeError("backend='inductor' raised") from InvalidCxxCompiler(
                "No working C++ compiler found in clang++"
            )

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match="No working C.. compiler found.*install one, or set compile to false"):
        main(["fit", *TOY, "--model.compile=true", "--run_folder=run"])
    assert Path("run/results.json").is_file()


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("amortized.callbacks.report.worst_rows", lambda *args: {}["ours"])
    monkeypatch.setattr("amortized.contract.faults.place", lambda error: None)  # the line above is of a test
    with pytest.raises(KeyError):
        main(["fit", *TOY])


def test_debug_shows_the_whole_traceback(monkeypatch):
    Path("faulty.py").write_text(FAULTY)
    monkeypatch.setenv("AMORTIZED_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["fit", *TOY, "--model=faulty.Fails"])


def test_a_run_without_a_recipe_is_named_after_its_problem(capsys):
    main(["fit", *TOY])
    (folder,) = Path("runs").iterdir()
    assert folder.name == "Quadratic"
    assert "Quadratic: network against solver" in capsys.readouterr().out
    (run,) = folder.iterdir()
    main(["test", "-c", str(run / "config.yaml"), f"--ckpt_path={run}", "--run_folder=test"])
    assert "Quadratic: network against solver" in capsys.readouterr().out


def test_help_fits_a_screen_and_points_to_the_rest(capsys):
    def shown(*args):
        with pytest.raises(SystemExit) as end:
            main([*args])
        assert not end.value.code
        return capsys.readouterr().out

    top, fit, trainer, everything, vae = (
        shown(*words.split())
        for words in (
            "--help",
            "fit --help",
            "fit --help trainer",
            "fit --help all",
            "fit -c vae_digits --model.help VAE",
        )
    )
    for text in (top, fit):
        assert len(text.splitlines()) <= 60
        assert max(map(len, text.splitlines())) <= 80
        assert "Lightning Trainer command line tool" not in text
        assert "working directory" in " ".join(text.split())
    for name in (
        "--threads",
        "--run_folder",
        "--wandb_project",
        "--ckpt_path",
        "--trainer.*",
        "--model.*",
        "--help all",
    ):
        assert name in fit
    assert "--trainer.max_steps" in trainer
    assert "--gap.solver" not in trainer
    assert "--trainer.max_steps" in everything
    assert "--gap.solver" in everything
    assert "amortized.networks.MLP" in vae
    assert "torch.nn" not in vae
    assert "other libraries" in " ".join(vae.split())


def test_a_terminal_without_unicode_gets_other_characters(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    main(["fit", *TOY, "--run_folder=run"])
    printed = out.buffer.getvalue().decode("ascii")
    assert " +- " in printed
    assert "\n-----" in printed
    assert (out.errors, err.errors) == ("strict", "strict")


def test_classes_of_the_working_directory_can_be_named_and_hide_no_library(capsys):
    Path("nearby.py").write_text("from toy import Quadratic\nclass Near(Quadratic): pass\n")
    Path("yaml.py").write_text("raise ImportError('hides a library')\n")
    before = list(sys.path)
    with pytest.raises(SystemExit) as end:
        main(["fit", *TOY, "--model=nearby.Near", "--print_config"])
    assert not end.value.code
    assert "class_path: nearby.Near" in capsys.readouterr().out
    assert sys.path == before


def test_a_short_name_in_any_place_is_ours():
    class MLP(torch.nn.Module):
        """Of another library."""

    written = {"model": "VAE", "gap": {"solver": {"class_path": "LBFGS"}}, "recipe": "VAE"}
    assert full_names(written) == {
        "model": "amortized.problems.VAE",
        "gap": {"solver": {"class_path": "LBFGS"}},
        "recipe": "VAE",
    }
    typed = ["fit", "--model", "VAE", "--model.encoder=MLP", "--run_folder", "MLP", "--model.optimizer", "Adam"]
    path = "amortized.networks.MLP"
    assert full_options(typed)[2:4] == ["amortized.problems.VAE", f"--model.encoder={path}"]
    assert full_options(typed)[4:] == typed[4:]


def test_the_threads_of_a_small_network(monkeypatch):
    small, wide = torch.nn.Linear(3, 3), torch.nn.Linear(1000, 1001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [default_threads(m) for m in (small, wide, torch.nn.Conv2d(1, 1, 3))] == [1, 8, 8]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert default_threads(small) == 8
