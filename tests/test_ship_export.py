"""One graph with a free batch size, the module's to 1e-5, in a process that does not have this package."""

import json
from pathlib import Path

import pytest
import torch
from test_checkpoints import refusal
from toy import Allocation, Gaussians, Quadratic, Sums

import amortized
from amortized import ProblemError, checkpoint
from amortized.cli.app import main
from amortized.contract import Polyhedron
from amortized.shipping.export import CLOSE, export
from amortized.shipping.trained import TrainedSolver
from amortized.solvers import LBFGS, Seek, solver_for

SPHERE = Path(__file__).parent.parent / "checkpoints" / "sphere.ckpt"


def untrained(problem, **data):
    return TrainedSolver(problem, Gaussians(num_val=64, num_test=64, **data), LBFGS(), name="toy")


def test_a_graph_runs_without_the_package_and_says_what_it_is():
    main(["export", "-c", "sphere", f"--ckpt_path={SPHERE}", "--out=out/sphere"])
    about = json.loads(Path("out/sphere.json").read_text())
    assert about["compared_on"] == 1000
    assert max(about["largest_difference"].values()) <= CLOSE  # measured in a process of its own
    assert about["inputs"]["centres"] == {"shape": ["B", 4, 3], "dtype": "float32"}
    assert about["checkpoint"] == checkpoint.sha256(SPHERE)
    graph = Path("out/sphere.pt2")
    assert checkpoint.digest_path(graph).read_text() == f"{checkpoint.sha256(graph)}  sphere.pt2\n"
    run, solver = torch.export.load(graph).module(), amortized.load(SPHERE)
    for rows in (1, 2, 389, 500):  # any batch size, also that of the tracing
        a = solver.data.produce(7, rows)
        b, objective, bound = run(*a)
        found = solver.predict(a)
        assert torch.allclose(b, found["b"], atol=1e-5)
        assert torch.allclose(objective, found["objective"], atol=1e-5)
        assert torch.allclose(bound, solver.calibration.network.bound(solver.module, b, a), rtol=1e-4, atol=1e-5)


def test_an_onnx_runtime_gives_the_same():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    about = export(untrained(Quadratic()), Path("toy.onnx"), "onnx")
    assert set(about["largest_difference"]) == {"b", "objective", "certificate"}
    assert max(about["largest_difference"].values()) <= CLOSE


def test_a_random_objective_draws_in_the_graph_too():
    about = export(untrained(Quadratic(noise=1.0)), Path("noisy.pt2"))
    assert about["random_objective"]
    assert max(about["largest_difference"].values()) <= CLOSE


class Curved(Quadratic):
    """On a curve, within a ball."""

    def equality(self, b, a):
        return b[:, :1] * b[:, 1:2] - 0.1

    def inequality(self, b, a):
        return b.square().sum(1, keepdim=True) - 4


class Flat(Allocation):
    """As a program, and to the model alone as a polyhedron."""

    def polyhedron(self, a):
        return Polyhedron(a.new_ones(1, 3), a[:, :1], a[:, :1])


@pytest.mark.parametrize("problem", [Curved, Flat])
def test_a_model_that_seeks_feasible_points_has_a_free_batch_size(problem):
    data = (Sums if problem is Flat else Gaussians)(num_val=16, num_test=32)
    module = problem(refine=Seek(steps=2))
    about = export(TrainedSolver(module, data, solver_for(module), name="toy"), Path("toy.pt2"))
    assert about["compared_on"] == 1000
    assert max(about["largest_difference"].values()) <= CLOSE
    run = torch.export.load("toy.pt2").module()
    for rows in (1, 7):
        a = data.produce(7, rows)
        assert torch.allclose(run(a)[0], module(a), atol=1e-5)


class Counting(Quadratic):
    def objective(self, b, a):
        return super().objective(b, a) + torch.zeros(len(b))


class Lost(Quadratic):
    def objective(self, b, a):
        return super().objective(b, a) + float(b.sum() * 0)


def test_what_cannot_be_exported_says_what_is_in_the_way(monkeypatch, capsys):
    with pytest.raises(ProblemError, match=r"Counting cannot be exported: it makes the batch size a plain number"):
        export(untrained(Counting()), Path("x.pt2"))
    with pytest.raises(ProblemError, match=r"Lost cannot be exported: .*data-dependent .*, in objective"):
        export(untrained(Lost()), Path("x.pt2"))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    error = refusal(capsys, "export", "-c", "sphere", f"--ckpt_path={SPHERE}", "--format=onnx", "--out=x")
    assert "pip install '.[onnx]' in the clone" in error
    assert not list(Path().glob("*x*"))


def test_a_graph_that_is_another_is_not_kept(monkeypatch):
    monkeypatch.setattr("amortized.shipping.export.CLOSE", -1.0)  # nothing is as close as that
    with pytest.raises(ProblemError, match="gives another b than the module: off by"):
        export(untrained(Quadratic()), Path("x.pt2"))
    assert not Path("x.pt2").exists()
