r"""The idea of the project in one class.

Many problems ``min_b L(b; a)`` differ only in their context ``a``. Instead of solving each anew, train a model
``f`` to predict the minimizer,

    ``min_theta  E_a [ L(f_theta(a); a) ]``,

so that one forward pass solves a problem. To state a new problem, subclass :class:`AmortizedModule` and write
``objective``; training, solvers, the measurement of the gap and the command line follow from it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics import MeanMetric

from amortized import checkpoint as checkpoints
from amortized.checkpoint import MismatchError, mismatch
from amortized.contexts.data_module import ContextDataModule, evaluation_names
from amortized.contract import (
    Context,
    ProblemError,
    Solved,
    check_context,
    check_solved,
    check_support,
    constrained,
    context_of,
    draws,
    evaluate,
    feasibility_tol,
    rows_where,
    stream_seed,
    take,
    violation,
)
from amortized.finite import FiniteUpdates
from amortized.first_batch import check_network
from amortized.lightning_private import logs_now, trainer_of
from amortized.losses.objective import Loss, ObjectiveLoss
from amortized.rebuild import rebuild
from amortized.solvers.base import Solver
from amortized.strategies import check_strategy
from amortized.update import Update, compiled_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOADER = "the batch of a loader"
"""Who gave a batch, in messages."""
SKIPPED = "amortized_skipped"
"""Key under which a checkpoint holds how many rows and updates training left out."""


class AmortizedModule(LightningModule, abc.ABC):
    """A problem ``min_b L(b; a)`` together with a model that amortizes it.

    Parameters that ``objective`` has (a decoder, a dictionary) are parameters of the module and train jointly.

    Args:
        network: predicts solutions: ``network(observe(a)) -> b`` of shape ``(B, *)``, the shape of ``initial(a)``.
        refine: a solver whose few differentiable steps from the prediction belong to the model (semi-amortized:
            unrolled optimization, MAML, SA-VAE, learned optimizers). ``None``: fully amortized.
        multipliers: predicts the multipliers of the constraints, ``multipliers(observe(a)) -> (B, m)``, which :meth:`dual` gives;
            trained by a loss that knows of them. ``None``: none are predicted.
        loss: the training signal; ``None`` is :class:`~amortized.losses.objective.ObjectiveLoss`.
        optimizer: makes the optimizer from the module's parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; it steps with every training step.
        compile: make each update, from the contexts to the optimizer's step, one call of a graph that ``torch.compile`` makes
            first: see :mod:`amortized.update`. That takes some 10 to 60 s, which long training pays back, and a second or two
            in later runs of the same. The draws of a random objective are then other ones. What cannot be compiled is trained
            as it is, with a warning.
        not_finite: what training does about a row, or a gradient, that is NaN or infinite: ``stop`` ends the run before that
            update, naming batch and row; ``skip`` leaves the row, or the update, out and counts it
            (``train/skipped_rows``, ``train/skipped_updates``): see :mod:`amortized.finite`.

    Raises:
        ProblemError: if ``network`` is no module; on the first training batch, if the objective or the network breaks the
            contract; at any later one whose loss or gradient is not finite.

    Example:
        >>> class Projection(AmortizedModule):
        ...     '''Nearest point to a on the unit circle; b is its angle.'''
        ...     def objective(self, b, a):
        ...         return (torch.cat([b.cos(), b.sin()], 1) - a).square().sum(1)
        >>> problem = Projection(network=nn.Linear(2, 1))
        >>> problem.amortized_step(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        network: nn.Module,
        refine: Solver | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        not_finite: Literal["stop", "skip"] = "stop",
        multipliers: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ProblemError(
                f"{type(self).__name__}: network must be a torch.nn.Module, got a {type(network).__name__}: annotate it, "
                "def __init__(self, network: nn.Module, ...), for the command line to build what is named"
            )
        self.network = network
        self.refine = refine
        self.multipliers = multipliers
        self.loss = loss if loss is not None else ObjectiveLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.compiled = compile
        self.finite_updates = FiniteUpdates(not_finite)
        self._objective_means: list[MeanMetric] = []
        self._bad_rows, self._feasible = MeanMetric(), MeanMetric()
        self._violation = MeanMetric(nan_strategy="ignore")
        self._checked = False
        self._compiled_update: Update | None = None

    # ---- the problem

    differentiable: bool = True
    """Whether gradients of the objective may be followed; ``False`` makes the problem a :class:`~amortized.contract.BlackBox`."""

    objective_name = "objective"
    """What the objective is called, with its unit, in tables and pictures."""

    free_settings: tuple[str, ...] = ("optimizer", "scheduler", "loss", "compile", "not_finite")
    """Settings that say how a model is trained or measured, not what it is: a trained one may be tested with others."""

    free_to_resume: tuple[str, ...] = ("compile", "not_finite")
    """Settings that leave training what it is, so that a run may go on with others."""

    @abc.abstractmethod
    def objective(self, b: Tensor, a: Context) -> Tensor:
        """``L(b; a)``, shape ``(B,)``; row i depends on row i of ``b`` and ``a`` alone. All that a problem must write."""

    def support(self) -> Any:
        """Where contexts must lie: a constraint of ``torch.distributions``, or a dict of them by field; ``None``: anywhere.

        Checked on the first batch of training and on all that is evaluated or predicted; NaN is no matter of the support.
        """
        return None

    def initial(self, a: Context) -> Tensor:
        """Where a solver starts cold, ``(B, *)``; zeros unless the problem knows better."""
        with torch.no_grad():
            return torch.zeros_like(self.network(self.observe(a)))

    def observe(self, a: Context) -> Context:
        """What the model may see of a context; all of it, unless the problem hides a part (a query set, a label)."""
        return a

    def prepare(self, a: Context) -> Context:
        """What the objective needs of a context, worked out once before solvers search: what shared layers make of images."""
        return a

    def dual(self, a: Context) -> Tensor | None:
        """The multipliers that the model predicts, ``(B, m)``, for solvers started from its prediction; ``None``: it has none."""
        return None if self.multipliers is None else self.multipliers(self.observe(a))

    def decode(self, b: Tensor, a: Context) -> Any:
        """The solution in the problem's own terms: a tensor, a ``NamedTuple`` of tensors or a distribution."""
        return b

    def draw(self, a: Context, solutions: dict[str, Tensor]) -> Figure | None:
        """A picture of a few contexts and their solutions by ``"network"`` and ``"solver"``; ``None`` draws nothing."""
        return None

    def save(self, decoded: Any, paths: list[Path]) -> list[Path]:
        """Write decoded predictions as files of the problem's own kind, one for each row, and say which.

        ``paths`` have no suffix. By default none are written, and ``predict`` puts all of them in one ``predictions.npz``.
        """
        return []

    # ---- the model

    def iterates(self, a: Context) -> list[Tensor]:
        """The network's prediction ``b_0`` and its refinements ``b_1, ..., b_T``, each ``(B, *)``."""
        seen = self.observe(a)
        b = self.network(seen)
        return [b] if self.refine is None else [b, *self.refine.iterates(self, seen, b)]

    def forward(self, a: Context) -> Tensor:
        """The prediction ``f(a)``, shape ``(B, *)``."""
        return self.iterates(a)[-1]

    def amortized_step(self, a: Context) -> Tensor:
        """The training signal on each of these contexts, ``(B,)``: the loss, of which training takes the mean."""
        return self.loss.on_solved(self, a) if isinstance(a, Solved) else self.loss(self, a)

    # ---- Lightning

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler: dict[str, Any] = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        if isinstance(scheduler["scheduler"], ReduceLROnPlateau):
            scheduler |= {"monitor": scheduler["scheduler"].monitor, "frequency": self.trainer.val_check_interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: Context | list[Context], batch_idx: int) -> Tensor:
        """One update; a list of K context batches makes K updates, the first K - 1 of them without Lightning's overhead.

        Compiled updates are all made here. Lightning's own step after them finds no gradient, and makes none.
        """
        together = getattr(getattr(self.trainer, "datamodule", None), "batches_per_step", 1)
        batches = batch if isinstance(batch, list) and together > 1 else [batch]
        for a in batches:
            check_context(a, LOADER)
        if not self._checked:
            self.check(batches[0], updates=len(batches))
        numbers = [self._number(batch_idx, k, len(batches)) for k in range(len(batches))]
        here = len(batches) - (not self.compiled)
        for a, number in zip(batches[:here], numbers, strict=False):
            loss = self._update(a, number)
        if self.compiled:
            loss.requires_grad_()
        else:
            loss = self.finite_updates.mean(self, batches[-1], numbers[-1])
        logs = logs_now(self.trainer)
        if logs or (self.compiled and self.device.type == "cpu"):
            self.finite_updates.look(self)
        if logs:
            self.log("train/loss", loss.detach(), sync_dist=True)
            if self.finite_updates.action == "skip":
                self.log("train/skipped_rows", float(self.finite_updates.rows), sync_dist=True, reduce_fx="sum")
                self.log("train/skipped_updates", float(self.finite_updates.updates))
        return loss

    def _number(self, batch_idx: int, k: int, together: int) -> int:
        """Which batch of the training stream is the k-th of those ``together`` in this step."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ContextDataModule):
            return data.position - (self.trainer.world_size - self.trainer.global_rank) * together + k
        return batch_idx * together + k

    def setup(self, stage: str) -> None:
        """Refuses a strategy that splits the model over devices; an override calls this too."""
        check_strategy(self.trainer.strategy)

    def on_train_start(self) -> None:
        """Refuses a schedule that ends before the training does, now and not at its last step; an override calls this too."""
        for config in self.trainer.lr_scheduler_configs:
            total, done = getattr(config.scheduler, "total_steps", 0), config.scheduler.last_epoch
            needed = done + self.trainer.max_steps - self.trainer.global_step
            if isinstance(config.scheduler, OneCycleLR) and self.trainer.max_steps > 0 and needed > total:
                raise ProblemError(
                    f"OneCycleLR ends at step {total} (total_steps), and training goes to step {self.trainer.max_steps}: "
                    + (
                        "a schedule that was begun cannot be prolonged: start anew from the weights, with --init_from RUN"
                        if done
                        else f"write --model.scheduler.total_steps {self.trainer.max_steps}"
                    )
                )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As in Lightning; where updates are compiled they were clipped there, and there is no gradient here."""
        if not self.compiled:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Lets no update through that is not finite; an override calls this too."""
        if not self.compiled:
            self.finite_updates.before_update(self, optimizer)

    def _update(self, a: Context, number: int) -> Tensor:
        """An update, all of it; its loss, without a graph."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        if self._compiled_update is not None:
            if (made := self._compiled_update(a)) is not None:
                return self.finite_updates.made(self, a, number, *made)
            self._compiled_update = None
        loss = self.finite_updates.mean(self, a, number)
        optimizer.zero_grad()  # first: the gradients of the last step are still there
        loss.backward()
        self.finite_updates.before_update(self, optimizer)
        if self.trainer.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
        optimizer.step()
        return loss.detach()

    def validation_step(self, a: Context, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The prediction, for callbacks to measure; its mean objective is logged, that of each set of ``evaluations`` apart.

        A row that is not finite counts: the mean is then not finite either, so that no checkpoint, early stop or sweep takes a
        model that fails on hard rows for a good one. ``val/not_finite`` is the fraction of such rows, where there are any.
        Of a problem with constraints ``val/feasible`` is the fraction of feasible predictions and ``val/violation`` the mean of
        their violation.
        """
        check_context(a, LOADER)
        check_support(self, a)
        b = self(a)
        value = evaluate(self, b, a)
        self._objective_means[dataloader_idx].update(value)
        if not dataloader_idx:
            self._bad_rows.update(~value.isfinite())
        if not dataloader_idx and constrained(self):
            with torch.no_grad():
                off = violation(self, b, a)
            self._feasible.update(off <= feasibility_tol(self))
            self._violation.update(off)
        return b

    test_step = validation_step

    def predict_step(self, a: Context, batch_idx: int) -> dict[str, Any]:
        """The predictions and their objectives, which rows of them are ``finite``, and the decoded solutions of those.

        Of a problem with constraints their ``violation`` too. A context with a NaN is not shown to the model: its prediction is
        NaN, those of the other rows are as without it. Where no row is finite, nothing is decoded: ``None``.
        """
        check_context(a, LOADER)
        check_support(self, a)
        given = rows_where(lambda leaf: ~leaf.isnan(), a)
        known = take(a, given)
        b = self(known)
        objective = evaluate(self, b, known)
        b, objective = _filled(b, given), _filled(objective, given)
        finite = rows_where(torch.isfinite, b) & objective.isfinite()
        decoded = self.decode(take(b, finite), take(a, finite)) if finite.any() else None
        found = {"b": b, "objective": objective, "finite": finite, "decoded": decoded}
        if constrained(self):
            with torch.no_grad():
                found["violation"] = _filled(violation(self, take(b, given), known), given)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Nothing is saved before what has not been looked at yet is known to be finite; what was skipped goes with it."""
        updates = self.finite_updates
        updates.look(self)
        rows = updates.rows
        if updates.action == "skip" and self.trainer.world_size > 1:
            rows = int(self.trainer.strategy.reduce(torch.tensor(rows, device=self.device), reduce_op="sum"))
        checkpoint[SKIPPED] = [rows, updates.updates]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the loss has learned matters to training alone: a test may have another loss."""
        rows, self.finite_updates.updates = checkpoint.get(SKIPPED, (0, 0))
        trainer = trainer_of(self)
        self.finite_updates.rows = rows if trainer is None or trainer.is_global_zero else 0
        if trainer is None or trainer.state.fn != "fit":
            weights, own = checkpoint["state_dict"], self.state_dict()
            kept = {key: value for key, value in weights.items() if not key.startswith("loss.")}
            checkpoint["state_dict"] = kept | {key: value for key, value in own.items() if key.startswith("loss.")}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, **kwargs: Any
    ) -> Self:
        """The trained module of a checkpoint file, built from the recipe that it holds.

        Raises:
            CheckpointError: if it is no good checkpoint, cannot be built here, or is of another class than this one.
        """
        if kwargs:
            raise TypeError(
                f"load_from_checkpoint builds what the checkpoint holds; it does not take {', '.join(kwargs)}"
            )
        path = Path(checkpoint_path)
        module = cls.from_checkpoint(path, checkpoints.load(path))
        return module if map_location is None else module.to(map_location)

    @classmethod
    def from_checkpoint(cls, path: Path, loaded: dict[str, Any]) -> Self:
        """As :meth:`load_from_checkpoint`, of what was read already."""
        module = rebuild(checkpoints.recipe_in(path, loaded)["model"], cls, str(path))
        try:
            module.on_load_checkpoint(loaded)
            module.load_state_dict(loaded["state_dict"])
        except MismatchError as error:
            raise MismatchError(f"{path}: {error}") from error
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch.

        Raises:
            MismatchError: if the weights are those of another network; it names the first that does not fit.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            fault = mismatch(self.state_dict(), dict(state_dict)) or str(error).splitlines()[-1].strip()
            raise MismatchError(f"the checkpoint is of another network: {fault}") from error

    def on_validation_epoch_start(self) -> None:
        names = evaluation_names(self.trainer)
        self._objective_means = [MeanMetric(nan_strategy="disable").to(self.device) for _ in names]
        # Anew: a test's are inference tensors, which a fit cannot go on with.
        self._bad_rows = MeanMetric().to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_start(self) -> None:
        self._synchronise_buffers(False)

    def on_validation_end(self) -> None:
        self._synchronise_buffers(True)

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_predict_start, on_predict_end = on_validation_start, on_validation_end

    def _synchronise_buffers(self, enabled: bool) -> None:
        """Processes have different numbers of batches to evaluate, so their forward passes must not wait for each other."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_forward_param_sync = enabled

    def on_validation_epoch_end(self) -> None:
        self._log_objective("val")

    def on_test_epoch_end(self) -> None:
        self._log_objective("test")

    def _log_objective(self, split: str) -> None:
        if not self.trainer.sanity_checking:
            for name, mean in zip(evaluation_names(self.trainer), self._objective_means, strict=True):
                self.log(f"{split}/{name}/objective".replace("//", "/"), mean.compute(), prog_bar=not name)
            if constrained(self):
                self.log(f"{split}/feasible", self._feasible.compute())
                self.log(f"{split}/violation", self._violation.compute())
            bad = self._bad_rows.compute()  # of all processes
            if bad > 0:
                self.log(f"{split}/not_finite", bad)
                rank_zero_warn(
                    f"{split}/objective is not finite: it is NaN or infinite in {float(bad):.2%} of the rows"
                )
        for metric in (*self._objective_means, self._bad_rows, self._feasible, self._violation):
            metric.reset()

    def check(self, a: Context, updates: int = 1) -> None:
        """Check the network and the objective against their contracts on one batch; see :func:`check_objective`.

        Raises:
            ProblemError: with what was given, what was expected and what to do.
        """
        if updates > 1 and (self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1):
            raise ProblemError(
                f"batches_per_step={updates} makes {updates} updates in one training step, which needs one process and "
                f"accumulate_grad_batches=1; there are {self.trainer.world_size} and {self.trainer.accumulate_grad_batches}"
            )
        if updates > 1 and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ProblemError("batches_per_step > 1 does not scale losses for float16: use precision bf16-mixed or 32")
        check_support(self, context_of(a))
        training = self.training
        self.eval()  # and with the random numbers put back: the check leaves no trace in the run
        with draws(stream_seed(0, "check", 0), self.device), torch.no_grad():
            check_network(self, context_of(a))
            if isinstance(a, Solved):
                check_solved(self, a)
        self.train(training)
        if self.compiled:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            self._compiled_update = compiled_update(self, optimizer)
        self._checked = True


def _filled(rows: Tensor, given: Tensor) -> Tensor:
    """The ``given`` rows, in their places, and NaN in the others."""
    if given.all():
        return rows
    filled = rows.new_full((len(given), *rows.shape[1:]), torch.nan)
    filled[given] = rows
    return filled
