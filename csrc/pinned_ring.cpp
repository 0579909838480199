#include "pinned_ring.h"

#include <chrono>

#include "errors.h"

namespace wanoffload {

PinnedRing::PinnedRing(const BackendPtr& backend, std::size_t chunks, std::size_t chunk_bytes)
    : backend_(backend), chunk_bytes_(chunk_bytes), store_(backend) {
  if (chunks == 0 || chunk_bytes == 0) throw UsageError("a ring needs a chunk of a byte at least");
  memory_ = store_.allocate(chunks * chunk_bytes);
  memory_->lock();
  free_.reserve(chunks);
  for (std::size_t i = 0; i < chunks; ++i) {
    events_.emplace_back(backend);
    free_.push_back(chunks - 1 - i);
  }
}

PinnedRing::Chunk PinnedRing::check_out(Milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::unique_lock lock(mutex_);
  for (;;) {
    reap();
    if (!free_.empty()) {
      const std::size_t index = free_.back();
      free_.pop_back();
      return {memory_->data() + index * chunk_bytes_, index};
    }
    if (!in_flight_.empty()) {
      // Taken off the list first: the wait is without the lock, and nobody else may wait for it.
      const std::size_t index = in_flight_.front();
      in_flight_.pop_front();
      lock.unlock();
      try {
        synchronize(*backend_, events_[index].handle(), timeout);
      } catch (...) {
        lock.lock();
        in_flight_.push_front(index);
        changed_.notify_all();
        throw;
      }
      return {memory_->data() + index * chunk_bytes_, index};
    }
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) {
      throw TransferTimeout("no chunk of the pinned ring came free within " +
                            std::to_string(timeout.count()) + " ms");
    }
  }
}

// Chunks whose copies have ended come free, the one used last on top: as long as copies keep up,
// few chunks of a large ring are used again and again, and stay in the processor's caches.
void PinnedRing::reap() {
  while (!in_flight_.empty() && backend_->is_complete(events_[in_flight_.front()].handle())) {
    free_.push_back(in_flight_.front());
    in_flight_.pop_front();
  }
}

void PinnedRing::send(const Chunk& chunk, StreamHandle stream) {
  backend_->record(events_[chunk.index].handle(), stream);
  const std::lock_guard lock(mutex_);
  in_flight_.push_back(chunk.index);
  changed_.notify_all();
}

void PinnedRing::give_back(const Chunk& chunk) {
  const std::lock_guard lock(mutex_);
  free_.push_back(chunk.index);
  changed_.notify_all();
}

PinnedRing::Counts PinnedRing::counts() const {
  const std::lock_guard lock(mutex_);
  return {free_.size(), size() - free_.size() - in_flight_.size(), in_flight_.size()};
}

}  // namespace wanoffload
