"""Rows of few numbers, number by number: a pass over a graph that is being compiled.

A state of ``(2, L)`` and one of ``(L,)`` are loops of different shapes to the compiler, and what one loop leaves to the next
goes through memory. Where every tensor of few numbers a row is taken apart into tensors ``(L,)``, all loops are alike, and
become one: a row is read once, stays in registers for all the rounds of the graph, and is written once.

The graph is followed operation by operation. What an operation does to the shape is left to NumPy, which does it to an array
of the parts; operations that are not known, or of tensors with more numbers, get their tensors whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default

MOST = 16
"""Numbers a row of a tensor that is taken apart: of two unknowns H has four, of four it has 16."""
READ = 256
"""Numbers a row of a tensor that is only read by parts, or joined of them, such as all rows in one."""


class Unrolled(CustomGraphPass):
    """The pass, for the option ``post_grad_custom_post_pass`` of ``torch.compile``; rows are the size that varies."""

    def __call__(self, graph: fx.Graph) -> None:
        _Unroller(graph).run()

    def uuid(self) -> Any:
        """Changes with this file, and with it the compiled code that is kept from run to run."""
        return get_hash_for_files((__file__,))


class Parts(NamedTuple):
    """A tensor, number by number."""

    nodes: np.ndarray
    """Of the tensor's shape, with 1 for the rows: nodes of shape ``(L,)``, ``(1,)`` where rows do not differ, or ``()``."""
    rows: int | None
    """Which dimension are the rows."""


def _size(val: Tensor) -> tuple[tuple[int, ...], int | None] | None:
    """The shape with 1 for the rows, and which dimension are the rows; None if more than one size varies."""
    varying = [axis for axis, size in enumerate(val.shape) if not isinstance(size, int)]
    if len(varying) > 1:
        return None
    shape = tuple(size if isinstance(size, int) else 1 for size in val.shape)
    return shape, (varying[0] if varying else None)


class _Unroller:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parts: dict[fx.Node, Parts] = {}
        self.read: set[fx.Node] = set()  # tensors that exist whole, whose parts are only read from them
        self.wholes: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        tensors = [node for node in self.graph.nodes if self.is_tensor(node)]
        self.mode = next(node.meta["val"].fake_mode for node in tensors)
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                found = self.taken_apart(node) if self.is_tensor(node) and node.op == "call_function" else None
                if found is not None:
                    self.parts[node] = found
                elif node.op in ("call_function", "output"):
                    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self.whole)
        self.graph.eliminate_dead_code()

    @staticmethod
    def is_tensor(node: Any) -> bool:
        return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, before the one that is being followed."""
        node = self.graph.call_function(op, args, kwargs)
        known = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with self.mode:
            node.meta["val"] = op(*known[0], **known[1])
        return node

    def split(self, node: fx.Node) -> Parts:
        """The parts of a tensor, each read from it unless they are known; those that nobody uses go at the end."""
        if node not in self.parts:
            size = _size(node.meta["val"])
            assert size is not None
            shape, rows = size
            nodes = np.empty(shape, dtype=object)
            for index in np.ndindex(shape):
                part = node
                for axis in reversed(range(len(shape))):
                    if axis != rows:
                        part = self.emit(aten.select.int, part, axis, index[axis])
                nodes[index] = self.emit(aten.unsqueeze.default, part, 0) if shape and rows is None else part
            self.parts[node] = Parts(nodes, rows)
            self.read.add(node)
        return self.parts[node]

    def whole(self, node: fx.Node) -> fx.Node:
        """The tensor in one."""
        if node not in self.parts or node in self.read or node.target is aten.full.default:
            return node
        if node not in self.wholes:
            nodes, rows = self.parts[node]
            lines = list(nodes.flat)
            if nodes.ndim == 0 or (nodes.ndim == 1 and rows == 0 and self.varies(lines[0])):
                return lines[0]
            if rows is not None and not all(self.varies(line) for line in lines):
                like = next((line for line in lines if self.varies(line)), None)
                if like is None:
                    return self.wholes.setdefault(node, node)  # nothing of it depends on the row
                number = self.emit(aten.sym_size.int, like, 0)
                lines = [
                    line if self.varies(line) else self.emit(aten.expand.default, line, [number]) for line in lines
                ]
            joined = self.emit(aten.cat.default, [self.emit(aten.unsqueeze.default, line, 0) for line in lines])
            shape = [size for axis, size in enumerate(nodes.shape) if axis != rows]
            if rows is None:
                joined = self.emit(aten.reshape.default, joined, shape)
            else:
                joined = self.emit(aten.reshape.default, joined, [*shape, self.emit(aten.sym_size.int, joined, 1)])
                order = list(range(len(shape)))
                joined = self.emit(aten.permute.default, joined, order[:rows] + [len(shape)] + order[rows:])
            self.wholes[node] = joined
        return self.wholes[node]

    @staticmethod
    def small(node: fx.Node, most: int) -> tuple[tuple[int, ...], int | None] | None:
        """The size of a tensor of one kind of rows and at most so many numbers a row."""
        size = _size(node.meta["val"])
        return size if size is not None and 0 < np.prod(size[0]) <= most else None

    @staticmethod
    def varies(part: fx.Node) -> bool:
        return not isinstance(part.meta["val"].shape[0], int)

    def taken_apart(self, node: Any) -> Parts | None:
        """The parts of what an operation gives; None if it is to have its tensors whole."""
        given = [x for x in node.all_input_nodes if self.is_tensor(x)]
        view = node.target in VIEWS
        most = READ if view or node.target is aten.cat.default else MOST
        size = self.small(node, most)
        if size is None or not all(x in self.parts or self.small(x, READ if view else MOST) for x in given):
            return None
        shape, rows = size
        if view:
            nodes = self.viewed(node, shape, rows)
            if nodes is not None and given[0] in self.read:
                self.read.add(node)
        elif node.target is aten.full.default:
            one = self.emit(aten.full.default, [1] * bool(shape), *node.args[1:], **node.kwargs)
            nodes = np.full(shape, one, dtype=object)
        elif node.target is aten.cat.default:
            nodes = self.joined(node, rows)
        elif node.target is aten.slice_scatter.default:
            nodes = self.scattered(node, rows)
        elif node.target is aten.sum.dim_IntList and node.meta["val"].is_floating_point() and not node.kwargs:
            nodes = self.summed(node, shape)
        elif node.target is CONVERT or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            nodes = self.mapped(node, shape, rows)
        else:
            nodes = None
        if nodes is None or any(part.meta["val"].dtype != node.meta["val"].dtype for part in nodes.flat):
            return None
        return Parts(nodes, rows)

    def viewed(self, node: Any, shape: tuple[int, ...], rows: int | None) -> np.ndarray | None:
        (nodes, before), args = self.split(node.args[0]), node.args[1:]
        if not nodes.ndim or ((before is None) != (rows is None) and node.target is not aten.expand.default):
            return None
        if node.target in (aten.select.int, aten.slice.Tensor):
            axis = args[0] % nodes.ndim if args else 0
            if axis == before:
                return None
            args = (axis, *args[1:])
        if node.target in RESHAPES and np.prod(nodes.shape[:before]) != np.prod(shape[:rows]):
            return None  # other numbers come before the rows: they are not the same rows
        return VIEWS[node.target](nodes, shape, *args)

    def joined(self, node: Any, rows: int | None) -> np.ndarray | None:
        every = [self.split(x) for x in node.args[0]]
        axis = node.args[1] % every[0].nodes.ndim if len(node.args) > 1 else 0
        if axis == rows or any(parts.rows != rows for parts in every):
            return None
        return np.concatenate([parts.nodes for parts in every], axis)

    def scattered(self, node: Any, rows: int | None) -> np.ndarray | None:
        into, what = (self.split(x) for x in node.args[:2])
        axis, *ends = node.args[2:] or (0,)
        if axis % into.nodes.ndim == rows or into.rows != rows or what.rows != rows:
            return None
        nodes = into.nodes.copy()
        nodes[_sliced(nodes, axis, *ends)] = what.nodes
        return nodes

    def summed(self, node: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        nodes, rows = self.split(node.args[0])
        axes = [axis % nodes.ndim for axis in node.args[1] or ()]
        if not axes or rows in axes:
            return None
        others = [size for axis, size in enumerate(nodes.shape) if axis not in axes]
        terms = np.moveaxis(nodes, axes, range(len(axes))).reshape(-1, *others)
        total = terms[0].copy() if others else np.array(terms[0], dtype=object)
        for index in np.ndindex(*others):
            for term in terms[1:]:
                total[index] = self.emit(aten.add.Tensor, total[index], term[index] if others else term)
        return total.reshape(shape)

    def mapped(self, node: Any, shape: tuple[int, ...], rows: int | None) -> np.ndarray | None:
        given, form = pytree.tree_flatten((node.args, node.kwargs))
        if any(isinstance(x, fx.Node) and not self.is_tensor(x) for x in given):
            return None
        tensors = {k: self.split(x) for k, x in enumerate(given) if self.is_tensor(x)}
        for nodes, own in tensors.values():
            if own is not None and own + len(shape) - nodes.ndim != rows:
                return None
        if not tensors or np.broadcast_shapes(*(parts.nodes.shape for parts in tensors.values())) != shape:
            return None
        wide = {k: np.broadcast_to(parts.nodes, shape) for k, parts in tensors.items()}
        made = np.empty(shape, dtype=object)
        for index in np.ndindex(shape):
            flat = [wide[k][index] if k in wide else x for k, x in enumerate(given)]
            args, kwargs = pytree.tree_unflatten(flat, form)
            made[index] = self.emit(node.target, *args, **kwargs)
        return made


def _sliced(nodes: np.ndarray, axis: int, *ends: int) -> tuple[slice, ...]:
    """The index of ``nodes[..., start:end:step, ...]``."""
    index = [slice(None)] * nodes.ndim
    index[axis] = slice(*ends) if ends else slice(None)
    return tuple(index)


View = Callable[..., np.ndarray]

RESHAPES: dict[Any, View] = dict.fromkeys(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
    ),
    lambda nodes, shape, *_: nodes.reshape(shape),
)
VIEWS: dict[Any, View] = RESHAPES | {
    aten.permute.default: lambda nodes, shape, order: nodes.transpose(order),
    aten.expand.default: lambda nodes, shape, sizes: np.broadcast_to(nodes, shape),
    aten.select.int: lambda nodes, shape, axis, index: nodes.take([index], axis).reshape(shape),
    aten.slice.Tensor: lambda nodes, shape, axis=0, *ends: nodes[_sliced(nodes, axis, *ends)],
}
