r"""The idea of the project in one class.

Many problems ``min_b L(b; a)`` differ only in their context ``a``. Instead of solving each anew, train a model
``f`` to predict the minimizer,

    ``min_theta  E_a [ L(f_theta(a); a) ]``,

so that one forward pass solves a problem. To state a new problem, subclass :class:`AmortizedModule` and write
``objective``; training, solvers, the measurement of the gap and the command line follow from it.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from amortized.checkpoint import MismatchError, mismatch
from amortized.lean import LeanModule
from amortized.losses import Loss, ObjectiveLoss
from amortized.problem import Context, ProblemError, check_objective, draws, evaluate
from amortized.solvers.base import Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AmortizedModule(LeanModule, abc.ABC):
    """A problem ``min_b L(b; a)`` together with a model that amortizes it.

    Parameters that ``objective`` has (a decoder, a dictionary) are parameters of the module and train jointly.

    Args:
        network: predicts solutions: ``network(observe(a)) -> b`` of shape ``(B, *)``, the shape of ``initial(a)``.
        refine: a solver whose few differentiable steps from the prediction belong to the model (semi-amortized:
            unrolled optimization, MAML, SA-VAE, learned optimizers). ``None``: fully amortized.
        loss: the training signal; ``None`` is :class:`~amortized.losses.ObjectiveLoss`.
        optimizer: makes the optimizer from the module's parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; it steps with every training step.
        compile: compile the training signal with ``torch.compile``, once for each shape of batches: a minute, which long
            training on a GPU pays back. The draws of a random objective are then other ones.

    Raises:
        ProblemError: on the first training batch, if the objective or the network breaks the contract.

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
    ) -> None:
        super().__init__()
        self.network = network
        self.refine = refine
        self.loss = loss if loss is not None else ObjectiveLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.compiled = compile
        self._objective_mean, self._shifted_mean = MeanMetric(), MeanMetric()
        self._checked = False

    # ---- the problem

    objective_name = "objective"
    """What the objective is called, with its unit, in tables and pictures."""

    free_settings: tuple[str, ...] = ("optimizer", "scheduler", "loss", "compile")
    """Settings that say how a model is trained or measured, not what it is: a trained one may be tested with others."""

    free_to_resume: tuple[str, ...] = ("compile",)
    """Settings that leave training what it is, so that a run may go on with others."""

    @abc.abstractmethod
    def objective(self, b: Tensor, a: Context) -> Tensor:
        """``L(b; a)``, shape ``(B,)``; row i depends on row i of ``b`` and ``a`` alone. All that a problem must write."""

    def initial(self, a: Context) -> Tensor:
        """Where a solver starts cold, ``(B, *)``; zeros unless the problem knows better."""
        with torch.no_grad():
            return torch.zeros_like(self.network(self.observe(a)))

    def observe(self, a: Context) -> Context:
        """What the model may see of a context; all of it, unless the problem hides a part (a query set, a label)."""
        return a

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
        return self.loss(self, a)

    # ---- Lightning

    @functools.cached_property
    def _signal(self) -> Callable[[Context], Tensor]:
        return torch.compile(self.amortized_step, dynamic=False) if self.compiled else self.amortized_step

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler: dict[str, Any] = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        if isinstance(scheduler["scheduler"], ReduceLROnPlateau):
            scheduler |= {"monitor": scheduler["scheduler"].monitor, "frequency": self.trainer.val_check_interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: Context | list[Context], batch_idx: int) -> Tensor:
        """One update; a list of K context batches makes K updates, the first K - 1 of them without Lightning's overhead."""
        *earlier, a = batch if isinstance(batch, list) else [batch]
        if not self._checked:
            self.check(a, updates=len(earlier) + 1)
        if earlier:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            for contexts in earlier:
                self._update(contexts, optimizer)
        loss = self._signal(a).mean()
        if self.trainer._logger_connector.should_update_logs:  # logging costs more than a small network's step
            self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def _update(self, a: Context, optimizer: torch.optim.Optimizer) -> None:
        loss = self._signal(a).mean()
        optimizer.zero_grad()  # first: the gradients of the last step are still there
        loss.backward()
        if self.trainer.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
        optimizer.step()

    def validation_step(self, a: Context, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The prediction, for callbacks to measure; its mean objective is logged, that of shifted contexts (1) apart."""
        b = self(a)
        (self._shifted_mean if dataloader_idx else self._objective_mean).update(evaluate(self, b, a))
        return b

    test_step = validation_step

    def predict_step(self, a: Context, batch_idx: int) -> dict[str, Any]:
        """The prediction, its objective and the decoded solution."""
        b = self(a)
        return {"b": b, "objective": evaluate(self, b, a), "decoded": self.decode(b, a)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the loss has learned matters to training alone: a test may have another loss."""
        if self._trainer is None or self._trainer.state.fn != "fit":
            weights, own = checkpoint["state_dict"], self.state_dict()
            kept = {key: value for key, value in weights.items() if not key.startswith("loss.")}
            checkpoint["state_dict"] = kept | {key: value for key, value in own.items() if key.startswith("loss.")}

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
            self.log(f"{split}/objective", self._objective_mean.compute(), prog_bar=True)
            if self._shifted_mean.update_called:  # on every process, if on one
                self.log(f"{split}/shifted/objective", self._shifted_mean.compute())
        self._objective_mean.reset()
        self._shifted_mean.reset()

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
        training = self.training
        self.eval()  # and with the random numbers put back: the check leaves no trace in the run
        with draws(0, self.device), torch.no_grad():
            self._check_network(a)
        self.train(training)
        self._checked = True

    def _check_network(self, a: Context) -> None:
        seen = self.observe(a)
        try:
            b = self.network(seen)
        except (RuntimeError, AttributeError) as error:
            raise ProblemError(
                f"network {type(self.network).__name__} fails on contexts of shape {_shapes(seen)}: {str(error).splitlines()[0]}"
            ) from error
        start = self.initial(a)
        if start.shape != b.shape:
            raise ProblemError(
                f"the network must predict solutions like initial(a), of shape {tuple(start.shape)}; it gives {tuple(b.shape)} "
                f"for contexts of shape {_shapes(seen)}: change the network's output features"
            )
        try:
            check_objective(self, b, a)
        except (RuntimeError, AttributeError) as error:
            raise ProblemError(
                f"{type(self).__name__}.objective fails on b of shape {tuple(b.shape)} and contexts of shape {_shapes(a)}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _shapes(a: Context) -> Any:
    return tuple(a.shape) if isinstance(a, Tensor) else {k: _shapes(v) for k, v in a._asdict().items()}
