// The way of everything that is not page-locked: a fixed ring of equal page-locked chunks.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <vector>

#include "backend/backend.h"
#include "host_store.h"

namespace wanoffload {

// free -> checked out -> in flight -> free. The host writes into a chunk only while it is checked
// out; a chunk in flight is free again when its copy has finished, never earlier.
// Invariant: free + checked_out + in_flight == size().
// Any thread may call any method.
class PinnedRing {
 public:
  struct Chunk {
    std::byte* data;
    std::size_t index;
  };
  struct Counts {
    std::size_t free, checked_out, in_flight;
  };

  PinnedRing(const BackendPtr& backend, std::size_t chunks, std::size_t chunk_bytes);

  [[nodiscard]] std::size_t size() const { return events_.size(); }
  [[nodiscard]] std::size_t chunk_bytes() const { return chunk_bytes_; }
  [[nodiscard]] std::size_t locked_bytes() const { return store_.locked_bytes(); }

  // Waits until a chunk is free: for one given back, or for the oldest copy in flight. Throws
  // TransferTimeout when none came free in time.
  [[nodiscard]] Chunk check_out(Milliseconds timeout);
  // The chunk's copy was enqueued on this stream; it comes free behind it, and behind the copy that
  // is sent next. If an event could not be recorded the chunk stays checked out and the error is
  // thrown.
  void send(const Chunk& chunk, StreamHandle stream);
  // The chunk was not used, or its copy is known to have ended.
  void give_back(const Chunk& chunk);
  [[nodiscard]] Counts counts() const;

 private:
  // An event between two copies of a few MiB costs the link a percent or two of its time: two
  // copies share one.
  static constexpr std::size_t kCopiesAnEvent = 2;

  // Chunks whose copies one event stands behind: that of the last of them.
  struct Group {
    std::array<std::size_t, kCopiesAnEvent> chunks{};
    std::size_t size = 0;

    [[nodiscard]] std::size_t last() const { return chunks[size - 1]; }
  };

  // With mutex_ held:
  void reap();
  void mark();
  void set_free(const Group& group);
  Chunk take_free();

  const BackendPtr backend_;
  const std::size_t chunk_bytes_;
  HostStore store_;
  HostImagePtr memory_;
  std::vector<Event> events_;  // one a chunk: the end of its last copy

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // guarded by mutex_
  std::vector<std::size_t> free_;
  std::deque<Group> in_flight_;  // oldest first
  Group unmarked_;               // sent, with no event behind them yet
  StreamHandle stream_ = 0;      // where those were sent
  std::size_t waited_for_ = 0;   // in flight, beside a chunk that a thread waits for to take it
};

}  // namespace wanoffload
