"""Prediction, objective and certificate as one graph, for PyTorch without this package or for an ONNX runtime.

The graph takes the tensors of a context, by the names of its fields, with a batch size of any kind, and gives ``b``,
``objective`` and ``certificate``. Beside it lie its SHA-256 and a ``.json`` that says what goes in and comes out.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from amortized import disk
from amortized.certificates.conformal import ASSUMPTION
from amortized.checkpoint import digest_path, sha256
from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.files import fields
from amortized.contract import Context, ProblemError, concatenate, is_random, leaves, map_leaves, num_rows, take
from amortized.contract.faults import describe, origin
from amortized.shipping.trained import TrainedSolver

CONTEXTS = 1000
"""On which an exported graph is compared with the module."""

TRACED = 389
"""The batch size that a graph is traced with: a prime that no dimension is likely to have."""

CLOSE = 1e-5
"""What they may differ by, relative to one plus the size."""

OUTPUTS = ("b", "objective", "certificate")

SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}

RUNNER = """
import sys
import numpy as np

graph, given, found, seed = sys.argv[1:]
arrays = dict(np.load(given))
if graph.endswith(".onnx"):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    out = onnxruntime.InferenceSession(graph, options).run(None, arrays)
else:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    out = torch.export.load(graph).module()(*map(torch.from_numpy, arrays.values()))
    out = [x.detach().numpy() for x in out]
assert "amortized" not in sys.modules
np.savez(found, *out)
"""
"""Runs a graph in a process that does not have this package: graph, inputs, where outputs go, seed of the draws."""


class Graph(nn.Module):
    """What is exported: ``(*leaves) -> (b, objective, certificate)``."""

    def __init__(self, solver: TrainedSolver) -> None:
        super().__init__()
        self.module, self.like = solver.module, solver.like
        network = solver.calibration.network
        self.quantile, self.unit = network.quantile, network.unit or 0.0

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = iter(given)
        a = map_leaves(lambda _: next(rows), self.like)
        with torch.enable_grad():  # through the parameters b is on the graph, so that nothing must be put there
            b = self.module(a)
            value = self.module.objective(b, a)
            (gradient,) = torch.autograd.grad(value.sum(), b)
        bound = self.quantile * (self.unit + gradient.flatten(1).square().sum(1))
        return b.detach(), value.detach(), bound.detach()


def export(
    solver: TrainedSolver, path: Path, format: Literal["torch", "onnx"] = "torch", checkpoint: str = ""
) -> dict[str, Any]:
    """Write the graph, its SHA-256 and its description, and compare it with the module in a process of its own.

    Args:
        solver: trained; on the CPU.
        path: of the file.
        format: ``torch`` (``torch.export.load``), or ``onnx``, which needs the extra ``onnx``.
        checkpoint: SHA-256 of the checkpoint, for the description.

    Returns:
        the description.

    Raises:
        ProblemError: if the model cannot be exported, with the operation that is in the way, or if the graph gives other
            values than the module; no file of that name is left then.
    """
    if solver.precision not in (None, "32", "32-true", "64-true"):
        raise ProblemError(f"a model in {solver.precision} is not exported: train it in precision 32-true")
    a = _contexts(solver)
    graph = Graph(solver).eval()
    random = is_random(solver.module, graph(*leaves(take(a, slice(0, 2))))[0], take(a, slice(0, 2)))
    disk.make(path.parent)
    program = _program(graph, leaves(take(a, slice(0, TRACED))), type(solver.module).__name__)
    names = [name or "a" for name in fields(a)]
    _write(program, path, format, names)
    try:
        error = _compare(graph, path, a, names, random)
    except ProblemError:
        path.unlink()
        raise
    network = solver.calibration.network
    about = {
        "recipe": solver.name,
        "checkpoint": checkpoint,
        "inputs": {
            name: {"shape": ["B", *leaf.shape[1:]], "dtype": str(leaf.dtype).removeprefix("torch.")}
            for name, leaf in zip(names, leaves(a), strict=True)
        },
        "outputs": list(OUTPUTS),
        "certificate": {
            "kind": network.kind,
            "alpha": network.alpha,
            "calibrated_on": network.n,
            "assumption": ASSUMPTION,
        },
        "random_objective": random,
        "compared_on": num_rows(a),
        "largest_difference": error,
        "sha256": sha256(path),
    }
    disk.write(digest_path(path), f"{about['sha256']}  {path.name}\n")
    disk.write(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    return about


def _contexts(solver: TrainedSolver) -> Context:
    """Contexts to compare on: drawn, or those of the test as often as it takes."""
    if type(solver.data).sample is not ContextDataModule.sample:
        return solver.data.produce(0, CONTEXTS)
    solver._set_up()
    test = concatenate([solver.data.batch("test", k) for k in range(solver.data.num_batches("test"))])
    return take(concatenate([test] * -(-CONTEXTS // num_rows(test))), slice(0, CONTEXTS))


def _program(graph: Graph, given: list[Tensor], name: str) -> Any:
    """The graph with the gradient inside, exported with a free batch size.

    ``torch.export`` alone loses what the gradient of exp, sigmoid, norm and the like keeps of their results, so the gradient
    is made a part of the graph first. A batch size that no other dimension has keeps the two apart.
    """
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    try:
        traced = make_fx(graph, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
        batch = torch.export.Dim("batch", min=1)
        free: Any = tuple({0: batch} for _ in given)
        return torch.export.export(traced, tuple(given), dynamic_shapes=free, strict=False)
    except Exception as error:
        refine = graph.module.refine
        other = "" if refine is None else f" (if that is {type(refine).__name__}'s doing, train without refine)"
        raise ProblemError(
            f"{name} cannot be exported: {_operation(error)}{other}; AMORTIZED_DEBUG=1 shows all"
        ) from error


def _operation(error: Exception) -> str:
    """What was in the way, in one line."""
    if "specialized it to be a constant" in str(error):
        return "it makes the batch size a plain number: write x.shape[0] in place of len(x), and no loop over rows"
    first = describe(origin(error))
    for line in str(error).splitlines():
        if "aten." in line or "operator" in line.lower():
            return f"{line.strip()} ({type(error).__name__})"
    return first


def _write(program: Any, path: Path, format: str, names: list[str]) -> None:
    """The file, whole or not at all."""
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        if format == "torch":
            torch.export.save(program, unfinished)
        else:
            _write_onnx(program, unfinished, names)
        disk.sync(unfinished)
        unfinished.replace(path)
        disk.sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_onnx(program: Any, path: Path, names: list[str]) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ProblemError(f"--format onnx needs {error.name}: pip install '.[onnx]' in the clone") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, (), input_names=names, output_names=list(OUTPUTS), dynamo=True, verbose=False
            )
        assert made is not None
        made.save(path, external_data=False)
    except Exception as error:
        raise ProblemError(f"ONNX cannot hold this graph: {_operation(error)}; AMORTIZED_DEBUG=1 shows all") from error


def _compare(graph: Graph, path: Path, a: Context, names: list[str], random: bool) -> dict[str, float]:
    """The largest difference of each output from the module's.

    An ONNX runtime has draws of its own, so what is random is compared there by its mean over the contexts.
    """
    torch.manual_seed(0)
    expected = [x.numpy() for x in graph(*leaves(a))]
    with tempfile.TemporaryDirectory() as folder:
        given, found = (str(Path(folder, name)) for name in ("given.npz", "found.npz"))
        arrays: dict[str, Any] = dict(zip(names, [leaf.numpy() for leaf in leaves(a)], strict=True))
        np.savez(given, **arrays)
        run = subprocess.run(
            [sys.executable, "-c", RUNNER, str(path.absolute()), given, found, "0"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if run.returncode:
            raise ProblemError(f"the exported graph does not run: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
        got = list(np.load(found).values())
    errors = {}
    for name, x, y in zip(OUTPUTS, expected, got, strict=True):
        if random and path.suffix == ".onnx" and name != "b":
            errors[f"{name}, mean"] = float(abs(x.mean() - y.mean()) / (1 + abs(x.mean())))
            continue
        with np.errstate(invalid="ignore"):  # a certificate that promises nothing is infinite on both sides
            errors[name] = float(np.where(x == y, 0, np.abs(x - y) / (1 + np.abs(x))).max())
        if not errors[name] <= CLOSE:
            raise ProblemError(
                f"the exported graph gives another {name} than the module: off by {errors[name]:.2g} on {num_rows(a)} contexts"
            )
    return errors
