r"""Distributions and finite sets of contexts, as a LightningDataModule.

Contexts are a pure function of ``(seed, split, number of the batch)``. So every process, loader worker and resumed run
sees the same ones; training batches are dealt to processes in turn, evaluation batches too, each exactly once, without
padding; and the only state of the stream is how many batches training has used: it goes on there with every new epoch.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from amortized.contexts.files import FileRows, open_contexts
from amortized.contexts.solutions import SolutionSet, SolvedRows
from amortized.contract import (
    Context,
    ProblemError,
    Solved,
    check_context,
    check_seed,
    leaves,
    map_leaves,
    num_rows,
    start_draws,
    stream_seed,
    take,
)
from amortized.contract.faults import describe

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Of a run whose module is not in float32, by the Trainer's ``precision``."""


def evaluation_names(trainer: Trainer) -> list[str]:
    """What the sets are called that a Trainer evaluates now: ``""`` is the data's own, then its ``evaluations``."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    count = len(loaders) if isinstance(loaders, list | tuple) else 1
    named = getattr(getattr(trainer, "datamodule", None), "evaluations", {})
    return ["", *(named if len(named) == count - 1 else map(str, range(1, count)))]


def in_precision(a: Context, dtype: torch.dtype) -> Context:
    """The contexts of a run whose module is in another dtype."""
    return map_leaves(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, a)


def data_roots() -> list[Path]:
    """The directory that the environment variable AMORTIZED_DATA names, where data sets are looked for, if it is set."""
    given = os.environ.get("AMORTIZED_DATA")
    return [Path(given).expanduser()] if given else []


class Batch(NamedTuple):
    """A numbered batch on its way to the model; its contexts are there only if a loader worker drew them."""

    split: str
    number: int
    contexts: list[Any] | ProblemError | None = None
    """Also the fault that kept the worker from drawing them."""
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
        seed: of the contexts, 0 to 2^32 - 1. Another seed gives other contexts, in every split.
        batches_per_step: context batches, each with an update of its own, in one training step of the Trainer.
        num_workers: loader processes, which draw on the CPU; 0 draws on the training device.
        predict: a file of contexts to predict solutions for, see :func:`~amortized.contexts.files.load_contexts`; ``None``:
            the test contexts.
        evaluations: further sets of contexts of the same kind by name (``shifted``, ``large``), each a data module of its own,
            whose test contexts a test measures too (and a ``validate`` its validation contexts): how the model generalises.
            With the same seed, and as many, they differ from the data's own in their distribution alone. Of their settings
            those that say what the contexts are count.
        solutions: a folder of solved contexts, or a :class:`~amortized.contexts.SolutionSet`: training is on these in place of
            those drawn, as they are there (not augmented), and its loss may use their solutions:
            :class:`~amortized.RegressionLoss`. ``None``: no solution is known.
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
        evaluations: dict[str, ContextDataModule] | None = None,
        solutions: str | SolutionSet | None = None,
    ) -> None:
        super().__init__()
        for name in ("batch_size", "num_val", "num_test", "eval_batch_size", "batches_per_step"):
            if locals()[name] < 1:
                raise ValueError(f"data.{name} must be at least 1; got {locals()[name]}")
        try:
            self.seed = check_seed(seed)
        except ValueError as error:
            raise ValueError(f"data.seed: {error}") from None
        self.batch_size, self.eval_batch_size, self.batches_per_step = batch_size, eval_batch_size, batches_per_step
        self.num_rows = {"val": num_val, "test": num_test}
        self.num_workers, self.predict = num_workers, predict
        self.evaluations = evaluations or {}
        self.solutions = SolutionSet(solutions) if isinstance(solutions, str) else solutions
        if wrong := [name for name in self.evaluations if not name.isidentifier()]:
            raise ValueError(f"data.evaluations: {wrong[0]!r} is no name; a name has letters, digits and _ alone")
        self.position = 0
        self.fit_needs: tuple[str, ...] = ("train", "val")
        self.predict_batches: Sequence[int] | None = None
        """Numbers of the batches that this process predicts for; ``None``: its share of all."""
        self._finite: dict[str, Context | Dataset | None] = {}
        self._order: tuple[int, Tensor] | None = None

    free_to_resume: tuple[str, ...] = ("num_workers", "num_test", "eval_batch_size", "predict", "evaluations")
    """Settings that leave training what it is, so that a run may go on with others."""

    # ---- what a subclass writes

    def sample(self, n: int, generator: torch.Generator) -> Context:
        """Draw n contexts on ``generator.device``, with no other source of randomness than ``generator``."""
        raise ProblemError(f"{type(self).__name__} must write either sample(n, generator) or contexts(split)")

    def contexts(self, split: str) -> Context | Dataset | None:
        """The finite set of a split: all its rows, or a map-style data set of single rows; ``None`` samples without end."""
        return None if split == "train" else self._sampled(split, 0, self.num_rows[split])

    def complete(self, drawn: Any) -> Context:
        """The contexts of what ``sample`` drew, where a part of them is better worked out on the training device.

        Loader workers draw on the CPU alone; what a frozen network makes of a sample belongs here.
        """
        return drawn

    def read(self, path: str) -> Context | Dataset:
        """The contexts of a file to predict solutions for: all its rows, or a data set of them."""
        return open_contexts(path, like=self._rows("test", self._set("test"), torch.arange(1), "cpu"))

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
            return self._sampled(split, number, self.batch_size, device)
        if not isinstance(contexts, Dataset):
            contexts = self._finite[split] = map_leaves(lambda leaf: leaf.to(device), contexts)
        if split == "train":
            a = self._rows(split, contexts, self._shuffled(number, _size(contexts)), device)
            if isinstance(a, Solved):
                return a
            augmented = self._ask("augment", a, self._generator(split, number, device))
            return check_context(augmented, f"{type(self).__name__}.augment")
        first, n = number * self.eval_batch_size, _size(contexts)
        index = torch.arange(min(first, n), min(first + self.eval_batch_size, n))
        return self._rows(split, contexts, index, device)

    def _drawn(self, split: str, number: int, n: int, device: torch.device | str = "cpu") -> Any:
        """What ``sample`` draws, still to be completed."""
        return self._ask("sample", n, self._generator(split, number, device))

    def _sampled(self, split: str, number: int, n: int, device: torch.device | str = "cpu") -> Context:
        return self._completed(self._drawn(split, number, n, device), n)

    def produce(self, number: int, n: int, device: torch.device | str = "cpu") -> Context:
        """Batch ``number`` of contexts without end, apart from those of training and evaluation: ``n`` of them."""
        return self._sampled("produce", number, n, device)

    def _completed(self, drawn: Any, n: int) -> Context:
        return check_context(self._ask("complete", drawn), f"{type(self).__name__}.sample({n}, generator)", n)

    def _ask(self, method: str, *given: Any) -> Any:
        """What a method that a subclass may write returns; a fault in it is told in one line."""
        try:
            return getattr(self, method)(*given)
        except ProblemError:
            raise
        except Exception as error:
            shown = ", ".join(repr(x) if isinstance(x, str | int) else "..." for x in given)
            raise ProblemError(
                f"{type(self).__name__}.{method}({shown}) fails: {describe(error)}; AMORTIZED_DEBUG=1 shows all"
            ) from error

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
            if " " in split:
                name, own = split.split()
                self._finite[split] = self.evaluations[name]._set(own)
            elif split == "solve":  # training's own contexts, where their solutions are still sought
                self._finite[split] = self._checked("train")
            elif split == "train" and self.solutions is not None:
                like = self._rows("val", self._set("val"), torch.arange(1), "cpu")
                self._finite[split] = self.solutions.open(self, like)
            elif split != "predict":
                self._finite[split] = self._checked(split)
            elif self.predict is None:
                self._finite[split] = self._set("test")
            else:
                self._finite[split] = self.read(self.predict)
            if self._finite[split] is not None and _size(self._finite[split]) == 0:
                raise ProblemError(f"{type(self).__name__}: the {split} split has no contexts")
        return self._finite[split]

    def _checked(self, split: str) -> Context | Dataset | None:
        """What the subclass has for a split, checked."""
        where, found = f"{type(self).__name__}.contexts({split!r})", self._ask("contexts", split)
        if found is None and split != "train":
            raise ProblemError(
                f"{where} gives None, but evaluation needs a finite set; `return super().contexts({split!r})` samples one"
            )
        if isinstance(found, Dataset):
            try:
                empty = len(found) == 0  # type: ignore[arg-type]
            except Exception as error:
                raise ProblemError(
                    f"{where} gives a {type(found).__name__} whose length is not known ({describe(error)}): write a map-style "
                    "data set (__len__ and __getitem__) of single rows, or sample(n, generator) for contexts without end"
                ) from error
            if not empty:
                self._rows(split, found, torch.arange(1), "cpu")
        elif found is not None:
            check_context(found, where)
        return found

    def _rows(self, split: str, contexts: Context | Dataset, index: Tensor, device: torch.device | str) -> Context:
        """The rows of a finite set that ``index`` names."""
        if not isinstance(contexts, Dataset):
            return take(contexts, index.to(device))
        if isinstance(contexts, SolvedRows | FileRows):
            return map_leaves(lambda leaf: leaf.to(device), contexts.take(index))
        kind = f"{type(self).__name__}.contexts({split!r}), a {type(contexts).__name__}"
        try:
            a = default_collate([contexts[i] for i in index.tolist() or [0]])
        except Exception as error:
            raise ProblemError(f"{kind}, fails: {describe(error)}; AMORTIZED_DEBUG=1 shows all") from error
        return map_leaves(lambda leaf: leaf[: len(index)].to(device), check_context(a, f"the rows of {kind}"))

    def check_sample(self) -> None:
        """Check that ``sample`` draws from its generator, and from nothing else.

        Raises:
            ProblemError: if the same generator gives other contexts, or every generator the same.
        """
        generators = [self._generator("train", number) for number in (0, 0, 1)]
        states = [generator.get_state() for generator in generators]
        name, n = f"{type(self).__name__}.sample", self.batch_size
        drawn = [self._ask("sample", n, generator) for generator in generators]
        if type(self).complete is ContextDataModule.complete:
            check_context(drawn[0], f"{name}({n}, generator)", n)
        one, again, other = map(leaves, drawn)
        if not all(map(_equal, one, again)):
            raise ProblemError(
                f"{name} gives other contexts for the same generator: draw with the generator that it is given alone, "
                "as in torch.randn(n, 3, generator=generator, device=generator.device)"
            )
        if all(map(_equal, one, other)) and torch.equal(generators[0].get_state(), states[0]):
            raise ProblemError(
                f"{name} ignores its generator, so that every batch is the same: draw with it, as in torch.randn(n, 3, "
                "generator=generator, device=generator.device); or write contexts(split) for a finite set"
            )

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
        if self.solutions is not None and self.trainer is not None and self.trainer.state.fn == "fit":
            self.solutions.prepare(self)
        for data in self.evaluations.values():
            data.prepare_data()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.position = 0
            for split in self.fit_needs:  # what is wrong with them is better known now than after hours
                loader = f"{split}_dataloader"
                if getattr(type(self), loader) is getattr(ContextDataModule, loader) and self._set(split) is None:
                    self.check_sample()
        for data in self.evaluations.values():
            data.setup(stage)

    def _deal(self, split: str) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if split == "train":
            together = world * self.batches_per_step
            if self.position % together:
                raise ProblemError(
                    f"training stopped after {self.position} batches, which {world} processes with batches_per_step="
                    f"{self.batches_per_step} cannot divide: resume with the number of processes it ran on"
                )
            overfit = self.trainer.overfit_batches if self.trainer else 0  # type: ignore[attr-defined]
            batches = _Batches(self, split, rank, world, None, overfit if isinstance(overfit, int) else 0)
        else:
            n = self.num_batches(split)
            chosen = self.predict_batches if split == "predict" else None
            # A process with nothing to do gets one batch without rows: it must still meet the others at the end.
            batches = _Batches(self, split, rank, world, (range(rank, n, world) if chosen is None else chosen) or [n])
        if not self.num_workers:
            return batches
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> Any:
        return self._deal("train")

    def val_dataloader(self) -> Any:
        return self._with_evaluations("val")

    def test_dataloader(self) -> Any:
        return self._with_evaluations("test")

    def _with_evaluations(self, split: str) -> Any:
        if not self.evaluations or (self.trainer is not None and self.trainer.state.fn == "fit"):
            return self._deal(split)
        return [self._deal(split), *(self._deal(f"{name} {split}") for name in self.evaluations)]

    def predict_dataloader(self) -> Any:
        return self._deal("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw the batch's contexts on the device, unless a worker did, and start the step's random numbers from its number."""
        if not isinstance(batch, Batch):
            return batch
        assert self.trainer is not None
        split, number, contexts, complete = batch
        device = self.trainer.strategy.root_device
        if isinstance(contexts, ProblemError):
            raise contexts
        if contexts is None:
            contexts = self._each(split, number, self.batch, device)
        elif not complete:
            contexts = [self._completed(drawn, self.batch_size) for drawn in contexts]
        if dtype := DTYPES.get(self.trainer.precision):
            contexts = [in_precision(a, dtype) for a in contexts]
        if split == "train":
            world = self.trainer.world_size
            self.position = (number - self.trainer.global_rank + world) * self.batches_per_step
        start_draws(stream_seed(self.seed, f"{split.split()[-1]} noise", number), device)
        return contexts if len(contexts) > 1 else contexts[0]

    def _each(self, split: str, number: int, batch: Callable[..., Any], device: torch.device | str) -> list[Any]:
        K = self.batches_per_step if split == "train" else 1
        return [batch(split, number * K + k, device=device) for k in range(K)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class _Batches(IterableDataset):
    """Numbers of a split's batches for one process; in a loader worker, their contexts too.

    Each iterator over training begins at the data's position, for Lightning makes a new one with every epoch. Those of
    ``overfit_batches`` are the same ``repeat`` batches of the process again and again.
    """

    def __init__(
        self,
        data: ContextDataModule,
        split: str,
        rank: int,
        world: int,
        numbers: Sequence[int] | None,
        repeat: int = 0,
    ) -> None:
        self.data, self.split, self.rank, self.world = data, split, rank, world
        self.numbers, self.repeat = numbers, repeat

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: it needs the contexts, not the run."""
        data = copy.copy(self.data)
        data.trainer = None
        return {**self.__dict__, "data": data}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.islice(self._all(), mine, None, of):
            yield self._drawn(number) if worker else Batch(self.split, number)

    def _all(self) -> Iterable[int]:
        """The numbers for this process, whichever of its workers draws them."""
        if self.numbers is not None:
            return self.numbers
        used = self.data.position // self.data.batches_per_step
        return itertools.count(self.rank + (used % (self.repeat * self.world) if self.repeat else used), self.world)

    def _drawn(self, number: int) -> Batch:
        # Endless training contexts are completed on the training device; all that is evaluated comes whole.
        sampled = self.split == "train" and self.data._set("train") is None
        draw = functools.partial(self.data._drawn, n=self.data.batch_size) if sampled else self.data.batch
        try:
            return Batch(self.split, number, self.data._each(self.split, number, draw, "cpu"), not sampled)
        except ProblemError as error:
            return Batch(self.split, number, error)

    def __len__(self) -> int:
        if self.numbers is None:
            raise TypeError("training contexts have no end")
        return len(self.numbers)


def _size(contexts: Context | Dataset) -> int:
    return len(contexts) if isinstance(contexts, Dataset) else num_rows(contexts)  # type: ignore[arg-type]


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(torch.isclose(x, y, rtol=0, atol=0, equal_nan=True).all())
