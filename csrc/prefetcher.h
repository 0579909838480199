// The order of units and how far ahead of their use they are fetched. The one class that the
// Python layer drives: acquire a unit, use it, release it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "copy_engine.h"
#include "device_slots.h"
#include "image.h"

namespace wanoffload {

struct PrefetchOptions {
  int depth = 2;  // units fetched ahead of the one in use; 0: each when it is needed
  std::size_t least_stretch = std::size_t{1} << 20;  // as DeviceSlots has it
  EngineOptions engine;
};

// Counted since construction or the last reset.
struct PrefetchStats {
  std::uint64_t acquires = 0;
  std::uint64_t cold = 0;           // acquires that had to start a fetch over the link
  std::uint64_t fetches = 0;        // into a slot or a home, over the link or within the device
  std::uint64_t bytes_fetched = 0;  // as they cross the link: of packed units, the packed bytes
  std::uint64_t invalidations = 0;  // prefetched bytes thrown away because the host's changed
  std::uint64_t failures = 0;       // fetches that failed
};

struct Acquired {
  int slot;
  std::uint64_t generation;  // hand it back to release
};

// Any number of units through any number of slots. Any thread may call any method; one lock.
// In the steady state, with page-locked images, no method waits for the device, allocates or makes
// an event. With other images acquire may wait until the engine has enqueued the unit's last chunk.
//
// The units behind the one acquired, `depth` of those that need the link, are submitted when the
// host has released their slots, while the device may still read those: the ring fills meanwhile
// (see CopyEngine).
// A unit with a home comes over the link once, and stays there until its host's bytes change, or a
// unit is brought to a home that shares its memory. It is read there; if its packed bytes stay
// there, acquire has the stream that it is acquired for unpack it into a slot first, which counts
// as a fetch of no bytes.
//
// While acquire waits for a unit, depth - 1 more are queued: with a depth of 2 the threads that
// read never run out of work, with 1 they pause at the end of each unit.
class Prefetcher {
 public:
  // `slots`: addresses of device memory that outlives this object, of `slot_bytes` each. None, if
  // every unit is read in a home.
  Prefetcher(const BackendPtr& backend, const std::vector<DeviceAddress>& slots,
             std::size_t slot_bytes, PrefetchOptions options);
  ~Prefetcher();

  // Appends a unit to the order and returns its number: 0, 1, ... Throws UsageError if it fits
  // neither its home nor, where it needs one, a slot.
  int add_unit(ImagePtr image, const Home& home = {});
  // Replaces the order. Throws UsageError unless it names every unit once.
  void set_order(const std::vector<int>& order);
  [[nodiscard]] std::vector<int> order() const;

  // Starts to fetch the units that come next in the order, from the first at the beginning.
  void prefetch();
  // Makes `stream` wait for the unit's bytes and returns the slot where they are. Fetches them if
  // nobody has. Throws TransferError when the fetch failed (the next acquire tries again),
  // TransferTimeout when it stalled, UsageError when every slot is in use.
  Acquired acquire(int unit, StreamHandle stream);
  // The work that reads the unit is enqueued on `stream`. Starts the next fetches.
  void release(int unit, StreamHandle stream, std::uint64_t generation);
  // Releases everything that is acquired, whatever it was: a forward ended early. `stream`: where
  // it ran. In the steady state nothing is, and nothing happens.
  void abandon(StreamHandle stream);
  // The host's bytes are about to change: waits until no copy reads them (for the device, if it
  // must), and forgets what was fetched. Throws UsageError if the unit is in use, TransferTimeout
  // if a copy stalled; unless it returns, the host's bytes must stay as they are.
  void invalidate(int unit);
  // Puts another image in the unit's place: invalidates, then lets the old one go, which no copy
  // reads any more. Throws what invalidate and add_unit throw; the unit then keeps its image.
  void replace_unit(int unit, ImagePtr image);
  // Whether the unit's home holds its bytes, so that another prefetcher may be given it as filled.
  // Once closed, for only then is nothing under way; false before. Throws UsageError if there is no
  // such unit.
  [[nodiscard]] bool home_filled(int unit) const;
  void set_poison(std::optional<std::uint8_t> value) { engine_.set_poison(value); }
  // Where the copies run, and where packed units are unpacked (0: there is no staging memory). For
  // tests and traces.
  [[nodiscard]] StreamHandle copy_stream() const { return engine_.stream(); }
  [[nodiscard]] StreamHandle unpack_stream() const { return engine_.unpack_stream(); }

  [[nodiscard]] int unit_count() const;
  [[nodiscard]] int slot_count() const { return slots_.passing(); }
  [[nodiscard]] std::size_t ring_bytes() const;
  [[nodiscard]] PrefetchStats stats() const;
  void reset_stats();
  // The last things that happened, newest last, a line each.
  [[nodiscard]] std::string recent_events() const;

  // Waits for copies and readers, then gives everything back; the slots' memory may be freed
  // afterwards. Idempotent; if it throws, it can be called again. Everything else throws
  // ClosedError from here on.
  void close();

 private:
  enum class Happened : std::uint8_t { kFetch, kFetchFailed, kAcquire, kRelease, kInvalidate };
  struct Record {
    Happened what;
    int unit;
    int slot;
  };

  [[nodiscard]] int units() const { return static_cast<int>(images_.size()); }
  void check_open() const;
  void check_open(int unit) const;
  void check_known(int unit) const;
  void make_room_for(const Image& image, const Home& home) const;
  [[nodiscard]] Home home_of(int unit) const;
  void forget(int unit);
  void rethrow_failure(int unit);
  int slot_with(int unit, StreamHandle stream);
  void bring(int unit, int slot);
  void unpack_from_home(int unit, int slot, StreamHandle stream);
  [[nodiscard]] bool fetch_ahead(int unit, int ahead);
  [[nodiscard]] bool may_take(int slot, int unit);
  [[nodiscard]] int coming(int places) const;
  [[nodiscard]] bool needs_link(int unit) const;
  [[nodiscard]] bool crosses_soon(int unit, int ahead) const;
  [[nodiscard]] int slot_to_give_up(int ahead) const;
  [[nodiscard]] int place_for(int unit, int ahead) const;
  [[nodiscard]] int horizon() const;
  void settle(int unit, int slot);
  void begin_read(int unit, int slot, StreamHandle stream);
  void wait_until_over(Transfer& transfer);
  void top_up();
  [[nodiscard]] int distance(int unit) const;
  void note(Happened what, int unit, int slot);
  [[nodiscard]] std::string events_text() const;
  [[nodiscard]] std::string with_events(const std::exception& cause) const;
  [[nodiscard]] std::string why(int unit, int slot, const std::exception& cause) const;

  const BackendPtr backend_;
  const PrefetchOptions options_;

  mutable std::mutex mutex_;
  // guarded by mutex_
  mutable DeviceSlots slots_;
  std::vector<ImagePtr> images_;              // by unit
  std::vector<std::exception_ptr> failures_;  // by unit: to be thrown by the next acquire
  std::vector<int> order_;                    // units
  std::vector<int> place_;                    // by unit: where it stands in order_
  int next_ = 0;                              // the place in order_ that is needed next
  bool closed_ = false;
  bool given_back_ = false;  // what close() gives back
  PrefetchStats stats_;
  std::array<Record, 48> records_{};  // a ring; what happened n-th stands at n % size
  std::uint64_t recorded_ = 0;

  CopyEngine engine_;  // last: its destructor waits for the copies that use everything above
};

}  // namespace wanoffload
