"""What an offloader tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What an offloader did and holds. Counts since `wrap` or the last `reset_stats()`; bytes now.

    `cold`: acquires that had to start a fetch over the link. `host_bytes`: of the images in
    host memory; `disk_bytes`: of those in files; `plain_bytes`: of all, as they would be if none
    was packed; `unpacked_bytes`: of host memory that packed weights take besides, because they
    were read; `locked_bytes`: page-locked, images and ring;
    `slot_bytes`: on the device, all slots, or the ring that parts of blocks pass through;
    `ring_bytes`: of the pinned ring, 0 where every image is
    page-locked; `staging_bytes`: on the device, where packed chunks are unpacked from, 0 where
    nothing is packed. `slots`, `slot_bytes`, `ring_bytes` and `staging_bytes` are 0 while the
    offloader is paused. `packed_units`: blocks whose images are packed; bytes of them are packed
    bytes. `resident_units`: blocks that stay on the device, plain; `kept_packed_units`: those that
    stay there packed and are unpacked for each use; `resident_bytes`: of both, on the device;
    `device_bytes`: of all weights on the device, as the allocator counts them: what `vram_budget`
    limits. `at_home`: all blocks are there and no hook of theirs runs, so that nothing is acquired.
    `predicted_step_seconds`: of a denoising step,
    by the plan; `measured_step_seconds`: of the second step. None where nothing was predicted, or
    the device has not got that far.
    """

    forwards: int
    acquires: int
    cold: int
    fetches: int
    bytes_fetched: int
    invalidations: int
    failures: int
    units: int
    slots: int
    host_bytes: int
    disk_bytes: int
    plain_bytes: int
    unpacked_bytes: int
    locked_bytes: int
    slot_bytes: int
    ring_bytes: int
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    packed_units: int = 0
    staging_bytes: int = 0
    resident_units: int = 0
    kept_packed_units: int = 0
    resident_bytes: int = 0
    device_bytes: int = 0
    at_home: bool = False
