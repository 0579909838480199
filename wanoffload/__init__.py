"""wanoffload: run Wan video transformers on GPUs too small for their weights, at full speed.

    import wanoffload
    transformer = wanoffload.wrap(transformer, prefetch=2)   # in place, returns the same module

Nothing happens at import: no CUDA call, no thread, no environment variable read, and no torch: each
name is loaded when it is first used, so that deciding (`plan`, `Workload`, `Hardware`) takes
milliseconds. No module of this package has the name of a public function: importing the module
would put it in the function's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanoffload.errors import (
        BackendError,
        CacheFileError,
        CheckpointError,
        ClosedError,
        ConcurrentForwardError,
        DeviceMemoryError,
        GradientError,
        HostMemoryError,
        MoveError,
        OffloadError,
        PipelineError,
        ShareError,
        TransferError,
        TransferTimeout,
        UnboundWeightError,
        UsageError,
        VerifyError,
        WeightChangeError,
        WrapError,
    )
    from wanoffload.facts.model import ModelFacts
    from wanoffload.loading.loader import load
    from wanoffload.machine.hardware import Hardware
    from wanoffload.pipelines.enabling import disable, enable
    from wanoffload.pipelines.loading_pipeline import load_pipeline
    from wanoffload.policy.planning import Plan, plan
    from wanoffload.runtime import Offloader
    from wanoffload.stats import Stats
    from wanoffload.workload import Workload
    from wanoffload.wrapping import offloader, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CacheFileError",
    "CheckpointError",
    "ClosedError",
    "ConcurrentForwardError",
    "DeviceMemoryError",
    "GradientError",
    "Hardware",
    "HostMemoryError",
    "ModelFacts",
    "MoveError",
    "OffloadError",
    "Offloader",
    "PipelineError",
    "Plan",
    "ShareError",
    "Stats",
    "TransferError",
    "TransferTimeout",
    "UnboundWeightError",
    "UsageError",
    "VerifyError",
    "WeightChangeError",
    "Workload",
    "WrapError",
    "disable",
    "enable",
    "load",
    "load_pipeline",
    "offloader",
    "plan",
    "unwrap",
    "wrap",
]

_MODULE_OF = {
    "Hardware": "machine.hardware",
    "ModelFacts": "facts.model",
    "Offloader": "runtime",
    "Plan": "policy.planning",
    "Stats": "stats",
    "Workload": "workload",
    "disable": "pipelines.enabling",
    "enable": "pipelines.enabling",
    "load": "loading.loader",
    "load_pipeline": "pipelines.loading_pipeline",
    "offloader": "wrapping",
    "plan": "policy.planning",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}
"""Where a public name is defined; those that are not listed are errors."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # or type checkers would take any name for defined

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULE_OF.get(name, 'errors')}")
        globals()[name] = value = getattr(module, name)
        return value
