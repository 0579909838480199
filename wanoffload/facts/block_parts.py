"""The parts of blocks, from the bytes of their tensors: by the rules of `units`, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wanoffload.apart import parts_among
from wanoffload.facts.model import PartFacts
from wanoffload.facts.tally import BlockSizes, image_bytes
from wanoffload.ring import cut


class TensorBytes(NamedTuple):
    nbytes: int
    bf16: bool


@dataclass(frozen=True)
class BlockTensors:
    """A block's tensors: of each module that it calls, `called`, in the order in which both stand
    there; and its own, `rest`."""

    called: Sequence[Sequence[TensorBytes]]
    rest: Sequence[TensorBytes] = ()

    @staticmethod
    def of(sizes: BlockSizes) -> BlockTensors:
        called = [[TensorBytes(nbytes, True) for nbytes in each] for each in sizes.called]
        return BlockTensors(called, [TensorBytes(nbytes, False) for nbytes in sizes.fp32])

    def parts(self) -> list[Sequence[TensorBytes]]:
        """The tensors of each part."""
        everything = [*self.rest, *(tensor for each in self.called for tensor in each)]
        taken = parts_among([_total(each) for each in self.called], _total(everything))
        return [self.called[at] for at in taken] or [everything]

    @property
    def nbytes(self) -> int:
        return sum(map(_total, self.called)) + _total(self.rest)


def part_facts(tensors: Iterable[TensorBytes], block: int) -> PartFacts:
    """Of one part, whose tensors are given in the order of its image."""
    tensors = list(tensors)
    sizes = [tensor.nbytes for tensor in tensors]
    bf16 = sum(tensor.nbytes for tensor in tensors if tensor.bf16)
    return PartFacts(image_bytes(sizes), bf16, cut(sizes), block)


def taken_apart(blocks: Iterable[BlockTensors]) -> tuple[tuple[PartFacts, ...], int]:
    """The parts of all blocks, in order, and the bytes of what the blocks have besides."""
    found, loose = [], 0
    for number, block in enumerate(blocks):
        parts = block.parts()
        found += [part_facts(part, number) for part in parts]
        loose += block.nbytes - sum(map(_total, parts))
    return tuple(found), loose


def _total(tensors: Iterable[TensorBytes]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
