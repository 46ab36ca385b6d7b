"""The pictures of the page on optimal transport: ``python -m benchmarks.transport_pictures FOLDER``.

* ``transport_digits.png``: the ways between pairs of MNIST test digits (needs the files) on the plan of the prediction of
  ``checkpoints/transport_mnist.ckpt``, at its epsilon of 0.01, and on that of Sinkhorn's algorithm at 0.003, started from it.
* ``transport_colours.jpg``: the colours of scikit-learn's two photographs, each carried to the other's by the plan between 512
  pixels of each: as ``checkpoints/transport_clouds.ckpt`` predicts it, which was trained on mixtures of Gaussians alone,
  and as the solver finds it from there.
* ``transport_maps.png``: both maps between two shapes in the plane, of ``checkpoints/wasserstein2.ckpt``, on test draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from amortized import checkpoint
from amortized.contract import take
from amortized.networks import ResidualMLP
from amortized.problems import (
    CloudPotential,
    CloudTransport,
    ConvexPotential,
    HistogramPotential,
    HistogramTransport,
    ImagePairs,
    Shapes,
    Wasserstein2,
)
from amortized.problems.transport import Clouds
from amortized.problems.transport.monge import draw_maps
from amortized.solvers import Anderson
from benchmarks.transport import CHECKPOINT, load

PAIRS, TIMES = (3, 0, 11), [k / 7 for k in range(8)]


def digits(file: Path) -> None:
    from matplotlib.figure import Figure

    module = load(CHECKPOINT)
    assert isinstance(module.network, HistogramPotential)
    cold = HistogramTransport(module.network, side=28, epsilon=0.003)
    pairs = ImagePairs(dataset="mnist").contexts("test")
    assert pairs is not None
    a = take(pairs, torch.tensor(PAIRS))
    with torch.no_grad():
        b = module(a)
        lines = []
        solution = Anderson(steps=300, tol=1e-3).solve(cold, a, b)
        print(
            f"epsilon 0.003 from the prediction: {solution.iterations.tolist()} iterations, {solution.residual.tolist()}"
        )
        for name, frames in (
            ("predicted,\nε = 0.01", module.interpolate(b, a, TIMES)),
            ("solved,\nε = 0.003", cold.interpolate(solution.b, a, TIMES)),
        ):
            lines.append((name, torch.stack(frames)))
    figure = Figure(figsize=(0.75 * len(TIMES) + 0.7, 1.5 * len(PAIRS)), layout="constrained")
    panels = figure.subplots(2 * len(PAIRS), len(TIMES))
    for pair in range(len(PAIRS)):
        for k, (name, frames) in enumerate(lines):
            panels[2 * pair + k, 0].set_ylabel(name, fontsize=6)
            for axes, image in zip(panels[2 * pair + k], frames[:, pair], strict=True):
                axes.imshow(image.view(28, 28).numpy(), cmap="gray_r", vmin=0)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
    figure.savefig(file, dpi=150)


def colours(file: Path) -> None:
    from matplotlib.figure import Figure

    saved = checkpoint.load(CHECKPOINT.with_name("transport_clouds.ckpt"))
    init = saved[checkpoint.RECIPE]["model"]["init_args"]
    module = CloudTransport(CloudPotential(**init["network"]["init_args"]), epsilon=init["epsilon"])
    module.load_state_dict(saved["state_dict"])
    photographs = [torch.from_numpy(image[::2, ::2].copy()).float() / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    pixels = [photograph.flatten(0, 1) for photograph in photographs]
    clouds = [p[torch.randint(len(p), (512,), generator=generator)] for p in pixels]
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for line, (source, target) in zip(figure.subplots(2, 4), ((0, 1), (1, 0)), strict=True):
        a = Clouds(clouds[source][None], clouds[target][None])
        with torch.no_grad():
            b = module(a)
            start = torch.zeros_like(b)
            found = [Anderson(steps=500, memory=0, tol=1e-2).solve(module, a, x) for x in (b, start)]
            print(
                f"iterations to 1e-2: {int(found[0].iterations)} from the prediction, {int(found[1].iterations)} from zero"
            )
            solution = Anderson(steps=500, tol=1e-4).solve(module, a, b)
            images = {
                "photograph": photographs[source],
                "colours": photographs[target],
                "predicted": carried(module, b, a, pixels[source]).view_as(photographs[source]),
                "solved": carried(module, solution.b, a, pixels[source]).view_as(photographs[source]),
            }
        for axes, (name, image) in zip(line, images.items(), strict=True):
            axes.imshow(image.clamp(0, 1).numpy())
            axes.set(xticks=[], yticks=[])
            axes.set_title(name, fontsize=9)
    figure.savefig(file, dpi=100)


def maps(file: Path) -> None:
    saved = checkpoint.load(CHECKPOINT.with_name("wasserstein2.ckpt"))
    recipe = saved[checkpoint.RECIPE]
    init = recipe["model"]["init_args"]
    network = ResidualMLP(**init["network"]["init_args"])
    module = Wasserstein2(network, ConvexPotential(**init["potential"]["init_args"]))
    module.load_state_dict(saved["state_dict"])
    a = Shapes(**recipe["data"]["init_args"]).contexts("test")
    with torch.no_grad():
        b = module(a)
    draw_maps(a, module.transport(a.x), b).savefig(file, dpi=100)


def carried(module: CloudTransport, b: Tensor, a: Clouds, points: Tensor) -> Tensor:
    return torch.cat([module.carry(b, a, part[None])[0] for part in points.split(20_000)])


if __name__ == "__main__":
    digits(Path(sys.argv[1], "transport_digits.png"))
    colours(Path(sys.argv[1], "transport_colours.jpg"))
    maps(Path(sys.argv[1], "transport_maps.png"))
