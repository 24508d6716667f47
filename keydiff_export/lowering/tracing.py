"""Tracing and passes without the work that nobody reads here; what comes out is the same to the byte.

Stack traces and the arithmetic of rounding alone are a quarter of lowering's processor time (ten layers of the demo
model to ExecuTorch).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torchao.quantization import quant_primitives


@contextmanager
def fast_tracing() -> Iterator[None]:
    """All of the below at once."""
    with _no_stack_traces(), _shallow_provenance(), _lazy_code(), _shapes_of_rounding():
        yield


def _no_stack_traces() -> Any:
    """Nodes that do not say which line of Python made them: the record is dropped before any pass reads it."""
    return mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True)


def _shallow_provenance() -> Any:
    """Keeps torch from deep-copying each node's history at every pass.

    The record only serves debuggers; sharing it between the old node and the new one loses nothing that is read here.
    """
    shallow = SimpleNamespace(copy=copy.copy, deepcopy=lambda record: record)
    return mock.patch.object(torch.fx.traceback, "copy", shallow)


@contextmanager
def _lazy_code() -> Iterator[None]:
    """Generates a graph module's Python code when it is first called or read, not at every change of the graph.

    Passes interpret graphs node by node and never run that code, so writing and compiling it is wasted.
    """
    eager = GraphModule.recompile

    def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        eager(self)
        return self.forward(*args, **kwargs)

    def postpone(self: GraphModule) -> None:
        codegen = self._graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        self._code = ""
        type(self).forward = forward

    with mock.patch.object(GraphModule, "recompile", postpone):
        yield


@contextmanager
def _shapes_of_rounding() -> Iterator[None]:
    """Tells the shape of a quantised tensor without computing it.

    torchao's operators have no shape function, so that every pass goes through their arithmetic, some twenty operators
    each, for tensors that have no numbers.
    """
    round_off, restore = (
        quant_primitives._quantize_affine_no_dtype_cast,
        quant_primitives._dequantize_affine_no_dtype_check,
    )

    def rounded(numbers: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(numbers) if isinstance(numbers, FakeTensor) else round_off(numbers, *rest)

    def restored(
        numbers: Tensor,
        block_size: list[int],
        scale: Tensor,
        zero_point: Tensor | None,
        low: float,
        high: float,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        if isinstance(numbers, FakeTensor):
            return torch.empty_like(numbers, dtype=dtype)
        return restore(numbers, block_size, scale, zero_point, low, high, dtype)

    with (
        mock.patch.object(quant_primitives, "_quantize_affine_no_dtype_cast", rounded),
        mock.patch.object(quant_primitives, "_dequantize_affine_no_dtype_check", restored),
    ):
        yield
