"""wanoffload: run Wan video transformers on GPUs too small for their weights, at full speed.

    import wanoffload
    transformer = wanoffload.wrap(transformer, prefetch=2)   # in place, returns the same module

Nothing happens at import: no CUDA call, no thread, no environment variable read.
"""

from wanoffload.errors import (
    BackendError,
    ClosedError,
    ConcurrentForwardError,
    GradientError,
    HostMemoryError,
    MoveError,
    OffloadError,
    TransferError,
    TransferTimeout,
    UnboundWeightError,
    UsageError,
    VerifyError,
    WeightChangeError,
    WrapError,
)
from wanoffload.runtime import Offloader, Stats
from wanoffload.wrap import offloader, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ClosedError",
    "ConcurrentForwardError",
    "GradientError",
    "HostMemoryError",
    "MoveError",
    "OffloadError",
    "Offloader",
    "Stats",
    "TransferError",
    "TransferTimeout",
    "UnboundWeightError",
    "UsageError",
    "VerifyError",
    "WeightChangeError",
    "WrapError",
    "offloader",
    "unwrap",
    "wrap",
]
