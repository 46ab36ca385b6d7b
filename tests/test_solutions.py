"""Solution sets: made by mass production, read back bit by bit, in an order that nothing changes; others are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from test_checkpoints import refusal
from toy import Allocation, FiniteGaussians, Gaussians, Pairs, Quadratic, Sums

from amortized import HardContexts, ObjectiveLoss, ProblemError, RegressionLoss, npz
from amortized.cli.app import main
from amortized.contexts import SolutionSet, solutions
from amortized.contexts.solutions import SolvedRows
from amortized.contract import Solved, leaves, take
from amortized.losses import SumLoss
from amortized.shipping.solutions import SolveOnce
from amortized.solvers import ADMM, LBFGS
from amortized.testing import check_problem

RECIPE = """
model: {class_path: toy.Quadratic}
data: {class_path: toy.DATA, init_args: {num_val: 32, num_test: 32, batch_size: 16}}
gap: {solver: {class_path: amortized.solvers.LBFGS, init_args: {steps: 30}}}
"""
BARE = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--budget.enabled=false")


def solve(out, *more, data="Gaussians", contexts=150):
    Path("toy_recipe.yaml").write_text(RECIPE.replace("DATA", data))
    given = [f"--out={out}", *([f"--contexts={contexts}"] if contexts else []), *more]
    main(["solve", "-c", "toy_recipe.yaml", "--ckpt_path=untrained", "--shard_size=64", "--batch_size=32", *given])


def made(out, model=None, data=None, contexts=150, solver=None):
    """The same from Python."""
    wanted = SolveOnce(str(out), contexts, solver or LBFGS(30), shard_size=32)
    wanted.make(model or Quadratic(), data or Gaussians(num_val=32))
    return wanted


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(other), strict=True))


def of_set(folder="set", **kwargs):
    return Gaussians(num_val=32, batch_size=16, solutions=folder, **kwargs)


# ---- reading


def test_what_is_read_is_what_was_written():
    solve("set")
    shards = [dict(np.load(path)) for path in sorted(Path("set").glob("*.npz"))]
    assert [len(shard["b"]) for shard in shards] == [64, 64, 22]
    whole = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    for name, column in npz.mapped(Path("set/shard-000002.npz")).items():
        assert np.array_equal(column, shards[2][name], equal_nan=True)
    rows = SolvedRows(Path("set"), 3, torch.zeros(1, 3))
    assert len(rows) == 150
    order = torch.randperm(150)[:90]
    got = rows.take(order)
    for there, name in ((got.context, "a"), (got.b, "b"), (got.objective, "objective")):
        assert np.array_equal(there.numpy(), whole[name][order])
    assert got.solved.all()
    torch.testing.assert_close(got.b, 2 * got.context, atol=1e-3, rtol=0)
    assert equal(rows[149], map_row(rows.take(torch.tensor([149]))))


def map_row(a):
    return Solved(*(leaf[0] for leaf in a))


def test_all_training_contexts_of_a_finite_set_are_solved_unless_told_otherwise():
    solve("set", data="FiniteGaussians", contexts=None)
    data = FiniteGaussians(solutions="set")
    got = data._set("train")
    assert torch.equal(got.context, data.contexts("train"))  # as they are: not augmented
    assert json.loads(Path("set/manifest.json").read_text())["source"] == "train"


@pytest.mark.parametrize("memory", [0, 2**28], ids=["mapped", "in memory"])
def test_the_order_is_of_seed_and_number_alone(monkeypatch, memory):
    solve("set")
    whole = [of_set().batch("train", number) for number in range(24)]
    monkeypatch.setattr(solutions, "MEMORY", memory)
    data = of_set()
    assert isinstance(data._set("train"), SolvedRows) == (memory == 0)
    for number in (23, 0, 7, 23):  # whatever was drawn before
        assert equal(data.batch("train", number), whole[number])
    again = pickle.loads(pickle.dumps(data))  # in another process
    assert equal(again.batch("train", 11), whole[11])
    workers = of_set(num_workers=2)
    workers.position = 3  # of a resumed run
    loader = iter(workers.train_dataloader())
    for number in range(3, 9):
        assert equal(next(loader).contexts[0], whole[number])
    passes = torch.cat([a.context for a in whole])[:300].split(150)
    assert all(len(one.unique(dim=0)) == 150 for one in passes)
    assert not torch.equal(*passes)
    # The same set in another order: the seed of the data is that of the set, so it is given after opening.
    data.seed, data._order = 1, None
    assert not equal(data.batch("train", 0), whole[0])


def test_a_run_that_resumes_on_another_reader_ends_with_the_same_weights(monkeypatch):
    solve("set")
    fit = ["fit", "-c", "toy_recipe.yaml", "--data.solutions=set", "--model.loss=RegressionLoss", *QUIET]
    fit += ["--trainer.val_check_interval=20", "--checkpoint.every_n_steps=10", "--checkpoint.monitor=null"]
    main([*fit, "--trainer.max_steps=20", "--run_folder=whole"])
    main([*fit, "--trainer.max_steps=10", "--run_folder=half"])
    monkeypatch.setattr(solutions, "MEMORY", 0)
    main([*fit, "--trainer.max_steps=20", "--ckpt_path=half", "--data.num_workers=2", "--run_folder=other"])
    one, other = (
        torch.load(f"{run}/checkpoints/step=00000020.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "other")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- learning


def test_regression_to_a_set_and_what_goes_with_it():
    made("set")
    model, a = Quadratic(), of_set().batch("train", 0)
    off = (model(a.context) - a.b).square().mean(1)
    model.loss = RegressionLoss()
    torch.testing.assert_close(model.amortized_step(a), off)
    model.loss = ObjectiveLoss()
    torch.testing.assert_close(model.amortized_step(a), model.objective(model(a.context), a.context))
    model.loss = SumLoss([ObjectiveLoss(), RegressionLoss()], [1, 3])
    torch.testing.assert_close(model.amortized_step(a), model.objective(model(a.context), a.context) + 3 * off)
    model.loss = HardContexts(RegressionLoss(), pool=4)
    assert model.amortized_step(a).shape == (4,)
    model.amortized_step(a).mean().backward()


def test_what_was_not_solved_counts_by_its_weight():
    made("set", Allocation(), Sums(num_val=32), contexts=64, solver=ADMM())
    with pytest.warns(UserWarning, match=r"of 64 contexts were not solved, or nothing feasible was found"):
        a = Sums(num_val=32, batch_size=64, solutions="set").batch("train", 0)
    none = a.context[:, 0] > 3
    assert torch.equal(none, ~a.solved)
    assert none.any()
    model = Allocation()
    off = (model(a.context) - a.b).square().mean(1)
    torch.testing.assert_close(RegressionLoss().on_solved(model, a), torch.where(none, 0, off))
    torch.testing.assert_close(RegressionLoss(unsolved=0.25).on_solved(model, a), torch.where(none, 0.25 * off, off))
    with pytest.raises(ValueError, match=r"weight in \[0, 1\]; got 2"):
        RegressionLoss(unsolved=2)


def test_contexts_with_nan_are_in_no_batch():
    given = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    given[[0, 17, 70], 1] = np.nan
    np.save("a.npy", given)
    solve("set", "--predict=a.npy", contexts=100)
    assert np.isnan(np.load("set/shard-000000.npz")["b"]).any()
    data = of_set()
    rows = torch.cat([data.batch("train", number).context for number in range(97)])
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in given[~np.isnan(given).any(1)].tolist()}
    model = Quadratic(loss=RegressionLoss())
    model.amortized_step(data.batch("train", 3)).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_target_that_is_not_finite_reaches_no_gradient():
    a = Solved(torch.randn(4, 3), torch.randn(4, 3), torch.ones(4), torch.tensor([True, False, False, True]))
    a.b[1], a.objective[1] = torch.nan, torch.inf
    model = Quadratic(loss=RegressionLoss(unsolved=0.5))
    value = model.amortized_step(a)
    assert value[1] == 0
    value.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_problem_with_a_set_is_checked_without_it():
    check_problem(Quadratic(loss=RegressionLoss()), of_set("not there"))


# ---- made when it is needed


def test_a_set_is_made_once_and_goes_on_where_it_was():
    model = Quadratic(loss=RegressionLoss())
    data = of_set(SolveOnce("set", 150, LBFGS(30), shard_size=32))
    trainer = BARE | {"max_steps": 5}
    Trainer(**trainer).fit(model, data)
    times = {path: path.stat().st_mtime_ns for path in Path("set").glob("shard-*")}
    assert len(times) == 2 * 5
    lost = Path("set/shard-000003.json")
    lost.unlink()
    with pytest.raises(ProblemError, match=r"has 4 of 5 shards: run the command that began it again"):
        of_set().batch("train", 0)
    Trainer(**trainer).fit(Quadratic(loss=RegressionLoss()), data)
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost, lost.with_suffix(".npz")}
    with pytest.raises(ProblemError, match=r"their solver is LBFGS\(steps=30.*, given LBFGS\(steps=40"):
        made("set", solver=LBFGS(40))
    assert data.solutions is not None
    assert model.training


def test_two_processes_make_it_together_and_share_its_rows():
    Path("toy_recipe.yaml").write_text(RECIPE.replace("DATA", "Gaussians"))
    fit = ["fit", "-c", "toy_recipe.yaml", "--model.loss=RegressionLoss", *QUIET, "--run_folder=run"]
    fit += [
        "--trainer.devices=2",
        "--trainer.strategy=ddp_fork",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
    ]
    main([*fit, "--data.solutions=SolveOnce", "--data.solutions.folder=set", "--data.solutions.contexts=64"])
    assert json.loads(Path("set/summary.json").read_text())["contexts"] == 64
    assert json.loads(Path("run/results.json").read_text())["gap"]["mean"] > 0


# ---- refusals


def test_sets_that_are_none_are_refused_with_what_to_do(capsys):
    with pytest.raises(ProblemError, match=r"no solution set in set: make it with amortized solve .* --out set"):
        of_set().batch("train", 0)
    assert "give --contexts" in untrained_refusal(capsys, "Gaussians")
    loss = ["--model.loss=RegressionLoss", "--model.loss.cache=kept"]
    assert "--data.solutions kept" in refusal(capsys, "fit", "-c", "toy_recipe.yaml", *QUIET, *loss)
    solve("bare", "--with_contexts=false")
    with pytest.raises(ProblemError, match="without contexts: make it anew, --with_contexts true"):
        of_set("bare").batch("train", 0)
    solve("held", "--split=test", data="FiniteGaussians", contexts=None)
    with pytest.raises(ProblemError, match="of test contexts, which training must not see"):
        FiniteGaussians(solutions="held").batch("train", 0)
    with pytest.raises(ProblemError, match="none of 32 contexts was solved; give the solver more steps"):
        made("none", contexts=32, solver=LBFGS(0)).open(of_set(), torch.zeros(1, 3))


def untrained_refusal(capsys, data):
    Path("toy_recipe.yaml").write_text(RECIPE.replace("DATA", data))
    return refusal(capsys, "solve", "-c", "toy_recipe.yaml", "--ckpt_path=untrained", "--out=new")


def test_a_set_of_other_contexts_is_refused():
    made("set")
    with pytest.raises(ProblemError, match=r"of other contexts than Gaussians has .* seed 1 \(that of the set is 0\)"):
        of_set(seed=1).batch("train", 0)
    with pytest.raises(ProblemError, match=r"a row has \(3,\) float32; expected \(4,\) torch.float32"):
        Gaussians(dim=4, num_val=32, solutions="set").batch("train", 0)
    with pytest.raises(ProblemError, match=r"expected x \(3,\) torch.float32, y \(3,\)"):
        Pairs(num_val=32, solutions="set").batch("train", 0)
    made("scaled", data=FiniteGaussians(num_train=64), contexts=64)
    with pytest.raises(ProblemError, match="of other contexts than FiniteGaussians"):
        FiniteGaussians(num_train=64, scale=2, solutions="scaled").batch("train", 0)


class Moved(Quadratic):
    def objective(self, b, a):
        return super().objective(b, a - 1)


class Tight(Allocation):
    def program(self, a):
        program = super().program(a)
        return program._replace(upper=program.upper.clamp_max(0.1), lower=program.lower.clamp_max(0.1))


@pytest.mark.filterwarnings("ignore:.*were not solved")
def test_a_set_of_another_problem_is_refused_at_the_first_batch():
    made("set")
    trainer = BARE | {"max_steps": 2}
    with pytest.raises(ProblemError, match=r"of another objective: one has the value 1 there and 13"):
        Trainer(**trainer).fit(Moved(loss=RegressionLoss()), of_set())
    made("sums", Allocation(), Sums(num_val=32), contexts=64, solver=ADMM())
    with pytest.raises(ProblemError, match="of other constraints: one that was feasible there violates them by"):
        Trainer(**trainer).fit(Tight(loss=RegressionLoss()), Sums(num_val=32, batch_size=32, solutions="sums"))


def test_a_damaged_shard_is_named():
    made("set")
    path = Path("set/shard-000002.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ProblemError, match="shard-000002.npz is damaged or missing: run the command"):
        of_set().batch("train", 0)


def test_rows_are_taken_across_shards_without_copies_of_the_rest(monkeypatch):
    """A batch of a mapped set opens the shards that it needs alone."""
    made("set")
    rows = SolvedRows(Path("set"), 5, torch.zeros(1, 3))
    rows._shards.clear()
    got = rows.take(torch.tensor([130, 3, 140]))
    assert sorted(rows._shards) == [0, 4]
    assert equal(got, take(rows.take(torch.arange(150)), torch.tensor([130, 3, 140])))
    assert isinstance(SolutionSet("set").open(of_set(), torch.zeros(1, 3)), Solved)
