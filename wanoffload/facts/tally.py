"""Counting what a forward takes, operation by operation, in plain numbers.

A formula is a function that walks through a forward of n tokens as the module's code does and tells
a `Tally` of each operation. All counts are polynomials in n, so that their coefficients follow from
the values at 0, 1 and 2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

ALIGNMENT = 256
"""Bytes between which an image's tensors start: that of `wanoffload.image`, without torch."""

BF16 = 2
FP32 = 4


@dataclass
class Tally:
    """FLOPs of matrix products and of attention, bytes that all other operations move, kernels."""

    matmul: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    kernels: int = 0

    def linear(self, rows: float, inputs: int, outputs: int) -> None:
        """A product of (rows, inputs) and (inputs, outputs), with its bias: one kernel."""
        self.matmul += 2 * rows * inputs * outputs
        self.kernels += 1

    def attend(self, queries: float, keys: float, width: int) -> None:
        """Fused attention over all heads, `width` wide together."""
        self.attention += 4 * queries * keys * width
        self.kernels += 1

    def move(self, elements: float, *bytes_each: float) -> None:
        """An elementwise operation (or a norm): bytes of each element read and written."""
        self.traffic += elements * sum(bytes_each)
        self.kernels += 1

    def also(self, nbytes: float) -> None:
        """Bytes that the last operation moves on top, such as a broadcast operand."""
        self.traffic += nbytes


def coefficients(forward: Callable[[Tally, int], None]) -> dict[str, float]:
    """The fields of DitFacts that describe `forward(tally, tokens)`."""
    at = []
    for tokens in (0, 1, 2):
        tally = Tally()
        forward(tally, tokens)
        at.append(tally)
    squared = (at[2].attention - 2 * at[1].attention + at[0].attention) / 2
    return {
        "matmul_flops": at[0].matmul,
        "matmul_flops_per_token": at[1].matmul - at[0].matmul,
        "attention_flops": at[0].attention,
        "attention_flops_per_token": at[1].attention - at[0].attention - squared,
        "attention_flops_per_token_squared": squared,
        "traffic_bytes": at[0].traffic,
        "traffic_bytes_per_token": at[1].traffic - at[0].traffic,
        "kernels": at[1].kernels,
    }


# Weights: a list of the bytes of each tensor.

Sizes = list[int]


def dense(inputs: int, outputs: int, bias: bool = True, each: int = BF16) -> Sizes:
    """A linear layer's weight and bias."""
    return [inputs * outputs * each, *([outputs * each] if bias else [])]


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of each tensor of one block: of each module that it calls, in bf16 and in the order in
    which they stand there; and of the rest, in fp32."""

    called: list[Sizes]
    fp32: Sizes = field(default_factory=list)

    @property
    def bf16(self) -> Sizes:
        return [nbytes for sizes in self.called for nbytes in sizes]

    @property
    def image_bytes(self) -> int:
        return image_bytes([*self.bf16, *self.fp32])

    @property
    def bf16_bytes(self) -> int:
        return sum(self.bf16)


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def image_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a unit's image: each tensor starts at a multiple of ALIGNMENT."""
    return sum(map(aligned, sizes))
