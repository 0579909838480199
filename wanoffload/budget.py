"""What a model's weights may take on the device: `vram_budget`, as people give it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wanoffload import host_memory
from wanoffload.errors import WrapError
from wanoffload.sizes import parse_bytes

AUTO = "auto"


@dataclass(frozen=True)
class Budget:
    """`nbytes`: the ceiling; None: none was given, and no block stays on the device. `auto`: what
    activations leave, found out from forward to forward."""

    nbytes: int | None = None
    auto: bool = False

    @staticmethod
    def of(given: object, device: torch.device, held: int = 0) -> Budget:
        """From None, bytes, text such as "12GiB", a fraction of what is free, or "auto".

        `held`: bytes that the weights have on the device by now; they count as free. Raises
        WrapError.
        """
        if isinstance(given, Budget):
            return given
        if given is None or given == AUTO:
            return Budget(auto=given == AUTO)
        if isinstance(given, float):
            if not 0 < given <= 1:
                raise WrapError(
                    f"vram_budget is bytes, text such as '12GiB', a fraction of the free device "
                    f"memory above 0 and up to 1.0, or 'auto', not {given!r}"
                )
            return Budget(int(given * (free_bytes(device) + held)))
        try:
            return Budget(parse_bytes(given, "vram_budget"))  # type: ignore[arg-type]
        except ValueError as error:
            raise WrapError(f"{error}, or a fraction such as 0.5, or 'auto'") from None


BudgetLike = Budget | int | str | float | None
"""What `Budget.of` takes."""


def free_bytes(device: torch.device) -> int:
    """What could be allocated on the device now: free, or kept by torch's allocator for later."""
    if device.type != "cuda":
        return host_memory.to_be_had()
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
