"""The streaming engine: host store, pinned ring, copy engine, device slots, prefetcher.

Streams, events and device memory are integers: a stream is the platform's handle (0: the default
stream; on the host backend, the calling thread), device memory an address.
"""

from collections.abc import Sequence
from typing import Any

class OffloadError(RuntimeError): ...
class BackendError(OffloadError): ...
class TransferError(OffloadError): ...
class TransferTimeout(OffloadError): ...
class HostMemoryError(OffloadError): ...
class ClosedError(OffloadError): ...
class UsageError(OffloadError): ...

class Backend:
    @property
    def name(self) -> str: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def create_event(self) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def wait(self, stream: int, event: int) -> None: ...
    def is_complete(self, event: int) -> bool: ...
    def synchronize(self, event: int, timeout_ms: int = ...) -> None: ...
    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> None: ...

class HostBackend(Backend):
    def __init__(
        self,
        *,
        bytes_per_second: float = ...,
        latency_us: float = ...,
        jitter_us: float = ...,
        seed: int = ...,
    ) -> None: ...
    def fail_at(self, nth_call: int) -> None: ...
    @property
    def calls(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def locked_bytes(self) -> int: ...

class CudaBackend(Backend):
    def __init__(self, device_index: int) -> None: ...
    def load_unpack_kernel(self, cubin: bytes, name: str, threads: int, shared_bytes: int) -> None:
        """Takes the kernel that unpacks from here on: `kernels/unpack.py` compiled for this device.

        `threads` of a block, `shared_bytes` of dynamic shared memory. Raises BackendError.
        """

class SourceFile:
    """A file whose bytes become images, opened once and read by many threads.

    `direct`: read it with O_DIRECT, past the page cache. The property turns to false for good where
    the filesystem refuses (at the first read, perhaps), and `direct_refusal` says how. Whatever
    reads it throws TransferError when the file ended, could not be read, or has another size or
    time of modification than when it was opened.
    """

    def __init__(self, path: str, direct: bool = ...) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def direct_refusal(self) -> str: ...
    def fail_at(self, nth_read: int, error: int = ...) -> None:
        """For tests: the n-th read from now on answers with this errno (EIO), once.

        error 0: it comes back with half of what was asked for; nth_read 0 takes all that back.
        """
    @property
    def reads(self) -> int: ...

_Extent = tuple[SourceFile, int, int, int]  # file, offset in it, bytes, offset in the image

class Image:
    """One unit's bytes, wherever they are."""

    @property
    def nbytes(self) -> int: ...
    @property
    def locked(self) -> bool: ...
    def read(self, offset: int, nbytes: int, destination: int) -> None:
        """Puts bytes of the image at an address. Any thread may, several at once."""

class FileImage(Image):
    """An image that stands in files and is read anew for each fetch. Gaps read as zeros."""

    def __init__(self, extents: Sequence[_Extent], nbytes: int, *, fingerprint: int = ...) -> None:
        """`fingerprint`: of the bytes, one extent, proved by the first fetch. 0: not known."""
    @property
    def direct(self) -> bool: ...
    @property
    def proven(self) -> bool: ...
    def check(self) -> None:
        """Raises TransferError if a file has changed, or its bytes are not what was written."""
    def view(self, offset: int, nbytes: int) -> FileBytes:
        """Bytes of one extent, mapped. Call check() before they are looked at."""

class PiecesImage(Image):
    """Bytes that stand in several places of host memory, (address, offset, bytes) each.

    Between them are zeros. Keeps nothing alive: pieces must stay while a transfer reads them.
    Raises UsageError for pieces that overlap or do not fit.
    """

    def __init__(self, pieces: Sequence[tuple[int, int, int]], nbytes: int) -> None: ...

class FileBytes:
    """A run of an image's bytes where its file is mapped, to be read only. Keeps both alive."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

class HostImage(Image):
    """One unit's bytes, in a mapping of their own. `memoryview(image)` keeps it alive."""

    @property
    def address(self) -> int: ...
    def fill(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copies (source address, offset, bytes) pieces in, with many threads."""
    def fill_from(self, extents: Sequence[_Extent], *, direct: bool = ...) -> None:
        """Reads extents of files in with many threads. If it throws, the bytes mean nothing."""
    def copy_from(self, image: Image) -> None:
        """Reads another image of the same size in, with many threads, and proves it if need be."""
    @property
    def shared(self) -> bool:
        """Whether other processes may read these bytes: then nobody may change them."""
    def touch(self) -> None:
        """Makes every page present, without changing what is there. Raises HostMemoryError."""
    def drop(self, offset: int, nbytes: int) -> None:
        """Gives the whole pages within the range back to the system: they read as zeros.

        Raises UsageError where memory is page-locked or shared.
        """
    def lock(self) -> None: ...
    def unlock(self) -> None: ...
    def protect(self) -> None:
        """Shared bytes are read-only in this process from here on; stray writes end it."""
    def make_own(self) -> None:
        """Moves shared bytes into memory of this process: same address, locked if they were.

        Raises HostMemoryError, and nothing has changed; or what lock() raises, and the image is
        this process's own, but not locked. Does nothing if it is not shared.
        """
    def keep(self) -> None:
        """The same without a move: nobody else will look at these bytes again."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

class Descriptor:
    """Owns a file descriptor: closed with its last holder, images of shared memory among them."""

    def __init__(self, number: int) -> None: ...
    @property
    def number(self) -> int: ...

class HostStore:
    def __init__(self, backend: Backend, *, huge_pages: bool = ..., threads: int = ...) -> None: ...
    def allocate(self, nbytes: int) -> HostImage: ...
    def map_shared(self, memory: Descriptor, offset: int, nbytes: int) -> HostImage:
        """An image over whole pages of a memfd, as they are. Raises UsageError, HostMemoryError."""
    @property
    def mapped_bytes(self) -> int: ...
    @property
    def locked_bytes(self) -> int: ...

def fingerprint(address: int, nbytes: int, threads: int = ...) -> int: ...

_PackedTensor = tuple[int, int, bool]  # offset in the plain image, bytes, whether it is bf16
_Run = tuple[int, int, int, int, int, int]

class PackingPlan:
    """What a packed image will look like, from the number of escapes of every tile.

    `tensors`: in the order of the plain image; what lies up to the next one (or the end) belongs to
    a tensor. `escapes`: one row of 16-bit or 32-bit numbers, one for each whole tile of 1,024
    weights of each bf16 tensor. Raises UsageError.
    """

    # Anything with the buffer protocol, which has no type before Python 3.12.
    def __init__(
        self, plain_bytes: int, tensors: Sequence[_PackedTensor], escapes: Any
    ) -> None: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def runs(self) -> list[_Run]:
        """(codec, offset in the plain image, bytes of it, where its sections begin in the packed
        image, its first tile among all (or -1), escapes), in order."""
    def write_heads(self, address: int, checksums: Sequence[int]) -> None:
        """Writes the head and the headers and tables of chunks into a packed image, nothing else.

        `checksums`: what each run adds to the fingerprint of the plain image."""

class Packer:
    """Packs a plain image on the CPU: looks at all of it when made, then writes.

    The image must stay as it is until write() has returned. `threads`: 0: as many as there are
    cores, 16 at most. Raises UsageError, also when it sees that the image has changed.
    """

    def __init__(
        self, address: int, plain_bytes: int, tensors: Sequence[_PackedTensor], threads: int = ...
    ) -> None: ...
    @property
    def plan(self) -> PackingPlan: ...
    @property
    def packed_bytes(self) -> int: ...
    def write(self, address: int) -> None:
        """Writes `packed_bytes` bytes, every one of them."""

def unpack_chunk(
    chunk: int, chunk_bytes: int, image: int, image_bytes: int, threads: int = ...
) -> bool:
    """Unpacks one chunk at an address into the plain image at another, on the CPU.

    Never reads beyond the chunk or writes beyond the image, whatever the bytes are. False if the
    chunk is spoilt: its checksums differ, or it contradicts itself. What could not be unpacked is
    left.
    """

class PackedImage(Image):
    """Packed bytes, which `nbytes` and `read` mean, that know how they are unpacked.

    Raises TransferError if `stored` is no packed image, or one with a spoilt head.
    """

    def __init__(self, stored: Image) -> None: ...
    @property
    def stored(self) -> Image: ...
    @property
    def plain_bytes(self) -> int: ...
    @property
    def largest_chunk(self) -> int: ...
    @property
    def plain_fingerprint(self) -> int: ...
    def unpack(self, offset: int, nbytes: int, destination: int, threads: int = ...) -> None:
        """Puts bytes of the plain image at an address, with this many threads (0: one a core).

        Raises TransferError, which names the place, if they are spoilt. Any thread may.
        """

class PinnedRing:
    def __init__(self, backend: Backend, chunks: int, chunk_bytes: int) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def locked_bytes(self) -> int: ...
    @property
    def counts(self) -> tuple[int, int, int]: ...
    def check_out(self, timeout_ms: int = ...) -> tuple[int, int]: ...
    def send(self, index: int, stream: int) -> None: ...
    def give_back(self, index: int) -> None: ...

class PrefetchStats:
    """Counts. `bytes_fetched`: as they cross the link; of packed units, the packed bytes."""

    @property
    def acquires(self) -> int: ...
    @property
    def cold(self) -> int: ...
    @property
    def fetches(self) -> int: ...
    @property
    def bytes_fetched(self) -> int: ...
    @property
    def invalidations(self) -> int: ...
    @property
    def failures(self) -> int: ...

class Prefetcher:
    """The order of units, and how far ahead of their use they are fetched.

    `owner` is kept alive until the engine has closed: what holds the memory of slots and staging.
    `staging`: addresses of equal slots of device memory, `staging_bytes` each, through which packed
    images pass. Without them a packed image is refused, unless its packed bytes have a home.
    """

    def __init__(
        self,
        backend: Backend,
        slots: Sequence[int],
        slot_bytes: int,
        owner: object,
        *,
        depth: int,
        ring_chunks: int = ...,
        ring_chunk_bytes: int = ...,
        threads: int = ...,
        timeout_ms: int = ...,
        staging: Sequence[int] = ...,
        staging_bytes: int = ...,
        least_stretch: int = ...,
    ) -> None: ...
    def add_unit(
        self,
        image: Image,
        *,
        home: Sequence[tuple[int, int]] = ...,
        as_stored: bool = ...,
        filled: bool = ...,
    ) -> int:
        """`home`: device memory where the unit's bytes stay once they have come, as (address,
        bytes) of pieces that follow each other in its image. Homes may share memory, as in a ring:
        who comes there ends what others have there.

        The unit is read there: `acquire` gives the slot `slot_count` + how many homes came before.
        `as_stored`: packed bytes stay there, and are unpacked into a slot for each use. `filled`:
        they are there already. Raises UsageError for what fits neither its home nor a slot.
        """
    def home_filled(self, unit: int) -> bool:
        """Once closed: whether the unit's home holds its bytes."""
    def set_order(self, units: Sequence[int]) -> None: ...
    def order(self) -> list[int]: ...
    def prefetch(self) -> None: ...
    def acquire(self, unit: int, stream: int) -> tuple[int, int]: ...
    def release(self, unit: int, stream: int, generation: int) -> None: ...
    def abandon(self, stream: int) -> None: ...
    def invalidate(self, unit: int) -> None: ...
    def replace_unit(self, unit: int, image: Image) -> None: ...
    def set_poison(self, value: int | None) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> PrefetchStats: ...
    def reset_stats(self) -> None: ...
    def recent_events(self) -> str: ...
    @property
    def copy_stream(self) -> int: ...
    @property
    def unpack_stream(self) -> int:
        """0 where there is no staging memory."""
    @property
    def ring_bytes(self) -> int: ...
    @property
    def slot_count(self) -> int: ...
    @property
    def unit_count(self) -> int: ...

class Uploader:
    """Brings plain images to device addresses, one after the other, through its own pinned ring.

    One thread at a time. A destination is written to from start() on, until the stream that wait()
    was given has waited, or wait() or close() has raised or returned without that.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ring_chunks: int = ...,
        ring_chunk_bytes: int = ...,
        threads: int = ...,
        timeout_ms: int = ...,
    ) -> None: ...
    def start(self, image: Image, address: int, wait_for_stream: int | None) -> None:
        """Queues an image. Its copy waits for what is enqueued on that stream now."""
    def wait(self, stream: int) -> None:
        """For the oldest image that was not waited for: enqueued whole when this returns.

        `stream` waits for its last byte. What went wrong is raised here, when its copies have
        ended; the next call is for the next image.
        """
    def close(self) -> None: ...
