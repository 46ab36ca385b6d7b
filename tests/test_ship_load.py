"""What a checkpoint holds is rebuilt and answers: bit for bit as ``predict`` does, with a certificate that holds."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoints import FIT, QUIET, refusal, rewrite
from test_recipes import skip_without_data
from toy import Quadratic

import amortized
from amortized import AmortizedModule, ProblemError, checkpoint
from amortized.callbacks.predictions import arrays
from amortized.certificates.conformal import calibrate, coverage
from amortized.certificates.likeness import fit_likeness
from amortized.checkpoint import CheckpointError, MismatchError
from amortized.cli.app import main
from amortized.cli.recipes import recipes

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
NAMES = sorted(path.stem for path in CHECKPOINTS.glob("*.ckpt"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sizes = ["--data.num_val=300", "--data.num_test=300", "--trainer.max_steps=300"]
        main([*FIT, *sizes, "--model.optimizer=Adam", "--model.optimizer.lr=0.01", "--run_folder=run"])
    return folder / "run"


@pytest.fixture(scope="module")
def solver(run):
    return amortized.load(run)


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_checkpoint_predicts_bit_for_bit_what_the_command_line_does(name):
    skip_without_data(recipes()[name])
    path = CHECKPOINTS / f"{name}.ckpt"
    few = ["--data.num_test=6"] if name not in ("style",) else []
    solver = amortized.load(name)
    assert solver.name == name
    module = AmortizedModule.load_from_checkpoint(path)
    data = solver.data
    data.num_rows["test"] = 6 if few else data.num_rows["test"]
    solver._set_up()
    a = data.batch("predict", 0)
    found = solver.predict(a)
    sent = pickle.loads(pickle.dumps(solver))  # to a process of another engine
    assert torch.equal(sent.predict(a)["b"], found["b"])
    if type(module).save is not AmortizedModule.save:  # writes files: what they are made of is compared
        again = type(solver)(module, data, solver.solver).predict(a)
        assert torch.equal(found["b"], again["b"])
        return
    main(["predict", "-c", name, f"--ckpt_path={path}", "--run_folder=out", *few, *QUIET[:2]])
    written = dict(np.load("out/predictions.npz"))
    for key, values in {**arrays(found["b"], "b"), **arrays(found["objective"], "objective")}.items():
        assert np.array_equal(values, written[key][: len(values)], equal_nan=True), key
    for key, values in arrays(found["decoded"]).items():
        assert np.array_equal(values, written[key][: len(values)], equal_nan=True), key


def test_a_run_says_of_each_row_where_its_answer_comes_from(solver):
    a = solver.data.batch("test", 0)
    gap = {}
    for tol in (0.5, 1e-4, 1e-12):
        answer = solver.solve(a, tol)
        gap[tol] = answer.objective - 1
        solved = torch.from_numpy(answer.solved)
        assert torch.equal(solved, (answer.certificate <= tol) | answer.certificate.isnan())
        held = (gap[tol] <= answer.certificate)[~answer.certificate.isnan()]
        assert held.float().mean() > 0.85
    assert set(solver.solve(a, 100.0).path) <= {"network", "solver"}
    strict, loose = solver.solve(a, 1e-4), solver.solve(a, 0.5)
    assert (strict.path == "network").sum() < (loose.path == "network").sum()
    assert (strict.path == "refined").sum() > 100
    assert (strict.objective <= loose.objective + 1e-6).all()
    assert (solver.solve(a, 1e-12).path == "none").any()


def test_what_the_network_leaves_of_many_batches_is_solved_together(solver, monkeypatch):
    a = torch.randn(300, 3, generator=torch.Generator().manual_seed(2))
    a[::50] = 40.0  # unlike
    a[7] = torch.nan
    starts = range(0, 300, 50)
    alone = [solver.rows(a[at : at + 50], 1e-3, number) for number, at in enumerate(starts)]
    solved, solve = [], solver.solver.solve
    monkeypatch.setattr(
        solver.solver, "solve", lambda problem, near, b: solved.append(len(b)) or solve(problem, near, b)
    )
    together = solver.all_rows(((number, a[at : at + 50]) for number, at in enumerate(starts)), 1e-3, 200)
    assert 200 >= solved[0] > 50  # rows of more than one batch
    for name, column in together._asdict().items():
        expected = torch.cat([getattr(rows, name) for rows in alone])
        assert torch.allclose(column.float(), expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_numpy_or_torch_one_row_or_many(solver):
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    answer, same = solver.solve(a, 0.5), solver.solve(a.numpy(), 0.5)
    assert torch.is_tensor(answer.b)
    assert all(isinstance(x, np.ndarray) for x in same)
    assert np.array_equal(answer.b.numpy(), same.b)
    assert np.array_equal(answer.decoded.numpy(), same.decoded)
    one = solver.solve(a[3].tolist(), 0.5)
    assert one.b.shape == (1, 3)
    assert np.allclose(one.b, same.b[3:4], atol=1e-6)
    with pytest.raises(
        ProblemError, match=r"has contexts of shape \(5, 2\); expected float32 numbers of shape \(B, 3\)"
    ):
        solver.solve(a[:, :2])
    with pytest.raises(ProblemError, match="tol must be positive"):
        solver.solve(a, tol=0.0)


def test_what_cannot_be_solved_says_so_and_what_is_unlike_goes_to_the_solver(solver):
    a = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    a[1], a[2], a[4] = 40.0, torch.nan, torch.inf
    with pytest.warns(UserWarning, match=r"^not solved, as there is NaN in the context: row 2 \(NaN in its context\)$"):
        answer = solver.solve(a, 0.1)
    assert answer.unlike.tolist()[1]
    assert answer.path[1] == "solver"
    assert answer.certificate[1].isnan()  # not exchangeable with those of the calibration
    assert torch.allclose(answer.b[1], torch.full((3,), 80.0), atol=1e-2)
    assert answer.path[[2, 4]].tolist() == ["none", "none"]
    assert not answer.finite[2]
    assert answer.certificate[2] == torch.inf
    others = solver.solve(a[[0, 3, 5]], 0.1)
    assert torch.allclose(answer.b[[0, 3, 5]], others.b, atol=1e-6)


def test_the_certificate_is_in_the_checkpoint_and_its_coverage_in_the_report(run):
    held = torch.load(max((run / "checkpoints").glob("step=*.ckpt")), weights_only=True)
    kept = held[checkpoint.CERTIFICATE]
    assert (kept["network"]["alpha"], kept["network"]["n"]) == (0.1, 300 - 300 // 8)
    assert "exchangeable" in kept["assumption"]
    assert held[checkpoint.SOLVER]["class_path"].endswith("LBFGS")
    found = json.loads((run / "results.json").read_text())["certificate"]
    assert found["low"] <= 0.95
    assert found["high"] >= 0.9 - 0.06
    assert found["calibrated_on"] == kept["network"]["n"]
    assert f"{found['coverage']:.1%}" in (run / "report.html").read_text()


def test_a_test_of_the_checkpoint_measures_the_same_coverage_on_any_number_of_processes(run):
    first = json.loads((run / "results.json").read_text())["certificate"]
    for name, more in (("one", []), ("two", ["--trainer.devices=2", "--trainer.strategy=ddp_fork"])):
        args = ["test", f"--config={run}/config.yaml", f"--ckpt_path={run}", f"--run_folder={name}", *more, *QUIET]
        main(args)
        found = json.loads(Path(name, "results.json").read_text())["certificate"]
        assert {**found, "median": None} == {**first, "median": None}
        assert found["median"] == pytest.approx(first["median"], rel=1e-4)


def test_what_cannot_be_loaded_is_refused_in_one_line(run, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"no run, checkpoint or reference checkpoint 'spheer'; .* sphere"):
        amortized.load("spheer")
    with pytest.raises(CheckpointError, match="there is no good checkpoint in"):
        amortized.load(tmp_path)
    path = tmp_path / "moved.ckpt"
    checkpoint.strip(max((run / "checkpoints").glob("step=*.ckpt")), path)
    assert amortized.load(path).calibration.network == amortized.load(run).calibration.network

    def elsewhere(saved):
        saved[checkpoint.RECIPE]["model"]["class_path"] = "nowhere.Quadratic"

    rewrite(path, elsewhere)
    with pytest.raises(MismatchError, match="nowhere.Quadratic cannot be imported here"):
        amortized.load(path)
    rewrite(path, lambda saved: saved.pop(checkpoint.RECIPE))
    with pytest.raises(MismatchError, match="does not say which recipe"):
        AmortizedModule.load_from_checkpoint(path)


def test_a_class_asks_for_its_own_checkpoints(run):
    path = max((run / "checkpoints").glob("step=*.ckpt"))
    assert isinstance(Quadratic.load_from_checkpoint(path), Quadratic)
    with pytest.raises(MismatchError):
        Quadratic.load_from_checkpoint(CHECKPOINTS / "sphere.ckpt")


def test_a_conformal_bound_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = []
    for _ in range(200):
        g, new = torch.rand(2, 60, generator=generator).square().double()
        gap, fresh = (x * torch.rand(60, generator=generator) for x in (g, new))
        certificate = calibrate(gap, g, alpha=0.2, unit=0.01)
        held.append((fresh <= certificate.quantile * (0.01 + new)).double().mean())
    mean = torch.stack(held).mean()
    assert 0.8 - 0.015 < mean < 0.8 + 1 / 61 + 0.015
    assert calibrate(gap[:8], None, alpha=0.1).quantile == torch.inf  # too few to say anything
    assert coverage(torch.ones(100), torch.zeros(100))["low"] > 0.95


def test_likeness_turns_away_what_it_was_not_fitted_to_and_as_many_others_as_it_says():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 20, generator=generator)
    train, held, new = (torch.randn(n, 5, generator=generator) @ mix for n in (1000, 1000, 5000))
    likeness = fit_likeness(train, held, level=0.05)
    assert likeness.unlike(new).float().mean() == pytest.approx(0.05, abs=0.02)
    assert likeness.unlike(5 * new).float().mean() > 0.9
    assert likeness.unlike(new + 3 * torch.randn(new.shape, generator=generator)).all()


def test_refused_by_the_command_line_too(capsys):
    assert "certificate.alpha must be in (0, 1)" in refusal(capsys, *FIT, "--certificate.alpha=2")
