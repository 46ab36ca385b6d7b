r"""Distributions and finite sets of contexts, as a LightningDataModule.

Contexts are a pure function of ``(seed, split, number of the batch)``. So every process, loader worker and resumed run
sees the same ones; training batches are dealt to processes in turn, evaluation batches too, each exactly once, without
padding; and the only state of the stream is how many batches training has used.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from amortized.problem import Context, ProblemError, leaves, map_leaves, num_rows, start_draws, take

_STREAMS = ("train", "val", "test", "order", "train noise", "val noise", "test noise", "predict noise")
_SHIFTED = "shifted "  # opens the name of a split of the shifted contexts
_BITS = 29  # of a 32-bit seed, for the number within a stream; 3 name the stream


def data_roots() -> list[Path]:
    """The directory that the environment variable AMORTIZED_DATA names, where data sets are looked for, if it is set."""
    given = os.environ.get("AMORTIZED_DATA")
    return [Path(given).expanduser()] if given else []


def stream_seed(seed: int, stream: str, number: int) -> int:
    """The 32-bit seed of one batch: for a given ``seed``, no two of all streams and numbers share one.

    Torch's CPU generator keeps only 32 bits of a seed, so hashes would collide after some 10^5 batches. Here 29 bits
    hold a permutation of the number.

    >>> len({stream_seed(0, "train", k) for k in range(10_000)} | {stream_seed(0, "val", k) for k in range(10_000)})
    20000
    """
    mask = (1 << _BITS) - 1
    if not 0 <= number <= mask:
        raise ValueError(f"batch number {number} is outside a stream's range, 0 to {mask}")
    key = (seed * 0x9E3779B97F4A7C15) % 2**64
    x = (number ^ key) & mask
    for multiplier in (0x2C1B3C6D, 0x297A2D39):  # odd, so that each round is a bijection of 29 bits
        x = (x ^ (x >> 15)) * multiplier & mask
        x = (x + (key >> 29)) & mask
    return _STREAMS.index(stream) << _BITS | (x ^ (x >> 14))


class Batch(NamedTuple):
    """A numbered batch on its way to the model; its contexts are there only if a loader worker drew them."""

    split: str
    number: int
    contexts: list[Any] | None = None
    complete: bool = True
    """Whether they are more than what ``sample`` drew."""


class ContextDataModule(LightningDataModule):
    """Contexts for training and evaluation.

    Subclass and write one of

    * ``sample(n, generator)``: a distribution ``p(a)``, drawn without end on the training device;
    * ``contexts(split)``: a finite set, a context of all N rows, or a map-style data set of single rows.

    Evaluation contexts are fixed and disjoint from training. Under several processes the Trainer needs
    ``use_distributed_sampler=False`` (the command line sets it).

    Args:
        batch_size: contexts in a training batch of one process.
        num_val: validation contexts, where they are sampled.
        num_test: test contexts, where they are sampled.
        eval_batch_size: contexts in an evaluation batch; whole batches are dealt to the processes.
        seed: of the contexts. Another seed gives other contexts, in every split.
        batches_per_step: context batches, each with an update of its own, in one training step of the Trainer.
        num_workers: loader processes, which draw on the CPU; 0 draws on the training device.
        predict: a file (.pt, .npy, .npz) of contexts to predict solutions for; ``None``: the test contexts.
        shifted: other contexts of the same kind, a data module of its own, whose test contexts a test measures too (and a
            ``validate`` its validation contexts): how the model generalises. With the same seed, and as many, they differ from
            the unshifted ones in their distribution alone. Of its settings those that say what its contexts are count.
    """

    def __init__(
        self,
        batch_size: int = 256,
        num_val: int = 1024,
        num_test: int = 1024,
        eval_batch_size: int = 256,
        seed: int = 0,
        batches_per_step: int = 1,
        num_workers: int = 0,
        predict: str | None = None,
        shifted: ContextDataModule | None = None,
    ) -> None:
        super().__init__()
        for name in ("batch_size", "num_val", "num_test", "eval_batch_size", "batches_per_step"):
            if locals()[name] < 1:
                raise ValueError(f"data.{name} must be at least 1; got {locals()[name]}")
        self.batch_size, self.eval_batch_size, self.batches_per_step = batch_size, eval_batch_size, batches_per_step
        self.num_rows = {"val": num_val, "test": num_test}
        self.seed, self.num_workers, self.predict, self.shifted = seed, num_workers, predict, shifted
        self.position = 0
        self._finite: dict[str, Context | Dataset | None] = {}
        self._order: tuple[int, Tensor] | None = None

    free_to_resume: tuple[str, ...] = ("num_workers", "num_test", "eval_batch_size", "predict", "shifted")
    """Settings that leave training what it is, so that a run may go on with others."""

    # ---- what a subclass writes

    def sample(self, n: int, generator: torch.Generator) -> Context:
        """Draw n contexts on ``generator.device``, with no other source of randomness than ``generator``."""
        raise ProblemError(f"{type(self).__name__} must write either sample(n, generator) or contexts(split)")

    def contexts(self, split: str) -> Context | Dataset | None:
        """The finite set of a split: all its rows, or a map-style data set of single rows; ``None`` samples without end."""
        return None if split == "train" else self.complete(self.sample(self.num_rows[split], self._generator(split, 0)))

    def complete(self, drawn: Any) -> Context:
        """The contexts of what ``sample`` drew, where a part of them is better worked out on the training device.

        Loader workers draw on the CPU alone; what a frozen network makes of a sample belongs here.
        """
        return drawn

    def augment(self, a: Context, generator: torch.Generator) -> Context:
        """A random change of training contexts from a finite set (crops, binarisation), with ``generator`` alone."""
        return a

    # ---- batches as a function of (seed, split, number)

    def batch(self, split: str, number: int, device: torch.device | str = "cpu") -> Context:
        """Batch ``number`` of a split.

        Training has no last batch: a finite set is passed through again and again, each time in a new order, every context
        once a pass; evaluation batches cover their set once, the last may be short.
        """
        contexts = self._set(split)
        if contexts is None:
            return self.complete(self._sampled(split, number, device))
        if not isinstance(contexts, Dataset):
            contexts = self._finite[split] = map_leaves(lambda leaf: leaf.to(device), contexts)
        if split == "train":
            a = _rows(contexts, self._shuffled(number, _size(contexts)), device)
            return self.augment(a, self._generator(split, number, device))
        every = torch.arange(_size(contexts))
        return _rows(contexts, every[number * self.eval_batch_size :][: self.eval_batch_size], device)

    def _sampled(self, split: str, number: int, device: torch.device | str) -> Any:
        return self.sample(self.batch_size, self._generator(split, number, device))

    def num_batches(self, split: str) -> int:
        """How many batches a finite split has for evaluation."""
        return -(-_size(self._set(split)) // self.eval_batch_size)

    def names(self, split: str, number: int) -> list[str]:
        """What the contexts of an evaluation batch are called, where their predictions are written as files."""
        first = number * self.eval_batch_size
        return [f"{row:06d}" for row in range(first, min(first + self.eval_batch_size, _size(self._set(split))))]

    def _generator(self, split: str, number: int, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(stream_seed(self.seed, split, number))

    def _set(self, split: str) -> Context | Dataset | None:
        if split not in self._finite:
            if split.startswith(_SHIFTED):
                assert self.shifted is not None
                self._finite[split] = self.shifted._set(split.removeprefix(_SHIFTED))
            elif split != "predict":
                self._finite[split] = self.contexts(split)
            elif self.predict is None:
                self._finite[split] = self._set("test")
            else:
                self._finite[split] = load_contexts(self.predict, like=self._set("test"))
            if self._finite[split] is not None and _size(self._finite[split]) == 0:
                raise ProblemError(f"{type(self).__name__}: the {split} split has no contexts")
        return self._finite[split]

    def _shuffled(self, number: int, n: int) -> Tensor:
        """Rows of training batch ``number``: a window of the endless sequence of shuffled passes."""
        start = number * self.batch_size
        parts, at = [], start
        while at < start + self.batch_size:
            turn, offset = divmod(at, n)
            if self._order is None or self._order[0] != turn:
                order = torch.randperm(
                    n, generator=torch.Generator().manual_seed(stream_seed(self.seed, "order", turn))
                )
                self._order = (turn, order)
            part = self._order[1][offset : offset + start + self.batch_size - at]
            parts.append(part)
            at += len(part)
        return torch.cat(parts)

    # ---- Lightning

    def prepare_data(self) -> None:
        if self.shifted is not None:
            self.shifted.prepare_data()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.position = 0
        if self.shifted is not None:
            self.shifted.setup(stage)

    def _deal(self, split: str) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if split == "train":
            together = world * self.batches_per_step
            if self.position % together:
                raise ProblemError(
                    f"training stopped after {self.position} batches, which {world} processes with batches_per_step="
                    f"{self.batches_per_step} cannot divide: resume with the number of processes it ran on"
                )
            batches = _Batches(self, split, self.position // together * world + rank, None, world)
        else:
            # A process with nothing to do gets one batch without rows: it must still meet the others at the end.
            batches = _Batches(self, split, rank, max(self.num_batches(split), rank + 1), world)
        if not self.num_workers:
            return batches
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> Any:
        return self._deal("train")

    def val_dataloader(self) -> Any:
        return self._with_shifted("val")

    def test_dataloader(self) -> Any:
        return self._with_shifted("test")

    def _with_shifted(self, split: str) -> Any:
        if self.shifted is None or (self.trainer is not None and self.trainer.state.fn == "fit"):
            return self._deal(split)
        return [self._deal(split), self._deal(_SHIFTED + split)]

    def predict_dataloader(self) -> Any:
        return self._deal("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the batch's contexts on the device, unless a worker did, and start the step's random numbers from its number."""
        if not isinstance(batch, Batch):
            return batch
        assert self.trainer is not None
        split, number, contexts, complete = batch
        device = self.trainer.strategy.root_device
        if contexts is None:
            contexts = self._each(split, number, self.batch, device)
        elif not complete:
            contexts = [self.complete(drawn) for drawn in contexts]
        if split == "train":
            world = self.trainer.world_size
            self.position = (number - self.trainer.global_rank + world) * self.batches_per_step
        start_draws(stream_seed(self.seed, f"{split.removeprefix(_SHIFTED)} noise", number), device)
        return contexts if len(contexts) > 1 else contexts[0]

    def _each(self, split: str, number: int, batch: Callable[..., Any], device: torch.device | str) -> list[Any]:
        K = self.batches_per_step if split == "train" else 1
        return [batch(split, number * K + k, device) for k in range(K)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class _Batches(IterableDataset):
    """Numbers ``start, start + stride, ...`` of a split; in a loader worker, their contexts too."""

    def __init__(self, data: ContextDataModule, split: str, start: int, stop: int | None, stride: int) -> None:
        self.data = copy.copy(data)
        self.data.trainer = None  # a worker needs the contexts, not the run
        self.split, self.start, self.stop, self.stride = split, start, stop, stride

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = self.start + (worker.id * self.stride if worker else 0)
        stride = self.stride * (worker.num_workers if worker else 1)
        while self.stop is None or number < self.stop:
            yield self._drawn(number) if worker else Batch(self.split, number)
            number += stride

    def _drawn(self, number: int) -> Batch:
        # Endless training contexts are completed on the training device; all that is evaluated comes whole.
        sampled = self.split == "train" and self.data._set("train") is None
        batch = self.data._sampled if sampled else self.data.batch
        return Batch(self.split, number, self.data._each(self.split, number, batch, "cpu"), not sampled)

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("training contexts have no end")
        return len(range(self.start, self.stop, self.stride))


def _size(contexts: Context | Dataset) -> int:
    return len(contexts) if isinstance(contexts, Dataset) else num_rows(contexts)  # type: ignore[arg-type]


def _rows(contexts: Context | Dataset, index: Tensor, device: torch.device | str) -> Context:
    if isinstance(contexts, Dataset):
        a = default_collate([contexts[i] for i in index.tolist() or [0]])
        return map_leaves(lambda leaf: leaf[: len(index)].to(device), a)
    return take(contexts, index.to(device))


def load_contexts(path: str | Path, like: Context) -> Context:
    """Read contexts from a file: ``.pt`` or ``.npy`` for a tensor, ``.pt`` (a dict) or ``.npz`` for a ``NamedTuple``.

    Args:
        path: the file.
        like: a context of the expected fields, shapes (but for the leading dimension) and types.

    Raises:
        ProblemError: if the file is missing, unreadable, or its contexts have another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ProblemError(f"no such file of contexts: {path}")
    try:
        saved: Any = torch.load(path, weights_only=True) if path.suffix == ".pt" else np.load(path, allow_pickle=False)
        if not isinstance(saved, Tensor | np.ndarray):
            saved = {key: torch.as_tensor(saved[key]) for key in saved}
    except Exception as error:
        raise ProblemError(f"{path} is no readable .pt, .npy or .npz file of contexts: {error}") from error
    expected = leaves(like)
    if isinstance(saved, dict):
        names = getattr(like, "_fields", ())
        if set(saved) != set(names):
            raise ProblemError(
                f"{path} has the fields {sorted(saved)}; the contexts have {list(names) or 'none (a tensor)'}"
            )
        given = [saved[name] for name in names]
    else:
        given = [torch.as_tensor(saved)]
    shapes = [tuple(leaf.shape[1:]) for leaf in given]
    if shapes != [tuple(leaf.shape[1:]) for leaf in expected]:
        raise ProblemError(
            f"{path} has contexts of shape {', '.join(str(('B', *s)) for s in shapes)}; expected "
            f"{', '.join(str(('B', *leaf.shape[1:])) for leaf in expected)}"
        )
    given = [g.to(e.dtype) for g, e in zip(given, expected, strict=True)]
    return type(like)(*given) if isinstance(saved, dict) else given[0]
