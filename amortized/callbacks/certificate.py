"""The certificate of predictions: calibrated after training, and at a test how often it holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from amortized.callbacks.gap import GapMonitor, numbered
from amortized.certificates import Certificate
from amortized.certificates.conformal import ASSUMPTION, coverage
from amortized.contexts.data_module import ContextDataModule
from amortized.contract import of_every_process
from amortized.evaluation.calibration import ALPHA, CONTEXTS, Calibration, calibrate_model, proof_for
from amortized.module import AmortizedModule


class CertificateMonitor(Callback):
    """After training, calibrates a bound on the gap on validation contexts; at a test, measures how often it holds.

    The bound is conformal: see :mod:`amortized.certificates.conformal`. It is stored in the last checkpoint, and what is
    loaded from there answers with it (:func:`amortized.load`).

    Args:
        alpha: the fraction of contexts on which the bound may fail.
        contexts: validation contexts to calibrate on, at most.
        enabled: whether to calibrate after training.
    """

    name = "certificate"

    def __init__(self, alpha: float = ALPHA, contexts: int = CONTEXTS, enabled: bool = True) -> None:
        if not 0 < alpha < 1 or contexts < 1:
            raise ValueError(f"certificate.alpha must be in (0, 1) and contexts at least 1; got {alpha} and {contexts}")
        self.alpha, self.contexts, self.enabled = alpha, contexts, enabled
        self.calibration: Calibration | None = None
        self.results: dict[str, Any] = {}
        self.captions: dict[str, tuple[str, str]] = {}
        self._certificate: Certificate | None = None
        self._bounds: list[tuple[Tensor, Tensor]] = []

    def calibrate(
        self, trainer: Trainer, module: AmortizedModule, data: ContextDataModule, gap: GapMonitor
    ) -> Calibration:
        """Calibrate the trained module; every process finds the same."""
        device = module.device
        try:
            module.to(trainer.strategy.root_device)
            self.calibration = calibrate_model(module, data, gap.solver, self.alpha, self.contexts)
        finally:
            module.to(device)
        return self.calibration

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._bounds = {}, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.calibration is not None and dataloader_idx == 0:
            _, index = numbered(trainer, batch_idx, outputs)
            self._certificate = proof_for(pl_module) or self.calibration.network  # type: ignore[arg-type]
            bound = self._certificate.bound(pl_module, outputs, batch)
            self._bounds.append((index.cpu(), bound.double().cpu()))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gap = next((c for c in trainer.callbacks if isinstance(c, GapMonitor)), None)  # type: ignore[attr-defined]
        if self.calibration is None or gap is None or self._certificate is None:
            return
        parts = of_every_process(self._bounds, trainer.world_size)
        index, bound = (torch.cat(column) for column in zip(*sum(parts, []), strict=True))
        rows = gap.table
        at = torch.searchsorted(rows.index.cpu().contiguous(), index.double())
        found = rows.gap.cpu()[at]
        known = found.isfinite()
        network = self.calibration.network
        size = rows.network.cpu()[at][known].abs()
        self.results = {
            "kind": self._certificate.kind,
            "alpha": network.alpha,
            "calibrated_on": network.n,
            "assumption": ASSUMPTION,
            "contexts": int(known.sum()),
            # Up to 1e-6 of the objective, or of its mean size where that is more: so far the reference is feasible, and rounded.
            **coverage(bound[known] + 1e-6 * size.clamp(min=float(size.nanmean())), found[known]),
            "median": float(bound[known].median()) if known.any() else None,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values for the table."""
        r = self.results
        share = "every context"
        if r["kind"] == "conformal":  # of another calibration the share would be another one
            chance = 1.96 * math.sqrt(r["alpha"] * (1 - r["alpha"]) / max(r["calibrated_on"], 1))
            share = f"{1 - r['alpha']:.0%} ± {chance:.0%} of contexts"
        label = f"certificate, {r['kind']}, {share}: median"
        median = r["median"]
        return [
            (label, "unknown" if median is None or median == float("inf") else f"{median:.4g}"),
            (
                f"    holds, of {r['contexts']} test contexts (95 % interval)",
                f"{r['coverage']:.1%} ({r['low']:.1%} to {r['high']:.1%})",
            ),
        ]

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """None."""
        return {}
