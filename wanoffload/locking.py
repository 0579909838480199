"""Page-locks a model's images beside what comes next, while it is wrapped."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from wanoffload._C import BackendError, HostImage, HostMemoryError

logger = logging.getLogger(__name__)


def lock_image(memory: HostImage) -> None:
    """Page-locks it, in this process."""
    memory.lock()


class Locking:
    """One thread that page-locks images. `required`: a refusal is an error, which the next call of
    `lock` or `raise_if_refused` raises; else what the machine does not lock stays pageable."""

    def __init__(self, required: bool) -> None:
        self._required = required
        self._refused = False
        self._thread = ThreadPoolExecutor(1, "wanoffload-lock")
        self._begun: list[Future[None]] = []

    def lock(self, memory: HostImage, now: bool) -> None:
        """Page-locks an image beside what comes next, or now, before this returns."""
        self._begun.append(self._thread.submit(self._try, memory))
        if now:
            self.raise_if_refused(wait=True)

    def raise_if_refused(self, wait: bool) -> None:
        """Raises HostMemoryError if an image was not locked that has to be."""
        while self._begun and (wait or self._begun[0].done()):
            self._begun.pop(0).result()

    def close(self) -> None:
        """What has not begun is not done. Idempotent."""
        self._thread.shutdown(cancel_futures=True)

    def _try(self, memory: HostImage) -> None:
        if self._refused:
            return
        try:
            lock_image(memory)
        except (BackendError, HostMemoryError) as error:
            if self._required:
                raise HostMemoryError(
                    f"{error}. host='pinned' needs page-locked memory (see `ulimit -l`, and the "
                    "limits of the container); host='pageable' and 'auto' do without"
                ) from error
            self._refused = True
            logger.warning("the machine locks no more memory (%s): the rest is pageable", error)
