"""Values that are not finite in training: the run stops there, or goes on without them.

No parameter moves by a gradient that is NaN or infinite. What happens then is the module's ``not_finite``:

* ``stop``: the run ends with a :class:`ProblemError` that names batch and row;
* ``skip``: rows whose loss is not finite are left out of the mean, a good row evaluated in their place; where the gradient
  is not finite without them, that update is not made. Both are counted.

All processes decide alike without a word to each other: they see the same gradient, averaged over all of them, and a loss
that is not finite is made to have a gradient that is not.

On a CPU every gradient is looked at before its update. On a GPU each look would make the host wait, so ``stop`` looks
every ``log_every_n_steps`` steps and before each checkpoint; until then the device itself puts zeros in place of such a
gradient, so that parameters stay finite, moved by the optimizer's momentum and decay alone. ``skip`` looks at every step.
Compiled updates (:mod:`amortized.update`) do the same, and are looked at after each training step on a CPU.
"""

from __future__ import annotations

import cmath
import math
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import (
    Context,
    ProblemError,
    context_of,
    draws,
    evaluate,
    leaves,
    num_rows,
    of_every_process,
    stream_seed,
    take,
)

if TYPE_CHECKING:
    from amortized.module import AmortizedModule


class Step(NamedTuple):
    """A batch that training used since the last look."""

    number: int
    a: Context | None
    """Its contexts; ``None`` where they are not kept until the look: the data know them by their number."""
    signal: Tensor
    """Its losses."""


class FiniteUpdates:
    """Keeps training from updates that are not finite; see the module's docstring.

    Args:
        action: what to do about a row, or a gradient, that is not finite.
    """

    def __init__(self, action: Literal["stop", "skip"]) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"not_finite must be 'stop' or 'skip'; got {action!r}")
        self.action = action
        self.rows = self.updates = 0
        """Rows left out and updates not made so far, of this process."""
        self._steps: list[Step] = []
        self._finite: list[Tensor] = []

    def mean(self, module: AmortizedModule, a: Context, number: int) -> Tensor:
        """The mean loss of training batch ``number``; one that is not finite has a gradient that is not."""
        if self.action == "skip":
            loss = self._without_bad_rows(module, a, number)
        else:
            signal = module.amortized_step(a)
            loss = signal.mean()
            self._steps.append(Step(number, None if self._later(module) else a, signal.detach()))
            if self._later(module):
                return loss * (1 + 0 * loss.detach())
        return loss if math.isfinite(loss.item()) else loss * torch.nan

    def made(self, module: AmortizedModule, a: Context, number: int, signal: Tensor, finite: Tensor) -> Tensor:
        """Keep what a compiled update says of itself until :meth:`look`; its mean loss."""
        self._steps.append(Step(number, a if module.device.type == "cpu" else None, signal))
        self._finite.append(finite)
        return signal.mean()

    def before_update(self, module: AmortizedModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradient that the optimizer is about to step with.

        Raises:
            ProblemError: on every process, where it is not finite and ``action`` is ``stop``.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._later(module):
            finite = get_total_norm(gradients).isfinite()
            for gradient in gradients:
                gradient.masked_fill_(~finite, 0)
            self._finite.append(finite)
            return
        # The sum of finite numbers may overflow; that of others is never finite.
        if cmath.isfinite(sum(g.sum().item() for g in gradients)) or all(bool(g.isfinite().all()) for g in gradients):
            self._steps.clear()
        elif self.action == "stop":
            self._stop(module)
        else:
            self.updates += 1
            for p in parameters:
                p.grad = None  # an optimizer leaves alone what has no gradient: its momentum and decay too

    def look(self, module: AmortizedModule) -> None:
        """Look at the updates that were not looked at when they were made; every process calls it at the same step.

        Raises:
            ProblemError: on every process, if one of them was not finite.
        """
        if self._finite:
            finite = torch.stack(self._finite).tolist()
            self._finite.clear()
            if not all(finite):
                if len(finite) == len(self._steps):  # unless gradients are accumulated
                    self._steps = [self._steps[finite.index(False)]]
                self._stop(module)
            self._steps.clear()

    def _later(self, module: AmortizedModule) -> bool:
        return self.action == "stop" and module.device.type != "cpu"

    def _stop(self, module: AmortizedModule) -> None:
        mine = next((fault for step in self._steps if (fault := _fault(module, step))), None)
        faults = of_every_process(mine, module.trainer.world_size)
        found = next((fault for fault in faults if fault is not None), None)
        numbers = [step.number for step in self._steps]
        self._steps.clear()
        if found is None and getattr(module.trainer.precision_plugin, "scaler", None) is not None:
            return  # gradients that overflow in float16 are the scaler's, which skips such updates
        if found is None:
            where = f"batch {numbers[0]}" if numbers else f"training step {module.trainer.global_step}"
            found = f"{where}{f' to {numbers[-1]}' if len(numbers) > 1 else ''}: the gradient, though no row's alone"
        raise ProblemError(
            f"training met a value that is not finite in {found}. No update was made with it; mend the contexts or the "
            "objective, or go on without such rows from the last checkpoint: not_finite: skip (--model.not_finite skip)"
        )

    def _without_bad_rows(self, module: AmortizedModule, a: Context, number: int) -> Tensor:
        before = [buffer.clone() for buffer in module.buffers()]
        signal = module.amortized_step(a)
        loss = signal.mean()
        if math.isfinite(loss.item()):
            return loss
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):  # running statistics
                buffer.copy_(value)
        N, good = num_rows(a), _signal_alone(module, a).isfinite()
        if len(good) != N:  # the loss draws rows
            good = evaluate(module, module(context_of(a)), context_of(a)).isfinite()
        bad = int((~good).sum())
        if not self.rows and bad:
            fault = _fault(module, Step(number, a, signal.detach()))
            warnings.warn(f"left out of training: {fault}; more are only counted, in train/skipped_rows", stacklevel=2)
        self.rows += bad
        if 0 < bad < N:
            # As many rows as before, for the sake of compiled code.
            row = torch.where(good, torch.arange(N, device=good.device), good.int().argmax())
            signal = module.amortized_step(take(a, row))
            return signal[good].mean() if len(signal) == N else signal.mean()
        return torch.nan * torch.stack([p.sum() for p in module.parameters() if p.requires_grad]).sum()


def _fault(module: AmortizedModule, step: Step) -> str | None:
    """The first row of a batch whose loss, or gradient, is not finite, in words."""
    a, signal = step.a, step.signal
    data = getattr(module.trainer, "datamodule", None)
    if a is None and isinstance(data, ContextDataModule):
        a = data.batch("train", step.number, module.device)
    loss = f"the loss ({type(module.loss).__name__})"
    if a is not None and len(signal) != num_rows(a):  # the loss draws rows
        signal, loss = evaluate(module, module(context_of(a)), context_of(a)).detach(), "the objective"
    bad = ~signal.isfinite()
    if bool(bad.any()):
        # Where a layer mixes rows, all of them may be NaN: that whose context is NaN comes first.
        missing = torch.zeros_like(bad) if a is None else _missing(a)
        row = int((bad & missing if bool((bad & missing).any()) else bad).int().argmax())
        value = float(signal[row])
        why = ", unbounded below: is a constraint missing?" if value == -math.inf else _of_context(a, row)
        return f"batch {step.number}, row {row}: {loss} is {value:g}{why}"
    if a is None or bool(_gradient_is_finite(module, a)):
        return None
    low, high = 0, num_rows(a)  # the fault is in rows [low, high): the first half that has one
    while high - low > 1:
        middle = (low + high) // 2
        if _gradient_is_finite(module, take(a, slice(low, middle))):
            low = middle
        else:
            high = middle
    return f"batch {step.number}, row {low}: the gradient, while {loss} is {float(signal[low]):g}{_of_context(a, low)}"


def _missing(a: Context) -> Tensor:
    """Rows of a context that hold NaN, ``(B,)``."""
    rows = [leaf.flatten(1).isnan().any(1) if leaf.ndim > 1 else leaf.isnan() for leaf in leaves(a)]
    return torch.stack(rows).any(0)


def _of_context(a: Context | None, row: int) -> str:
    return ", and its context holds NaN" if a is not None and bool(_missing(a)[row]) else ""


def _signal_alone(module: AmortizedModule, a: Context) -> Tensor:
    """The losses of rows that do not see each other: layers that mix them in training do not in evaluation."""
    training = module.training
    module.eval()  # no running statistics move either, and no layer waits for other processes
    with draws(stream_seed(0, "check", 0), module.device):
        signal = module.amortized_step(a)
    module.train(training)
    return signal


def _gradient_is_finite(module: AmortizedModule, a: Context) -> bool:
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(_signal_alone(module, a).mean(), parameters, allow_unused=True)
    return all(bool(g.isfinite().all()) for g in gradients if g is not None)
