r"""How many are right, and whether confidence is deserved: what the gap of a classifier does not say.

The class predicted is the most probable one, and its probability the confidence ``c_i``. With the predictions sorted by
confidence into M equal bins, the expected calibration error is

    ``ECE = sum_m (n_m / N) |accuracy_m - confidence_m|``.

Targets that are smoothed by a share s ask for a confidence of ``1 - 0.9 s`` where no doubt is left, which is part of that error.

Source: Guo et al. (2017), *On calibration of modern neural networks*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from amortized.contract import of_every_process
from amortized.problems.classification.problem import Classification, Labelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Accuracy(Callback):
    """Measures a classifier at a test, into ``classification`` of ``results.json``, the table, and two pictures.

    * ``accuracy``: the share of test images whose most probable class is their label's;
    * ``calibration_error``: the expected calibration error; ``confidence``: the mean probability of the class predicted;
    * ``worst_class``, ``worst_class_accuracy``: the class of which the least are recognised, and their share;
    * ``images``: how many.

    Args:
        bins: M, of the calibration error and the reliability diagram.

    Raises:
        TypeError: if the module is no :class:`~amortized.problems.Classification`.
    """

    name = "classification"
    captions: ClassVar = {
        "confusions": (
            "Confusions",
            "Of the images of each class (rows), the percentage taken for each (columns). The diagonal is what was recognised.",
        ),
        "reliability": (
            "Reliability",
            "How many predictions of each confidence are right, against that confidence: on the diagonal, 90 % means 90 %. Below "
            "it the classifier is too sure. Grey: the share of predictions; bins of fewer than ten have no point.",
        ),
    }

    def __init__(self, bins: int = 15) -> None:
        if bins < 2:
            raise ValueError(f"Accuracy: bins must be at least 2; got {bins}")
        self.bins = bins
        self.results: dict[str, Any] = {}
        self._found: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Classification):
            raise TypeError(f"Accuracy measures a Classification; {type(pl_module).__name__} is none")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._found = {}, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Labelled,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not dataloader_idx and len(outputs):
            self._found.append((outputs.float().softmax(1).cpu(), batch.target.argmax(1).cpu()))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = of_every_process(self._found, trainer.world_size)
        parts = [part for found in every for part in found]
        if not parts:
            return
        p, label = (torch.cat(rows) for rows in zip(*parts, strict=True))
        classes = p.shape[1]
        named = getattr(getattr(trainer, "datamodule", None), "classes", None)
        self.classes = named or tuple(map(str, range(classes)))
        self.confidence, predicted = p.max(1)
        self.right = predicted == label
        counts = multiclass_confusion_matrix(predicted, label, classes)
        self.confusions = counts / counts.sum(1, keepdim=True).clamp(min=1)
        recognised = self.confusions.diagonal()
        worst = int(torch.where(counts.any(1), recognised, torch.inf).argmin())
        self.results = {
            "accuracy": float(multiclass_accuracy(predicted, label, classes, average="micro")),
            "calibration_error": float(multiclass_calibration_error(p, label, classes, n_bins=self.bins)),
            "confidence": float(self.confidence.mean()),
            "worst_class": self.classes[worst],
            "worst_class_accuracy": float(recognised[worst]),
            "images": len(p),
        }

    def lines(self) -> list[tuple[str, str]]:
        """For the table."""
        r = self.results
        return [
            ("accuracy", f"{r['accuracy']:.2%} of {r['images']} images"),
            (f"    of {r['worst_class']}, the least", f"{r['worst_class_accuracy']:.2%}"),
            ("expected calibration error", f"{r['calibration_error']:.4f} (mean confidence {r['confidence']:.2%})"),
        ]

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """Confusions and reliability."""
        return {"confusions": self._draw_confusions, "reliability": self._draw_reliability}

    def _draw_confusions(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 6), layout="constrained")
        axes = figure.subplots()
        share = 100 * self.confusions
        axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=10)
        for i, row in enumerate(share.tolist()):
            for j, x in enumerate(row):
                if x >= 0.05:
                    axes.text(j, i, f"{x:.1f}", ha="center", va="center", size=8, color="w" if x > 40 else "k")
        places = range(len(self.classes))
        axes.set_xticks(places, self.classes, rotation=45, ha="right")
        axes.set_yticks(places, self.classes)
        axes.set(xlabel="taken for", ylabel="is")
        return figure

    def _draw_reliability(self) -> Figure:
        from matplotlib.figure import Figure

        at = (self.confidence * self.bins).long().clamp(max=self.bins - 1)
        count = torch.bincount(at, minlength=self.bins)
        used = count >= 10
        accuracy, confidence = (
            (torch.bincount(at, x.double(), self.bins) / count)[used].tolist() for x in (self.right, self.confidence)
        )
        figure = Figure(figsize=(5, 4.2), layout="constrained")
        axes = figure.subplots()
        edges = torch.linspace(0, 1, self.bins + 1)[:-1].tolist()
        axes.bar(edges, (count / count.sum()).tolist(), 1 / self.bins, align="edge", color="0.85")
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axes.plot(confidence, accuracy, "o-", color="C3", markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share that is right")
        return figure
