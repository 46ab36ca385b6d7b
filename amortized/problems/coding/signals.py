"""Signals to be coded: sparse ones by construction, without end, and patches of photographs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from amortized.contexts.data_module import ContextDataModule
from amortized.problems.coding.dictionaries import GaussianDictionary

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue."""


class SparseSignals(ContextDataModule):
    """``a = D x``: each entry of x is standard normal with probability ``density``, else zero; ``(B, m)``.

    The signals of Open-L2O's lasso. Source: Chen et al. (2022), *Learning to optimize: a primer and a benchmark*, section 5.2.

    Args:
        dictionary: D, which the problem should have too.
        density: the share of entries of x that are not zero.
        noise: standard deviation of what is added to each number of a signal.
        **kwargs: see :class:`~amortized.ContextDataModule`.

    Raises:
        ValueError: if ``density`` is not in (0, 1] or ``noise`` is negative.
    """

    def __init__(self, dictionary: GaussianDictionary, density: float = 0.1, noise: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < density <= 1 or noise < 0:
            raise ValueError(
                f"SparseSignals: density must be in (0, 1] and noise not negative; got {density} and {noise}"
            )
        self.dictionary, self.density, self.noise = dictionary, density, noise

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        settings: dict[str, Any] = {"generator": generator, "device": generator.device}
        D = self.dictionary.atoms.detach().to(generator.device)
        x = torch.randn(n, D.shape[1], **settings)
        x = x * (torch.rand(n, D.shape[1], **settings) < self.density)
        return x.to(D) @ D.T + self.noise * torch.randn(n, len(D), **settings).to(D)


class Patches(ContextDataModule):
    """Patches of scikit-learn's two photographs, grey, without their mean, ``(B, side²)``; 1 is the range from black to white.

    The left 70 % of each photograph is trained on, the next 15 % validates, the last 15 % tests: no pixel is in two of them. Of
    each part, patches are drawn once, the same whatever the seed. Those of next to no contrast (less than ``contrast``,
    a standard deviation) are left out, and nothing else.

    Args:
        side: of a patch, in pixels.
        contrast: the least standard deviation of a patch's pixels.
        num_train: patches to train on.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, side: int = 8, contrast: float = 0.02, num_train: int = 50_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side, self.contrast = side, contrast
        self.num_rows["train"] = num_train

    def contexts(self, split: str) -> Tensor:
        from sklearn.datasets import load_sample_images

        number = ("train", "val", "test").index(split)
        draw = np.random.default_rng(number)
        found = []
        for photograph in load_sample_images().images:
            grey = photograph.astype(np.float32) @ LUMINANCE / 255
            edges = [int(share * grey.shape[1]) for share in (0, 0.7, 0.85, 1)]
            part = grey[:, edges[number] : edges[number + 1]]
            every = np.lib.stride_tricks.sliding_window_view(part, (self.side, self.side)).reshape(-1, self.side**2)
            every = every[every.std(1) >= self.contrast]
            found.append(every - every.mean(1, keepdims=True))
        patches = np.concatenate(found)
        chosen = draw.permutation(len(patches))[: self.num_rows[split]]
        return torch.from_numpy(patches[chosen]).to(torch.get_default_dtype())
