"""What a forward would take on a CUDA device, found by running the real module on meta tensors.

    with torch.inference_mode(), DryRun(model.parameters()) as run:
        model(**inputs)
    run.matmul_flops, run.attention_flops, run.traffic_bytes, run.kernels, run.peak_bytes

Nothing is computed. Operations are counted as eager CUDA runs them: attention is one fused kernel
that leaves its output and the logarithms of its sums, `rms_norm` is one kernel, views cost nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

SECTOR = 32
"""Bytes that device memory hands out at once: a tensor with gaps moves its gaps too."""
ALLOCATION = 512
"""Bytes to which torch's allocator rounds."""

_ATTENTION = aten.scaled_dot_product_attention.default
_RMS_NORM = aten.rms_norm.default
_DROPOUT = aten.dropout.default
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "_local_scalar_dense",
}


class DryRun(TorchDispatchMode):
    """Counts the operations that run under it. `peak_bytes`: of all tensors but the weights."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        trace: Callable[[str, DryRun, list[Tensor]], None] | None = None,
    ) -> None:
        super().__init__()
        self.matmul_flops = 0
        self.attention_flops = 0
        self.traffic_bytes = 0
        self.kernels = 0
        self.peak_bytes = 0
        self._live_bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in weights}
        self._trace = trace
        self.by_op: Counter[str] = Counter()

    def hold(self, *values: Any) -> None:
        """Counts tensors that exist beforehand, such as the inputs, as live."""
        for tensor in _tensors(values):
            self._count_storage(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        if func is _DROPOUT:
            return args[0]  # nothing is dropped in inference
        if func is _RMS_NORM:
            return self._run(func, args, kwargs, lambda: torch.empty_like(args[0]))
        with self:
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        return self._run(func, args, kwargs, lambda: func(*args, **kwargs))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self.attention_flops += sdpa_flop_count(query.shape, key.shape, value.shape)
        self.kernels += 1
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # As the fused kernels leave it: heads side by side.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        self.hold(sums, out)
        self._note("attention", [out])
        return out.transpose(1, 2)

    def _run(self, func: Any, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        out = call()
        outputs = list(_tensors(out))
        self.hold(*outputs)
        name = func.overloadpacket.__name__
        if func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket]
            self.matmul_flops += count(*args, **kwargs, out_val=out)
            self.kernels += 1
        elif name not in _NO_KERNEL and not _is_view(func):
            self.kernels += 1
            moved = _moved(func, list(_tensors((args, kwargs))), outputs)
            self.traffic_bytes += moved
            self.by_op[name] += moved
        self._note(name, outputs)
        return out

    def _note(self, name: str, outputs: list[Tensor]) -> None:
        if self._trace is not None:
            self._trace(name, self, outputs)

    def _count_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._seen.add(key)
        self._live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._live_bytes -= nbytes


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _is_view(func: Any) -> bool:
    """Says the schema: what is returned is, in part, what came in, and nothing is written."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _moved(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written. What is written in place, without being read, counts once."""
    if func.overloadpacket in (aten.copy_, aten.zero_, aten.fill_):
        inputs = inputs[1:]
    return sum(_touched(tensor) for tensor in (*inputs, *outputs))


def _touched(tensor: Tensor) -> int:
    """Bytes of memory that reading or writing the tensor touches; broadcast ones count once."""
    strides = [
        (size, stride)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride > 0
    ]
    elements = 1
    for size, _ in strides:
        elements *= size
    gap = min((stride for _, stride in strides), default=1)
    return elements * tensor.itemsize * min(gap, max(1, SECTOR // tensor.itemsize))
