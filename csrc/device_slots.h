// The fixed device memory where units land, and the two event edges of each slot: a fill waits for
// free[slot], a reader waits for ready[slot]. Nothing else orders copies and compute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "copy_engine.h"

namespace wanoffload {

inline constexpr int kNoUnit = -1;

// One reading stream of a slot and the event behind its last read. Made once for each stream that
// ever reads the slot.
struct SlotReader {
  StreamHandle stream;
  Event free;
  bool read = false;      // since the slot was filled
  bool recorded = false;  // and `free` stands behind that read
};

// empty -> filling -> ready -> in use -> released, and from there filled again. The host does not
// know when filling turns to ready: the events do.
struct Slot {
  explicit Slot(const BackendPtr& backend) : ready(backend) {}

  int unit = kNoUnit;            // whose bytes are here or on their way
  std::uint64_t generation = 0;  // grows with each fill
  int users = 0;                 // acquired and not yet released
  bool fresh = false;            // filled, and not read since
  Event ready;
  std::vector<SlotReader> readers;
  Transfer transfer;
};

// Not synchronised: the prefetcher's lock guards it.
class DeviceSlots {
 public:
  DeviceSlots(BackendPtr backend, const std::vector<DeviceAddress>& addresses,
              std::size_t slot_bytes);

  [[nodiscard]] int size() const { return static_cast<int>(slots_.size()); }
  [[nodiscard]] std::size_t slot_bytes() const { return slot_bytes_; }
  [[nodiscard]] Slot& operator[](int slot) { return slots_[static_cast<std::size_t>(slot)]; }
  // The slot that holds this unit, or -1.
  [[nodiscard]] int find(int unit) const;

  // Starts to bring an image into a slot that nobody uses. The slot belongs to `unit` from here
  // on, or to nobody if this throws.
  void fill(int slot, int unit, const ImagePtr& image, CopyEngine& engine);
  // Makes `stream` wait for the slot's bytes and counts one user. The transfer must be settled.
  // Throws TransferError if the bytes are known to be spoilt, which the host backend tells when
  // `stream` is the calling thread.
  void begin_read(int slot, StreamHandle stream);
  // The user's work is enqueued on `stream`: a later fill waits for it. If the event cannot be
  // recorded the error is thrown, and the next fill tries again before it writes.
  void end_read(int slot, StreamHandle stream);
  // The slot belongs to nobody. Later fills still wait for its readers.
  void drop(int slot);
  // Waits for the device until the slot's readers have finished, released or not.
  void wait_for_readers(int slot, Milliseconds timeout);

 private:
  SlotReader& reader_of(Slot& slot, StreamHandle stream);
  void record_reads(Slot& slot);

  const BackendPtr backend_;
  const std::size_t slot_bytes_;
  std::vector<Slot> slots_;
};

}  // namespace wanoffload
