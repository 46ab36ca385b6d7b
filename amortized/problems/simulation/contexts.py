"""Simulations as contexts: without end, so many once and for all, or from a file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amortized.contexts import ContextDataModule, load_contexts
from amortized.contract import ProblemError, num_rows, take
from amortized.problems.simulation.simulators import Simulator


class Simulation(NamedTuple):
    """An observation, the parameters that made it and, where the simulator has them, draws of the true posterior."""

    x: Tensor
    """``(B, *)``: all that a network sees."""
    theta: Tensor
    """``(B, d)``, one draw of ``p(theta | x)``: the one that the simulator was run with."""
    draws: Tensor
    """``(B, K, d)`` more of them; K = 0 in training, and where nobody has any."""


class Simulations(ContextDataModule):
    """Draws of ``p(theta) p(x | theta)``: :class:`Simulation`. A row that failed (NaN or infinite) is drawn anew, and counted.

    Training has simulations without end, or ``simulations`` of them, the same for a seed; validation and test draw their
    own. Or all are those of a ``file``, the first ``num_val`` and ``num_test`` of them for validation and test; failed ones
    are left out. Validation and test have ``draws`` of the true posterior for each observation, where the simulator has them.

    Args:
        simulator: the prior and the simulator.
        simulations: number of training simulations, passed through again and again; ``None``: without end.
        file: of simulations, ``.npz`` or ``.pt`` with ``theta`` ``(N, d)`` and ``x`` ``(N, *)``.
        draws: K, of the true posterior, for each validation and test context.
        **kwargs: see :class:`~amortized.ContextDataModule`. A file to ``predict`` for holds ``x`` alone (``.npy``, or ``.npz``
            with a field ``x``), or simulations.
    """

    def __init__(
        self,
        simulator: Simulator,
        simulations: int | None = None,
        file: str | None = None,
        draws: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if simulations is not None and file is not None:
            raise ValueError("Simulations: give either a number of `simulations` or a `file` of them, not both")
        if draws < 0 or (simulations is not None and simulations < 1):
            raise ValueError(f"Simulations: simulations and draws count something; got {simulations} and {draws}")
        self.simulator, self.simulations, self.file, self.draws = simulator, simulations, file, draws
        self.simulated, self.failed = 0, 0
        """Rows that were drawn so far, or read, and how many of those were not finite."""

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Simulation:
        simulator = self.simulator.to(generator.device)
        theta = simulator.prior.sample(n, generator)
        x = simulator.simulate(theta, generator)
        self.simulated += n
        failed = ~(x.flatten(1).isfinite().all(1) & theta.isfinite().all(1))
        for _ in range(1000):
            count = int(failed.sum())
            if not count:
                return _alone(x, theta)
            self.simulated, self.failed = self.simulated + count, self.failed + count
            theta[failed] = simulator.prior.sample(count, generator)
            x[failed] = simulator.simulate(theta[failed], generator)
            failed = ~(x.flatten(1).isfinite().all(1) & theta.isfinite().all(1))
        raise ProblemError(
            f"{type(simulator).__name__}: {count} of {n} simulations are not finite, and were not in 1,000 further attempts"
        )

    def contexts(self, split: str) -> Simulation | None:
        generator = self._generator(split, 0)
        if self.file is not None:
            a = take(self._recorded, self._part(split))
        elif split != "train":
            a = self.sample(self.num_rows[split], generator)
        else:
            return None if self.simulations is None else self.sample(self.simulations, generator)
        draws = self.simulator.posterior(a.x, self.draws, generator) if split != "train" and self.draws else None
        return a if draws is None else a._replace(draws=draws)

    def _part(self, split: str) -> slice:
        rows, val, test = num_rows(self._recorded), *self.num_rows.values()
        if rows <= val + test:
            raise ProblemError(
                f"{self.file} has {rows} good simulations, too few for num_val={val} and num_test={test}"
            )
        return {"train": slice(val + test, None), "val": slice(0, val), "test": slice(val, val + test)}[split]

    @functools.cached_property
    def _recorded(self) -> Simulation:
        """The good rows of the file."""
        assert self.file is not None
        fields = load_contexts(self.file, like=_Recorded(*self._like))
        finite = fields.theta.isfinite().all(1) & fields.x.flatten(1).isfinite().all(1)
        self.simulated, self.failed = len(finite), int((~finite).sum())
        outside = int((~self.simulator.prior.contains(fields.theta[finite])).sum())
        if outside:
            raise ProblemError(f"{self.file}: {outside} of {int(finite.sum())} theta are outside the prior's support")
        return _alone(fields.x[finite], fields.theta[finite])

    @property
    def _like(self) -> tuple[Tensor, Tensor]:
        return torch.empty(1, self.simulator.prior.dimension), torch.empty(1, *self.simulator.shape)

    def read(self, path: str) -> Simulation:
        """Observations to predict for; their theta is NaN where the file does not have it."""
        theta, x = self._like
        npz = Path(path).suffix == ".npz" and Path(path).is_file()
        if npz and "theta" in np.load(path):
            fields = load_contexts(path, like=_Recorded(theta, x))
            return _alone(fields.x, fields.theta)
        found = load_contexts(path, like=_Observed(x) if npz else x)
        x = found.x if npz else found
        return _alone(x, x.new_full((len(x), theta.shape[1]), torch.nan))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"simulated": self.simulated, "failed": self.failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.simulated, self.failed = state["simulated"], state["failed"]


def _alone(x: Tensor, theta: Tensor) -> Simulation:
    """Without draws of the true posterior."""
    return Simulation(x, theta, theta.new_empty(len(theta), 0, theta.shape[1]))


class _Recorded(NamedTuple):
    theta: Tensor
    x: Tensor


class _Observed(NamedTuple):
    x: Tensor
