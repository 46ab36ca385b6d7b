"""Small problems that the tests of the core share; their minima are known in closed form."""

from typing import NamedTuple

import numpy as np
import torch
from lightning import Callback
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset

from amortized import AmortizedModule, ContextDataModule
from amortized.callbacks import GapMonitor
from amortized.contract import QuadraticProgram, stream_seed


class Quadratic(AmortizedModule):
    """``L(b; a) = |b - 2 a|^2 + 1 + noise * <eps, b - 2 a>``, minimal at ``2 a`` with value 1."""

    def __init__(self, dim: int = 3, noise: float = 0.0, dropout: float = 0.0, batch_norm: bool = False, **kwargs):
        layers = [nn.Linear(dim, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, dim)]
        super().__init__(nn.Sequential(*([nn.BatchNorm1d(dim)] if batch_norm else []), *layers), **kwargs)
        self.noise = noise

    def objective(self, b, a):
        off = b - 2 * a
        value = off.square().sum(1) + 1
        return value + self.noise * (torch.randn_like(off) * off).sum(1) if self.noise else value

    def optimum(self, a):
        return torch.ones(len(a))


class Filed(Quadratic):
    """Writes a file for each prediction."""

    def save(self, decoded, paths):
        files = [path.with_suffix(".npy") for path in paths]
        for file, row in zip(files, decoded, strict=True):
            np.save(file, row.cpu().numpy())
        return files


class Mixing(Quadratic):
    """Its objective breaks the contract."""

    def objective(self, b, a):
        return super().objective(b - b.mean(0), a)


class Drawn(Quadratic):
    """With a picture: four panels, as many contexts in them as there are."""

    def draw(self, a, solutions):
        figure = Figure(figsize=(6, 2))
        for i, axes in zip(range(len(a)), figure.subplots(1, 4), strict=False):
            for b in solutions.values():
                axes.plot(b[i].cpu(), "o")
        return figure


class Gaussians(ContextDataModule):
    """``a ~ N(0, I)``, without end."""

    def __init__(self, dim: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim

    def sample(self, n, generator):
        return torch.randn(n, self.dim, generator=generator, device=generator.device)


class Completed(Gaussians):
    """The same contexts, of which ``sample`` draws the halves."""

    def sample(self, n, generator):
        return super().sample(n, generator) / 2

    def complete(self, drawn):
        return 2 * drawn


class FiniteGaussians(ContextDataModule):
    """A finite set: N training contexts, 833 (indivisible) for evaluation, of standard deviation ``scale``."""

    def __init__(self, dim: int = 3, num_train: int = 100, num_eval: int = 833, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.scale = dim, scale
        self.sizes = {"train": num_train, "val": num_eval, "test": num_eval}

    def contexts(self, split):
        seed = ("train", "val", "test").index(split)
        return self.scale * torch.randn(self.sizes[split], self.dim, generator=torch.Generator().manual_seed(seed))

    def augment(self, a, generator):
        return a + 0.01 * torch.randn(a.shape, generator=generator, device=generator.device)


class FailingLate(FiniteGaussians):
    """A fault in the sixth training batch."""

    def augment(self, a, generator):
        if generator.initial_seed() == stream_seed(self.seed, "train", 5):
            raise ValueError("batch 5 is broken\nin two lines")
        return a


class MeanField(AmortizedModule):
    """``KL(N(mu, diag(sigma^2)) | N(0, a^-1))`` over ``b = (mu, log sigma)``, for 2 x 2 precision matrices ``a``.

    The true posterior has none, ``L* = 0``; the best of the family has ``1/2 log(a_11 a_22 / det a)``.
    """

    def __init__(self, **kwargs):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), **kwargs)

    def objective(self, b, a):
        mu, log_sigma = b.split(2, 1)
        square = torch.einsum("bi,bij,bj->b", mu, a, mu)
        trace = (a.diagonal(dim1=1, dim2=2) * (2 * log_sigma).exp()).sum(1)
        return (trace + square - 2 - torch.logdet(a)) / 2 - log_sigma.sum(1)

    def optimum(self, a):
        return torch.zeros(len(a))


class DeclaredMeanField(MeanField):
    """The same, which declares the best of its family too."""

    def family_optimum(self, a):
        return (a.diagonal(dim1=1, dim2=2).log().sum(1) - torch.logdet(a)) / 2


class Precisions(ContextDataModule):
    """Correlated 2 x 2 precision matrices."""

    def sample(self, n, generator):
        half = torch.randn(n, 2, 2, generator=generator, device=generator.device)
        return half @ half.mT + 0.3 * torch.eye(2, device=generator.device)


class Spoil(Callback):
    """Puts NaN into the weights, or the optimizer's state, after this many steps, on the last process alone."""

    def __init__(self, step: int, what: str = "weights"):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            state = trainer.optimizers[0].state_dict()["state"][0]["exp_avg"]
            (state if self.what == "optimizer" else pl_module.network[0].weight.data).fill_(torch.nan)


class SaveRows(Callback):
    """What the gap monitor has of each row, in ``rows.pt``; and how many contexts this process had, in ``dealt-RANK``."""

    def on_test_start(self, trainer, pl_module):
        self.dealt = 0

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.dealt += len(outputs)

    def on_test_end(self, trainer, pl_module):
        folder = trainer.default_root_dir
        with open(f"{folder}/dealt-{trainer.global_rank}", "w") as file:
            file.write(str(self.dealt))
        if trainer.is_global_zero:
            (monitor,) = (c for c in trainer.callbacks if isinstance(c, GapMonitor))
            torch.save(tuple(monitor.table), f"{folder}/rows.pt")


class Usual(Quadratic):
    """Logs its gap, known exactly, in the usual way."""

    def test_step(self, a, batch_idx, dataloader_idx=0):
        b = super().test_step(a, batch_idx)
        self.log("usual/gap", (self.objective(b, a) - self.optimum(a)).mean(), sync_dist=True)
        return b


class UsualGaussians(FiniteGaussians):
    """The same contexts from the usual loader, in which Lightning puts its sampler."""

    def test_dataloader(self):
        return DataLoader(Items(self.contexts("test")), self.eval_batch_size)


class Items(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class LazyGaussians(FiniteGaussians):
    """The same as a map-style data set, read item by item."""

    def contexts(self, split):
        return Items(super().contexts(split))


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Pairs(ContextDataModule):
    def sample(self, n, generator):
        return Pair(*(torch.randn(n, 3, generator=generator, device=generator.device) for _ in range(2)))


class LateNaN(Gaussians):
    """Gaussians; in row 3 of training batch ``number`` stands ``value``, or NaN."""

    def __init__(self, number: int = 5, value: float | None = None, **kwargs):
        super().__init__(**kwargs)
        self.number, self.value = number, torch.nan if value is None else value

    def batch(self, split, number, device="cpu"):
        a = super().batch(split, number, device)
        if split == "train" and number == self.number:
            a = a.clone()
            a[3, 0] = self.value
        return a


class Sharp(Quadratic):
    """Quadratic, but on contexts that begin with 7: there the objective is infinite, NaN, or finite with a gradient of NaN."""

    def __init__(self, fault: str = "gradient", **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def objective(self, b, a):
        at = a[:, 0] == 7
        value = super().objective(b, a)
        if self.fault == "gradient":
            return value + 0 * (~at * b.square().sum(1)).sqrt()
        return value + torch.where(at, {"nan": torch.nan, "inf": torch.inf}[self.fault], 0.0)


class Allocation(AmortizedModule):
    """``min |b - w|^2`` subject to ``sum(b) = s`` and ``0 <= b <= 1``, for ``a = (s, w)`` and three unknowns: a program.

    Where s is above 3 there is no solution. The model shares s out by a softmax, and misses the upper bound at times.
    """

    def __init__(self, **kwargs):
        super().__init__(Shares(), **kwargs)

    def objective(self, b, a):
        return (b - a[:, 1:]).square().sum(1)

    def program(self, a):
        n, new = 3, a.new_zeros
        matrix = torch.cat([a.new_ones(1, n), torch.eye(n, dtype=a.dtype, device=a.device)])
        lower, upper = (torch.cat([a[:, :1], new(len(a), n) + bound], 1) for bound in (0, 1))
        return QuadraticProgram(2 * torch.eye(n, dtype=a.dtype, device=a.device), -2 * a[:, 1:], matrix, lower, upper)


class Shares(nn.Module):
    """``s softmax(W a)``."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, a):
        return a[:, :1] * self.linear(a).softmax(1)


class Sums(ContextDataModule):
    """``s`` of :class:`Allocation` up to 3.3, so that one context of eleven has no solution; ``w`` uniform in [-1, 2]."""

    def sample(self, n, generator):
        u = torch.rand(n, 4, generator=generator, device=generator.device)
        return torch.cat([3.3 * u[:, :1], 3 * u[:, 1:] - 1], 1)
