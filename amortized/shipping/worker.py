"""The processes behind ``amortized serve``: one kind predicts and certifies, in batches; one solves what that left."""

from __future__ import annotations

import contextlib
from typing import Any

import litserve
import numpy as np
import torch

from amortized.callbacks.predictions import arrays, filled
from amortized.contexts.files import as_contexts
from amortized.contract import Context, ProblemError, concatenate, num_rows
from amortized.contract.faults import describe
from amortized.shipping.answer import WORDS
from amortized.shipping.load import load
from amortized.shipping.trained import TrainedSolver


class Worker(litserve.LitAPI):
    """Answers for contexts; a request is a dict of arrays by field, its answer a dict of columns, or ``{"error": ...}``.

    Requests are solved together. What is wrong with one of them is its own answer, and costs the others nothing.

    Args:
        checkpoint: the file.
        tol: what a solution may lack.
        by_network: whether to leave out the solver.
        **kwargs: as LitServe's: ``api_path``, ``max_batch_size``, ``batch_timeout``.
    """

    def __init__(self, checkpoint: str, tol: float, by_network: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint, self.tol, self.by_network = checkpoint, tol, by_network

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.solver = load(self.checkpoint, device)
        self.solver.rows(self.solver.like, self.tol)  # what is made at the first call is made now

    def decode_request(self, request: Any) -> Any:
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, requests: Any) -> Any:
        if not isinstance(requests, list):  # LitServe's loop for batches of one
            return answers(self.solver, [requests], self.tol, self.by_network)[0]
        return answers(self.solver, requests, self.tol, self.by_network)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


def answers(
    solver: TrainedSolver, requests: list[dict[str, np.ndarray]], tol: float, by_network: bool
) -> list[dict[str, Any]]:
    """The answer of each request, all solved together; where that fails, each alone, so that the bad one is found."""
    found: list[dict[str, Any]] = [{"error": "not answered"}] * len(requests)
    contexts: dict[int, Context] = {}
    for place, request in enumerate(requests):
        try:
            contexts[place] = as_contexts(request, solver.like)
        except ProblemError as error:
            found[place] = {"error": str(error)}
    try:
        if contexts:
            rows = _columns(solver, concatenate(list(contexts.values())), tol, by_network)
            at = 0
            for place, a in contexts.items():
                found[place] = {name: column[at : at + num_rows(a)] for name, column in rows.items()}
                at += num_rows(a)
    except Exception as error:
        if len(contexts) == 1:
            found[next(iter(contexts))] = {"error": str(error) if isinstance(error, ProblemError) else describe(error)}
        else:
            for place in contexts:
                found[place] = answers(solver, [requests[place]], tol, by_network)[0]
    return found


def _columns(solver: TrainedSolver, a: Context, tol: float, by_network: bool) -> dict[str, np.ndarray]:
    rows = solver.rows(a, tol, by_network=by_network)
    decoded, finite = solver.decoded(a, rows)
    known = finite.cpu().numpy()
    columns = {name: arrays(value, name)[name] for name, value in rows._asdict().items()}
    columns["path"] = WORDS[columns["path"]]
    with contextlib.suppress(TypeError):  # of what is decoded to something that has no arrays
        columns |= {name: filled(value, known) for name, value in arrays(decoded).items()}
    return columns | {"finite": known}


def split(columns: dict[str, np.ndarray], hard: np.ndarray, solved: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with what the solver found for the ``hard`` rows of them."""
    merged = {}
    for name, column in columns.items():
        new = solved[name]
        merged[name] = column.astype(np.result_type(column, new))
        merged[name][hard] = new
    return merged


def rows_of(request: dict[str, np.ndarray], hard: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a request that are ``hard``."""
    return {name: values[hard] for name, values in request.items()}
