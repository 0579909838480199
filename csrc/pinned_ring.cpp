#include "pinned_ring.h"

#include <chrono>
#include <utility>

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
    if (!free_.empty()) return take_free();
    if (in_flight_.empty() && unmarked_.size > 0) mark();
    if (!in_flight_.empty()) {
      // Taken off the list first: the wait is without the lock, and nobody else may wait for it.
      const Group oldest = in_flight_.front();
      in_flight_.pop_front();
      waited_for_ += oldest.size - 1;
      lock.unlock();
      try {
        synchronize(*backend_, events_[oldest.last()].handle(), timeout);
      } catch (...) {
        lock.lock();
        waited_for_ -= oldest.size - 1;
        in_flight_.push_front(oldest);
        changed_.notify_all();
        throw;
      }
      lock.lock();
      waited_for_ -= oldest.size - 1;
      set_free(oldest);
      changed_.notify_all();  // there may be one for somebody else
      return take_free();
    }
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) {
      throw TransferTimeout("no chunk of the pinned ring came free within " +
                            std::to_string(timeout.count()) + " ms");
    }
  }
}

void PinnedRing::set_free(const Group& group) {
  free_.insert(free_.end(), group.chunks.begin(), group.chunks.begin() + group.size);
}

PinnedRing::Chunk PinnedRing::take_free() {
  const std::size_t index = free_.back();
  free_.pop_back();
  return {memory_->data() + index * chunk_bytes_, index};
}

// Chunks whose copies have ended come free, the one used last on top: as long as copies keep up,
// few chunks of a large ring are used again and again, and stay in the processor's caches.
void PinnedRing::reap() {
  while (!in_flight_.empty() &&
         backend_->is_complete(events_[in_flight_.front().last()].handle())) {
    set_free(in_flight_.front());
    in_flight_.pop_front();
  }
}

// Puts an event behind what was sent without one.
void PinnedRing::mark() {
  backend_->record(events_[unmarked_.last()].handle(), stream_);
  in_flight_.push_back(std::exchange(unmarked_, Group{}));
}

void PinnedRing::send(const Chunk& chunk, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  if (unmarked_.size > 0 && stream != stream_) mark();
  unmarked_.chunks[unmarked_.size++] = chunk.index;
  stream_ = stream;
  if (unmarked_.size == kCopiesAnEvent) {
    try {
      mark();
    } catch (...) {
      --unmarked_.size;
      throw;
    }
  }
  changed_.notify_all();
}

void PinnedRing::give_back(const Chunk& chunk) {
  const std::lock_guard lock(mutex_);
  free_.push_back(chunk.index);
  changed_.notify_all();
}

PinnedRing::Counts PinnedRing::counts() const {
  const std::lock_guard lock(mutex_);
  std::size_t in_flight = unmarked_.size + waited_for_;
  for (const Group& group : in_flight_) in_flight += group.size;
  return {free_.size(), size() - free_.size() - in_flight, in_flight};
}

}  // namespace wanoffload
