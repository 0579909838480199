"""Every error of this package is an `OffloadError`; the engine's own come from the extension."""

from wanoffload._C import (
    BackendError,
    ClosedError,
    HostMemoryError,
    OffloadError,
    TransferError,
    TransferTimeout,
    UsageError,
)

__all__ = [
    "BackendError",
    "CacheFileError",
    "CheckpointError",
    "ClosedError",
    "ConcurrentForwardError",
    "DeviceMemoryError",
    "GradientError",
    "HostMemoryError",
    "MoveError",
    "OffloadError",
    "PipelineError",
    "ShareError",
    "TransferError",
    "TransferTimeout",
    "UnboundWeightError",
    "UsageError",
    "VerifyError",
    "WeightChangeError",
    "WrapError",
]


class WrapError(OffloadError, ValueError):
    """The model, or an argument, is not one that `wrap` can work with."""


class MoveError(OffloadError, ValueError):
    """A wrapped model was asked to change its device or dtype."""


class WeightChangeError(OffloadError, ValueError):
    """A block's weights were changed in a way that its place in memory can't take in."""


class GradientError(OffloadError):
    """A forward would need gradients through streamed weights."""


class ConcurrentForwardError(OffloadError):
    """A second thread entered a forward of the same model."""


class UnboundWeightError(OffloadError):
    """A block's weights were read in a forward, but not by that block's own forward."""


class VerifyError(OffloadError):
    """`verify=True` found bytes on the device that are not the unit's."""


class PipelineError(OffloadError, ValueError):
    """A pipeline, or one of its components, is not one that can be enabled or run as it is."""


class DeviceMemoryError(OffloadError):
    """No permitted plan fits into the device's memory."""


class CheckpointError(OffloadError, ValueError):
    """A checkpoint is not there, not whole, or not one of the model it is loaded into."""


class CacheFileError(OffloadError):
    """A cache file is not whole, is of another model or checkpoint, or can't be written."""


class ShareError(OffloadError, ValueError):
    """Processes can't share an arena under a name: it holds something else, or can't be found."""
