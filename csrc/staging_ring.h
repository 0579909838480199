// The device memory through which packed chunks pass: the copy stream brings them here, a stream of
// this ring's own unpacks them from here into the slots.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <vector>

#include "backend/backend.h"

namespace wanoffload {

struct StagingMemory {
  std::vector<DeviceAddress> slots;  // equal, at multiples of 16; one: copies wait for unpacking
  std::size_t slot_bytes = 0;
};

// free -> open -> unpacking -> free. On the host a slot belongs from open() to unpack() or
// abandon() to one transfer. On the device two events order it, as they order a device slot:
// unpacking waits for `staged`, the next copy into the slot waits for `free`. Any thread may call
// any method.
//
// Slots are taken in turn, so copies run ahead of unpacking by as much as there is memory.
class StagingRing {
 public:
  struct Place {
    DeviceAddress address;
    std::size_t index;
  };

  // The memory outlives this object. Throws UsageError if it is not as StagingMemory says.
  StagingRing(const BackendPtr& backend, const StagingMemory& memory);

  // Throws UsageError unless chunks can be unpacked from, and to, this address.
  static void check_aligned(DeviceAddress address, const char* what);

  // Where chunks are unpacked. Of high priority: they pass beside large kernels that compute.
  [[nodiscard]] StreamHandle stream() const { return stream_.handle(); }
  [[nodiscard]] std::size_t slot_bytes() const { return slot_bytes_; }

  // Takes a slot, and makes `copies` wait until what it held is unpacked. The host waits only if
  // all slots are open, for the thread that will be the first to be done with one: so one that
  // keeps a slot open while it waits for something else must be the only one. Throws
  // TransferTimeout.
  [[nodiscard]] Place open(StreamHandle copies, Milliseconds timeout);
  // All of the chunk was enqueued on `copies`: unpacks it behind that. The slot is no longer open,
  // even if this throws.
  void unpack(const Place& place, const UnpackJob& job, StreamHandle copies);
  // The chunk will not be unpacked. Copies of it may be running: all copies into the slot are on
  // one stream.
  void abandon(const Place& place);

 private:
  enum class Read : std::uint8_t { kNever, kUnrecorded, kRecorded };
  struct Slot {
    DeviceAddress address;
    Event staged;              // behind the copy of a chunk
    Event free;                // behind its unpacking
    Read read = Read::kNever;  // whether it was unpacked from, and `free` stands behind that
  };

  [[nodiscard]] std::size_t take(Milliseconds timeout);
  void give_back(std::size_t index);
  void record_read(Slot& slot);

  const BackendPtr backend_;
  const std::size_t slot_bytes_;
  std::vector<Slot> slots_;  // each touched only by whom it belongs to

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::size_t> free_;  // guarded by mutex_; in the order in which they came free

  Stream stream_;  // last: it goes first, and on the host it drains then
};

}  // namespace wanoffload
