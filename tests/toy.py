"""Small problems that the tests of the core share; their minima are known in closed form."""

from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset

from amortized import AmortizedModule, ContextDataModule


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


class FiniteGaussians(ContextDataModule):
    """A finite set: N training contexts, 833 (indivisible) for evaluation."""

    def __init__(self, dim: int = 3, num_train: int = 100, num_eval: int = 833, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.sizes = dim, {"train": num_train, "val": num_eval, "test": num_eval}

    def contexts(self, split):
        seed = ("train", "val", "test").index(split)
        return torch.randn(self.sizes[split], self.dim, generator=torch.Generator().manual_seed(seed))

    def augment(self, a, generator):
        return a + 0.01 * torch.randn(a.shape, generator=generator, device=generator.device)


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
