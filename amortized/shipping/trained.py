"""A trained solver: predict, certify, refine the rows that fail, and solve those that still fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributions import Distribution

from amortized.certificates.conformal import Conformal
from amortized.contexts.data_module import DTYPES, ContextDataModule, in_precision
from amortized.contexts.files import as_contexts, nan_in, tell_nan
from amortized.contract import (
    Context,
    ProblemError,
    better,
    check_support,
    concatenate,
    draws,
    evaluate,
    feasibility_tol,
    map_leaves,
    num_rows,
    rows_where,
    stream_seed,
    take,
    violation,
)
from amortized.evaluation.calibration import Calibration, calibrate_model, proof_for
from amortized.module import AmortizedModule
from amortized.shipping.answer import WORDS, Answer, Path, Rows
from amortized.solvers import Solution, Solver


class TrainedSolver:
    """A trained model with its data, the gap's solver, and what its answers were calibrated to; see :func:`amortized.load`.

    Args:
        module: trained.
        data: whose contexts it was trained on.
        solver: that of the gap.
        calibration: of its answers; ``None``: made at the first need, which solves validation contexts.
        name: for messages and ``/info``.
        precision: of the trainer.
        trained: whether the network is; if not, every context is solved from the cold start.
    """

    def __init__(
        self,
        module: AmortizedModule,
        data: ContextDataModule,
        solver: Solver,
        calibration: Calibration | None = None,
        name: str = "",
        precision: str | None = None,
        trained: bool = True,
    ) -> None:
        self.trained = trained
        self.dtype = DTYPES.get(precision or "")
        self.module = module.eval() if self.dtype is None else module.eval().to(self.dtype)
        self.data, self.solver, self.name, self.precision = data, solver.eval(), name, precision
        self.proof = proof_for(module)
        """A certificate of the problem's own, where it has one: better than one that is calibrated."""
        self._calibration = calibration
        self._like: Context | None = None

    def __repr__(self) -> str:
        problem, solver = type(self.module).__name__, type(self.solver).__name__
        return f"TrainedSolver({self.name}: {problem} by {type(self.module.network).__name__}, else {solver})"

    def to(self, device: torch.device | str) -> TrainedSolver:
        """Moves the model; contexts follow it."""
        self.module.to(device)
        self.solver.to(device)
        return self

    @property
    def calibration(self) -> Calibration:
        """What its answers were calibrated to."""
        if self._calibration is None:
            self._set_up()
            self._calibration = calibrate_model(self.module, self.data, self.solver)
        return self._calibration

    @property
    def like(self) -> Context:
        """One context, for its fields, shapes and types."""
        if self._like is None:
            self._set_up()
            self._like = take(self.data.batch("test", 0), slice(0, 1))
        return self._like

    def _set_up(self) -> None:
        self.data.prepare_data()
        self.data.setup("predict")

    # ---- predictions, as `amortized predict` makes them

    def predict(self, a: Any, number: int = 0) -> dict[str, Any]:
        """What ``amortized predict`` writes of these contexts, as one of its batches, by its number among them.

        ``b``, ``objective``, ``finite`` and ``decoded``: see :meth:`amortized.AmortizedModule.predict_step`.
        """
        with self._at_work(number):
            return self.module.predict_step(self._placed(a), number)

    @contextlib.contextmanager
    def _at_work(self, number: int = 0) -> Iterator[None]:
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision or "")
        device = self.module.device
        with (
            torch.no_grad(),
            draws(stream_seed(self.data.seed, "predict noise", number), device),
            torch.autocast(device.type, mixed) if mixed else contextlib.nullcontext(),
        ):
            yield

    def _placed(self, a: Context) -> Context:
        a = map_leaves(lambda leaf: leaf.to(self.module.device), a)
        return a if self.dtype is None else in_precision(a, self.dtype)

    # ---- answers

    def solve(self, a: Any, tol: float = 1e-3, batch_size: int = 4096) -> Answer:
        """Solutions that lack at most ``tol``, each with its certificate and where it comes from.

        Predict; certify; refine the rows that fail, from the prediction; solve those that still fail, from the cold start;
        each on all its rows at once. A context unlike those of training goes to the solver at once. A row that nothing
        solves says so: its path is ``"none"``.

        Args:
            a: contexts as tensors or arrays (also in a dict, by fields); one of them, or B.
            tol: what a solution may lack, in the objective's unit.
            batch_size: rows that a solver works on at a time; the network's batches are those of evaluation.

        Raises:
            ProblemError: if contexts are of other fields, shapes or types than those of training, or out of the support.
        """
        if not tol > 0:
            raise ProblemError(f"tol must be positive, in the objective's unit; got {tol}")
        plain = _is_numpy(a)
        contexts = as_contexts(a, self.like)
        if told := tell_nan(nan_in(contexts)):
            rank_zero_warn(told)
        starts = range(0, num_rows(contexts), batch_size)
        batches = ((number, take(contexts, slice(at, at + batch_size))) for number, at in enumerate(starts))
        return self._answer(self._placed(contexts), self.all_rows(batches, tol, batch_size), plain)

    def rows(self, a: Context, tol: float, number: int = 0, by_network: bool = False) -> Rows:
        """The stages of :meth:`solve` on one batch; ``by_network`` leaves out those of the solver."""
        a = self._placed(a)
        with self._at_work(number):
            check_support(self.module, a)
            if not self.trained:
                return self._cold(a, tol, number)
            rows = self._by_network(a, tol)
            return rows if by_network else self._by_solver(a, rows, tol, number)

    def all_rows(self, batches: Iterable[tuple[int, Context]], tol: float, batch_size: int) -> Rows:
        """As :meth:`rows` of each numbered batch, one after the other; what the network leaves of them is solved together.

        A solver takes as long for a few rows as for hundreds, so that rows left over from many batches cost what those of one do.
        """
        if not self.trained:
            return concatenate([self.rows(a, tol, number) for number, a in batches])
        parts, left = [], []
        for number, a in batches:
            rows = self.rows(a, tol, number, by_network=True)
            parts.append(rows)
            left.append(take(self._placed(a), rows.path == int(Path.NONE)))
        whole, a = concatenate(parts), concatenate(left)
        places = (whole.path == int(Path.NONE)).nonzero()[:, 0]
        for at in range(0, len(places), batch_size):
            some, near = places[at : at + batch_size], take(a, slice(at, at + batch_size))
            with self._at_work(number):
                found = self._by_solver(near, take(whole, some), tol, number)
            for column, new in zip(whole, found, strict=True):
                column[some] = new
        return whole

    def _cold(self, a: Context, tol: float, number: int) -> Rows:
        """By the solver alone, from the cold start: solved is what converged, or is proved to lack at most ``tol``."""
        given = rows_where(lambda leaf: ~leaf.isnan(), a)
        near = take(a, given)
        start = self.module.initial(near)
        found = self._solved(near, start, number)
        bound = torch.full_like(found.value, torch.nan)
        if self.proof is not None:
            bound = _limited(self.proof.bound(self.module, found.b, near), found.value)
        out, good = _nothing(start, torch.zeros_like(given)), found.converged | (bound <= tol)
        self._put(out, given.nonzero()[:, 0], *_parts(found, bound), Path.SOLVER, good, found.evaluations)
        return out

    def _by_network(self, a: Context, tol: float) -> Rows:
        given = rows_where(lambda leaf: ~leaf.isnan(), a)
        unlike = given & self.calibration.likeness.unlike(self.module.observe(a))
        like = given & ~unlike
        b, value, broken, bound = self._predicted(take(a, like))
        rows = _nothing(b, unlike)
        self._put(rows, like.nonzero()[:, 0], b, value, bound, broken, Path.NETWORK, bound <= tol, 2)
        return rows

    def _by_solver(self, a: Context, out: Rows, tol: float, number: int) -> Rows:
        """The rows with what the solver finds where the network did not suffice."""
        calibration, module, unlike = self.calibration, self.module, out.unlike
        given = rows_where(lambda leaf: ~leaf.isnan(), a)
        failing = (given & ~unlike & (out.path == int(Path.NONE))).nonzero()[:, 0]

        # Those that failed from their prediction, those unlike from the cold start: one run of the solver.
        far = unlike if self.proof is None else torch.zeros_like(unlike)  # a proof holds there too
        at = torch.cat([failing, unlike.nonzero()[:, 0]])
        if len(at):
            near = take(a, at)
            start = torch.cat([out.b[failing], module.initial(take(near, slice(len(failing), None))).to(out.b.dtype)])
            found = self._solved(near, start, number)
            bound = self._bound(found, near, calibration.refined, calibration.refined_unfinished)
            good = torch.where(far[at], found.converged, bound <= tol)
            bound = torch.where(far[at], torch.where(found.converged, torch.nan, torch.inf), bound)
            path = torch.where(unlike[at], int(Path.SOLVER), int(Path.REFINED))
            good = self._put(out, at, *_parts(found, bound), path, good, found.evaluations)
            failing = failing[~good[: len(failing)]]

        if len(failing):
            near = take(a, failing)
            found = self._solved(near, module.initial(near), number)
            bound = self._bound(found, near, calibration.solver, calibration.solver_unfinished)
            self._put(out, failing, *_parts(found, bound), Path.SOLVER, bound <= tol, found.evaluations)
        return out

    def _predicted(self, a: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions, in batches like those of evaluation, which fit a cache; their objectives, violations and bounds."""
        module, certificate, size = self.module, self.proof or self.calibration.network, self.data.eval_batch_size
        parts = [module(take(a, slice(at, at + size))) for at in range(0, num_rows(a), size)]
        b = torch.cat(parts) if parts else module.initial(a)
        value = evaluate(module, b, a)
        bound = torch.where(value.isfinite(), certificate.bound(module, b, a).to(value.dtype), torch.inf)
        return b, value, violation(module, b, a), _limited(bound, value)

    def _solved(self, a: Context, b: Tensor, number: int) -> Solution:
        # Started anew: rows of one search, and of the next, have the same draws.
        with draws(stream_seed(0, "gap search", number), b.device):
            return self.solver.solve(self.module, self.module.prepare(a), b)

    def _bound(self, found: Solution, a: Context, finished: Conformal, unfinished: Conformal) -> Tensor:
        """On what a solver found: by the problem's own certificate, or by whether it met its tolerance."""
        if self.proof is not None:
            return _limited(self.proof.bound(self.module, found.b, a), found.value)
        quantile = found.value.new_tensor([unfinished.quantile, finished.quantile])
        return _limited(quantile[found.converged.long()], found.value)

    def _put(
        self,
        rows: Rows,
        at: Tensor,
        b: Tensor,
        value: Tensor,
        bound: Tensor,
        broken: Tensor,
        path: Path | Tensor,
        good: Tensor,
        evaluations: Tensor | int,
    ) -> Tensor:
        """Put what was found for some rows where it is no worse than what they have; a path where it is good and feasible.

        Returns which of them now have a path.
        """
        limit = feasibility_tol(self.module)
        good = good & (broken <= limit)
        kept = better(rows.objective[at], rows.violation[at], value, broken, limit)
        taken = ~kept & (value < torch.inf)
        rows.b[at] = torch.where(taken.view(-1, *[1] * (b.ndim - 1)), b.to(rows.b.dtype), rows.b[at])
        for column, new in ((rows.objective, value), (rows.violation, broken)):
            column[at] = torch.where(taken, new.to(column.dtype), column[at])
        rows.certificate[at] = torch.where(taken | good, bound.to(rows.certificate.dtype), rows.certificate[at])
        rows.path[at] = torch.where(good, path, int(Path.NONE)).to(torch.uint8)
        rows.evaluations[at] += evaluations
        return good

    def decoded(self, a: Context, rows: Rows) -> tuple[Any, Tensor]:
        """Solutions in the problem's own terms, of those rows that are finite, and which these are ``(B,)``."""
        finite = rows_where(torch.isfinite, rows.b) & rows.objective.isfinite()
        return self.module.decode(take(rows.b, finite), take(self._placed(a), finite)), finite

    def _answer(self, a: Context, rows: Rows, plain: bool) -> Answer:
        decoded, finite = self.decoded(a, rows)
        path = WORDS[rows.path.cpu().numpy()]
        found = Answer(
            rows.b,
            decoded,
            rows.objective,
            rows.certificate,
            path,
            rows.violation,
            rows.evaluations,
            rows.unlike,
            finite,
        )
        return Answer(*map(_numpy, found)) if plain else found


def _nothing(b: Tensor, unlike: Tensor) -> Rows:
    """Rows for which nothing has been found yet, of solutions like ``b``."""
    B = len(unlike)
    return Rows(
        b.new_full((B, *b.shape[1:]), torch.nan),
        b.new_full((B,), torch.inf),
        b.new_full((B,), torch.inf),
        torch.zeros(B, dtype=torch.uint8, device=b.device),
        b.new_full((B,), torch.inf),
        torch.zeros(B, dtype=torch.int64, device=b.device),
        unlike,
    )


def _parts(found: Solution, bound: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return found.b, found.value, bound, found.violation


def _limited(bound: Tensor, value: Tensor) -> Tensor:
    """No bound is below the rounding of the value that it is on."""
    return torch.maximum(bound.to(value.dtype), 4 * torch.finfo(value.dtype).eps * value.abs()).nan_to_num(
        nan=torch.inf
    )


def _is_numpy(a: Any) -> bool:
    if isinstance(a, Tensor):
        return False
    parts = list(a._asdict().values()) if hasattr(a, "_asdict") else list(a.values()) if isinstance(a, dict) else None
    return True if parts is None else all(map(_is_numpy, parts))


def _numpy(found: Any) -> Any:
    """Arrays of tensors; what is made of distributions stays as it is."""
    if isinstance(found, Tensor):
        return found.detach().cpu().float().numpy() if found.dtype == torch.bfloat16 else found.detach().cpu().numpy()
    if isinstance(found, Distribution | np.ndarray):
        return found
    if hasattr(found, "_fields"):
        return type(found)(*map(_numpy, found))
    return found
