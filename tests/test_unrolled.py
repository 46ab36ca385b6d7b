"""Graphs whose tensors were taken apart give what they gave, in fewer loops."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code

from amortized.solvers.unrolled import Unrolled

G = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(2, 3, generator=G)


def elementwise(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.exp() - 1, 0.5 * x.abs()).clamp(max=3) / (1 + x * x)


def along_rows(x: Tensor) -> tuple[Tensor, ...]:
    norm = (x * x).sum(0).sqrt()
    far = norm > 1
    return x / norm, norm, far, (far & (x[0] > 0)).to(torch.int32), norm.unsqueeze(0) + x


def matrices(x: Tensor) -> Tensor:
    outer = x.unsqueeze(0) * x.unsqueeze(1) + torch.eye(2).unsqueeze(2)
    return (outer * x).sum(1) - outer.sum((0, 1))


def layouts(x: Tensor) -> tuple[Tensor, ...]:
    rows = x.t().reshape(-1, 2)
    return (
        rows[:, 0::2] - rows[:, 1::2] ** 2,
        torch.cat([x[1:], x, rows.t()]),
        rows.flatten(1).squeeze(-1),
        x.expand(3, 2, -1),
    )


def joined(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([b, a * b, torch.ones_like(a)], 1)


def unknown_operations(x: Tensor) -> tuple[Tensor, ...]:
    sorted_, order = (2 * x).sort(0)
    return sorted_ + x, order, (x.t() @ WEIGHTS).relu().sum(1) * x[0], x.cumsum(0) * 2, (x > 0).sum(), x.mean(1)


def many_numbers(x: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, 30)[:, None, None] * x).exp().mean(0) * x


def gradients(x: Tensor) -> Tensor:
    def total(b: Tensor) -> Tensor:
        at, up = b[:, 0::2], b[:, 1::2]
        return ((1 - at) ** 2 + 10 * (up - at * at) ** 2).sum()

    return torch.func.grad(total)(x.t())


def without_rows(x: Tensor) -> tuple[Tensor, ...]:
    scale = torch.full((2, 1), 3.0) * torch.tensor(2.0)
    return scale * x, scale, torch.zeros_like(x), torch.zeros_like(x) + scale


FUNCTIONS = [
    elementwise, along_rows, matrices, layouts, joined, unknown_operations, many_numbers, gradients, without_rows,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_graph_taken_apart_gives_what_it_gave(function: Callable[[Tensor], object]) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        Unrolled()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph

    torch.compiler.reset()
    x = torch.randn(2, 11, generator=G)
    torch._dynamo.mark_dynamic(x, 1)
    compiler = aot_autograd(fw_compiler=backend, inference_compiler=backend, decompositions=select_decomp_table())
    with torch.no_grad():
        found, expected = torch.compile(function, backend=compiler, fullgraph=True)(x), function(x)
    torch.testing.assert_close(found, expected)


def test_rows_of_two_numbers_stay_in_registers() -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")

    def rounds(x: Tensor) -> Tensor:
        for _ in range(6):
            norm = (x * x).sum(0).sqrt()
            far = norm > 1
            x = torch.where(far, x / norm, x + norm) * torch.where(far, 0.5, 1.5)
        return x

    x = torch.randn(2, 11, generator=G)
    torch._dynamo.mark_dynamic(x, 1)
    options = {"cpp.simdlen": 1, "realize_reads_threshold": 2, "max_fusion_size": 1000}
    allocated = {}
    for name, more in {"plain": {}, "unrolled": {"post_grad_custom_post_pass": Unrolled()}}.items():
        torch.compiler.reset()
        found, (code,) = run_and_get_code(torch.compile(rounds, options=options | more), x)
        torch.testing.assert_close(found, rounds(x))
        allocated[name] = code.count("= empty_strided_cpu(")
    assert allocated["unrolled"] == 1
    assert allocated["plain"] > 3
