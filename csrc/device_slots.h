// The fixed device memory where units land, and the two event edges of each slot: a fill waits for
// free[slot], a reader waits for ready[slot]. Nothing else orders copies and compute.
//
// Through the first slots, equal ones, any unit passes. Behind them stand homes: each is one unit's
// for good, for its plain bytes or for its packed ones. Homes may share memory, as in a ring: what
// is brought into one then ends what others held there, and waits, stretch by stretch, for the
// readers of what it overwrites.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "backend/backend.h"
#include "copy_engine.h"
#include "occupancy.h"

namespace wanoffload {

inline constexpr int kNoUnit = -1;

// Memory that outlives its use.
struct DeviceRange {
  DeviceAddress address = 0;
  std::size_t bytes = 0;
};

// A place on the device that is one unit's. What is brought there stays until a home that shares
// its memory is filled. None: the unit passes through the slots at each use.
struct Home {
  std::vector<DeviceRange> pieces;  // of the unit's bytes, in order; none: there is no home
  bool as_stored = false;           // packed bytes stay, and are unpacked into a slot for each use
  bool filled = false;              // they are there, by a copy that has ended

  explicit operator bool() const { return !pieces.empty(); }
};

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
  Slot(const BackendPtr& backend, std::vector<DeviceRange> ranges);

  std::vector<DeviceRange> pieces;
  std::size_t bytes;             // of all pieces
  bool shared = false;           // another slot has some of this memory, too
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
  // No addresses, if every unit will have a home. Stretches of fewer than `least_stretch` bytes
  // don't wait for their own readers alone: that many small copies would keep the link waiting.
  DeviceSlots(BackendPtr backend, const std::vector<DeviceAddress>& addresses,
              std::size_t slot_bytes, std::size_t least_stretch);

  // Slots and homes.
  [[nodiscard]] int size() const { return static_cast<int>(slots_.size()); }
  // Added so far.
  [[nodiscard]] int units() const { return static_cast<int>(homes_.size()); }
  // Slots through which units pass: the first ones.
  [[nodiscard]] int passing() const { return passing_; }
  [[nodiscard]] std::size_t slot_bytes() const { return slot_bytes_; }
  [[nodiscard]] Slot& operator[](int slot) { return slots_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] DeviceAddress address(int slot) const { return at(slot).pieces[0].address; }
  [[nodiscard]] const std::vector<DeviceRange>& pieces(int slot) const { return at(slot).pieces; }
  [[nodiscard]] int unit_in(int slot) const { return at(slot).unit; }
  // Appends a unit, in the order of their numbers; its home becomes the last slot. Nothing is
  // appended if this throws.
  void add_unit(const Home& home, CopyEngine& engine);
  // The slot that is the unit's home, or kNoSlot.
  [[nodiscard]] int home_of(int unit) const { return homes_[static_cast<std::size_t>(unit)].slot; }
  // Whether packed bytes stay in the unit's home.
  [[nodiscard]] bool keeps_packed(int unit) const;
  // Whether the unit is read in its home.
  [[nodiscard]] bool lives_at_home(int unit) const;
  // Whether the unit has a home where nothing else is ever brought.
  [[nodiscard]] bool stays(int unit) const;
  // The slot where the unit is or is being brought to be read, or kNoSlot.
  [[nodiscard]] int find(int unit) const;
  // Whether its home holds the unit's bytes. True only once nothing is under way.
  [[nodiscard]] bool filled(int unit) const;

  // The slots whose bytes a fill of this one overwrites, each once; itself, where it has some, or
  // a unit. Valid until the next call.
  [[nodiscard]] const std::vector<int>& holders(int slot);
  // Starts to bring an image into a slot. Its holders must be settled and unused; they lose what
  // they hold. The slot belongs to `unit` from here on, or to nobody if this throws.
  void fill(int slot, int unit, const ImagePtr& image, CopyEngine& engine);
  // The same from packed bytes that the device has at `source`, on the stream that will read the
  // slot. It counts among the slot's readers from here on, so that what is brought there next comes
  // behind the unpacking, even if this throws.
  void unpack(int slot, int unit, const ImagePtr& image, CopyEngine& engine, DeviceAddress source,
              StreamHandle reader);
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
  struct UnitHome {
    int slot;
    bool as_stored;
  };
  [[nodiscard]] const Slot& at(int slot) const { return slots_[static_cast<std::size_t>(slot)]; }
  void add_slot(std::vector<DeviceRange> pieces);
  void adopt(int slot, int unit, CopyEngine& engine);
  Transfer& make_way(int slot, const ImagePtr& image);
  void submit(int slot, int unit, CopyEngine& engine);
  void check_shares(const Slot& added) const;
  void mark_shared(Slot& added);
  void come_behind_holders(int slot);
  void come_behind_all(int slot);
  void come_behind(Transfer& transfer, Slot& holder);
  void take_over(int slot);
  SlotReader& reader_of(Slot& slot, StreamHandle stream);
  void record_reads(Slot& slot);

  const BackendPtr backend_;
  const std::size_t slot_bytes_;
  const std::size_t least_stretch_;
  const int passing_;
  std::deque<Slot> slots_;  // they stay where they are when homes come
  std::vector<UnitHome> homes_;
  Occupancy occupancy_;
  std::vector<int> holders_;  // what holders() found last
};

}  // namespace wanoffload
