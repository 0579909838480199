// A small model on the host backend: images whose bytes are known, plain and packed, in memory and
// in files, slots, homes, some of which share memory, streams, a prefetcher, and kernels that read
// a slot or a home on a compute stream and are checked afterwards.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "backend/host_backend.h"
#include "check.h"
#include "file_image.h"
#include "host_store.h"
#include "packed_content.h"
#include "packed_image.h"
#include "prefetcher.h"
#include "scratch_file.h"

namespace wanoffload::stress {

struct Shape {
  int units = 1;
  int slots = 1;  // 0: every unit is read in a home
  std::size_t slot_bytes = 0;
  double locked_share = 1;  // of the images in memory
  double file_share = 0;    // of all images
  double packed_share = 0;  // of all images
  double home_share = 0;    // of all units
  double kept_share = 0;    // of the packed units with a home: their packed bytes stay there
  double shared_share = 0;  // of the other homes: they lie in one memory
  double shared_size = 1;   // of that memory, in slots; 1 or more
  bool ring = false;        // there, each begins where the one before ends; else they lie anywhere
  int staging = 2;          // slots; 0: the packed bytes of every packed unit stay in a home
  int streams = 1;          // to compute on; 0: the calling thread
  double copy_jitter_us = 0;
  double kernel_jitter_us = 0;
  PrefetchOptions prefetch;
};

// Slots of this size, and chunks so that some units are one chunk and some many.
inline void set_bytes(Random& random, Shape& shape, std::size_t slot_bytes) {
  shape.slot_bytes = slot_bytes;
  shape.prefetch.engine.ring_chunk_bytes =
      slot_bytes / random.between<std::size_t>(1, 12) + random.between<std::size_t>(1, 2);
  // So that files are read straight into a chunk.
  if (slot_bytes >= std::size_t{64} << 10) {
    shape.prefetch.engine.ring_chunk_bytes = random.one_of<std::size_t>({64 << 10, 68 << 10});
  }
}

inline void set_sharing(Random& random, Shape& shape) {
  shape.shared_share = random.one_of<double>({0, 0.5, 1, 1});
  shape.shared_size = 1 + random.one_of<int>({0, 1, 2, 5, 8, 20}) / 4.0;
  shape.ring = random.chance(0.5);
  shape.prefetch.least_stretch =
      random.chance(0.6) ? 1 : random.between<std::size_t>(1, shape.slot_bytes + 1);
}

// Worlds without slots, and without staging memory, among them.
inline void set_homes(Random& random, Shape& shape) {
  set_sharing(random, shape);
  shape.home_share = random.one_of<double>({0, 0, 0.5, 1});
  shape.kept_share = random.one_of<double>({0, 0.5, 1, 1});
  if (shape.home_share == 0) return;
  if (random.chance(0.2)) {
    shape.slots = 0;
  } else if (random.chance(0.2)) {
    shape.staging = 0;
  }
}

inline Shape random_shape(Random& random, int most_units) {
  Shape shape;
  shape.units = random.between(1, most_units);
  shape.slots = random.between(1, 5);
  set_bytes(random, shape,
            random.one_of<std::size_t>({0, 1, 4096, random.between<std::size_t>(1, 500),
                                        random.between<std::size_t>(1, 9000),
                                        random.chance(0.5) ? std::size_t{200} << 10 : 4097}));
  shape.locked_share = random.one_of<double>({0, 0.5, 1});
  shape.file_share = random.one_of<double>({0, 0.5, 1});
  shape.packed_share = random.one_of<double>({0, 0.5, 1});
  shape.staging = random.between(1, 4);
  shape.streams = random.between(0, 2);
  if (random.chance(0.6)) shape.copy_jitter_us = random.between(1, 300);
  if (random.chance(0.6)) shape.kernel_jitter_us = random.between(1, 300);
  shape.prefetch.depth = random.between(0, 6);
  shape.prefetch.engine.ring_chunks = random.between<std::size_t>(1, 6);
  shape.prefetch.engine.threads = random.between(1U, 4U);
  shape.prefetch.engine.timeout = Milliseconds(30'000);
  set_homes(random, shape);
  return shape;
}

class World {
 public:
  World(Random& random, const Shape& shape)
      : shape_(shape),
        backend_(
            std::make_shared<HostBackend>(HostOptions{0, 0, shape.copy_jitter_us, random.seed()})),
        device_(std::make_shared<HostBackend>(
            HostOptions{0, 0, shape.kernel_jitter_us, random.seed()})) {
    shared_.assign(std::max<std::size_t>(shared_bytes(), 1), kUntouched);
    for (int unit = 0; unit < shape.units; ++unit) {
      const bool packed = random.chance(shape.packed_share);
      homes_.push_back(new_home(random, packed));
      units_.push_back(new_unit(random, packed, homes_.back().bytes, homes_.back().kept));
    }
    find_rivals();
    for (int i = 0; i < shape.slots; ++i) slots_.emplace_back(shape.slot_bytes);
    for (int i = 0; i < shape.staging; ++i) staging_.emplace_back(staging_bytes());
    for (int i = 0; i < shape.streams; ++i) streams_.push_back(std::make_unique<Stream>(device_));
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() { check_bytes_read(); }

  // Three steps, each of which the backend may refuse; each can be repeated.
  void lock_images() {
    for (const Unit& unit : units_) lock(unit);
  }
  void make_prefetcher() {
    std::vector<DeviceAddress> addresses;
    for (auto& slot : slots_) addresses.push_back(reinterpret_cast<DeviceAddress>(slot.data()));
    PrefetchOptions options = shape_.prefetch;
    options.engine.staging.slot_bytes = staging_bytes();
    for (auto& slot : staging_) {
      options.engine.staging.slots.push_back(reinterpret_cast<DeviceAddress>(slot.data()));
    }
    prefetcher_.emplace(backend_, addresses, shape_.slot_bytes, options);
    if (poison_) prefetcher_->set_poison(poison_);
  }
  // A unit whose add_unit throws has not been added.
  void add_units() {
    for (int unit = prefetcher_->unit_count(); unit < shape_.units; ++unit) {
      check_equal(prefetcher_->unit_count(), unit, "units");
      add_unit(unit);
    }
  }
  void build() {
    lock_images();
    make_prefetcher();
    add_units();
  }

  void set_poison(std::optional<std::uint8_t> value) {
    poison_ = value;
    prefetcher_->set_poison(value);
  }

  // Closes the prefetcher, whatever it is at, and changes some units while there is none. What
  // builds the next one gives it the homes that hold what they should. Can be repeated.
  void close_for_another(Random& random) {
    prefetcher_->close();
    for (int unit = 0; unit < shape_.units; ++unit) {
      homes_[index(unit)].filled = prefetcher_->home_filled(unit);
    }
    link_bytes_ += prefetcher_->stats().bytes_fetched;
    prefetcher_.reset();
    for (int unit = 0; unit < shape_.units; ++unit) {
      if (!random.chance(0.2)) continue;
      units_[index(unit)] = another_unit(unit, random);
      homes_[index(unit)].filled = false;
    }
  }

  // A kernel: copies the unit's bytes out of its slot, in stream order. They are checked later,
  // against what the unit's bytes are now.
  void read(int unit, const Acquired& acquired, StreamHandle stream) {
    note_crossed(unit);
    Reading& reading =
        readings_.emplace_back(Reading{unit, units_[index(unit)].content, acquired.slot,
                                       std::vector<std::byte>(image(unit)->plain_bytes())});
    auto seen = reinterpret_cast<DeviceAddress>(reading.seen.data());
    std::size_t left = reading.seen.size();
    for (const DeviceRange& piece : place_of(unit, acquired.slot)) {
      const std::size_t bytes = std::min(left, piece.bytes);
      device_->copy_to_device(seen, reinterpret_cast<const std::byte*>(piece.address), bytes,
                              stream);
      seen += bytes;
      left -= bytes;
    }
    check_equal(left, 0U, "bytes of a unit that have no place");
  }
  // New bytes for a unit: written over those in memory, or in an image of any kind that fits its
  // home. The change it returns can be repeated until it goes through.
  [[nodiscard]] std::function<void()> change(int unit, Random& random) {
    Unit& old = units_[index(unit)];
    if (old.memory && random.chance(0.5)) {
      return [this, unit, fresh = other_bytes(old, random), &old] {
        prefetcher_->invalidate(unit);
        old.content = fresh.plain;
        write(*old.memory, *fresh.stored);
        note_changed(unit);
      };
    }
    return [this, unit, fresh = another_unit(unit, random), &old] {
      lock(fresh);
      prefetcher_->replace_unit(unit, fresh.image);
      old = fresh;
      note_changed(unit);
    };
  }
  // Changes a byte of a packed unit's chunk. The change back comes back; none if there is no chunk.
  [[nodiscard]] std::function<void()> spoil_chunk(int unit, Random& random) {
    const Unit& packed = units_[index(unit)];
    const auto& chunks = packed.image->packing()->chunks;
    if (chunks.empty()) return nullptr;
    prefetcher_->invalidate(unit);
    note_changed(unit);
    const PackedChunk& chunk = random.one_of(chunks);
    // Of its header: in the sections there is padding, which nobody looks at.
    std::byte* const place =
        packed.memory->data() + chunk.offset + random.between<std::size_t>(0, 11);
    *place ^= std::byte{0x40};
    return [this, unit, place] {
      prefetcher_->invalidate(unit);
      note_changed(unit);
      *place ^= std::byte{0x40};
    };
  }
  // What is enqueued on `second` from here on comes behind what is on `first` now.
  void join(StreamHandle first, StreamHandle second) {
    const Event event(device_);
    device_->record(event.handle(), first);
    device_->wait(second, event.handle());
  }
  // Waits for the kernels, then looks at what they read.
  void check_bytes_read() {
    for (const auto& stream : streams_) {
      const Event event(device_);
      device_->record(event.handle(), stream->handle());
      synchronize(*device_, event.handle(), Milliseconds(30'000));
    }
    for (const Reading& reading : readings_) {
      check_bytes(
          reading.seen, *reading.wanted,
          "unit " + std::to_string(reading.unit) + " in slot " + std::to_string(reading.slot));
    }
    readings_.clear();
  }
  // The memory of the slots goes as soon as the prefetcher says that it may.
  void close() {
    prefetcher_->close();
    check_untouched();
    shared_ = {};
    slots_.clear();
    staging_.clear();
    for (UnitHome& home : homes_) home.memory = {};
  }
  // In worlds where every unit has a home: each crosses the link once until its bytes change, or
  // another takes its memory. Not for those where something failed.
  void check_link_bytes() const {
    for (int unit = 0; unit < shape_.units; ++unit) {
      if (!has_home(unit)) return;
    }
    const std::uint64_t bytes = link_bytes_ + prefetcher_->stats().bytes_fetched;
    check_at_most(least_link_bytes_, bytes, "bytes that must have crossed the link");
    if (fetches_are_known()) check_at_most(bytes, most_link_bytes_, "bytes that crossed the link");
  }
  // Once closed: what was read at home, or from there, is there, unless it may have had to go
  // since. Not if something failed.
  void check_homes() const {
    for (int unit = 0; unit < shape_.units; ++unit) {
      const UnitHome& home = homes_[index(unit)];
      const bool filled = prefetcher_->home_filled(unit);
      if (!has_home(unit)) check(!filled, "no home is filled");
      const bool known = !shares(unit) || fetches_are_known();
      if (has_home(unit) && home.crossed && known) check(filled, "the home is filled");
      for (const int rival : home.rivals) {
        check(!filled || !prefetcher_->home_filled(rival), "one of two homes is filled");
      }
    }
  }
  void reset_stats() {
    link_bytes_ += prefetcher_->stats().bytes_fetched;
    prefetcher_->reset_stats();
  }

  // One stream for a whole forward.
  [[nodiscard]] StreamHandle stream(int turn) const {
    if (streams_.empty()) return 0;
    return streams_[index(turn) % streams_.size()]->handle();
  }
  // Makes a stream late: what is enqueued on it from here on starts after this time.
  static void stall(StreamHandle stream, int milliseconds) {
    HostBackend slow({0, 1000.0 * milliseconds, 0, 0});
    std::byte nothing{};
    slow.copy_to_device(reinterpret_cast<DeviceAddress>(&nothing), &nothing, 0, stream);
  }

  [[nodiscard]] const Shape& shape() const { return shape_; }
  [[nodiscard]] HostBackend& backend() { return *backend_; }
  [[nodiscard]] Prefetcher& prefetcher() { return *prefetcher_; }
  // Gives up what close() refused to give back. The images go when the prefetcher lets them.
  void drop_prefetcher() {
    for (Unit& unit : units_) unit = {};
    prefetcher_.reset();
  }
  [[nodiscard]] const ImagePtr& image(int unit) const { return units_[index(unit)].image; }
  // A file that a unit is read from, or null.
  [[nodiscard]] SourceFilePtr file(int unit) const { return units_[index(unit)].file; }
  [[nodiscard]] bool poison() const { return poison_.has_value(); }
  [[nodiscard]] bool has_home(int unit) const { return homes_[index(unit)].there; }
  // Packed bytes stay there.
  [[nodiscard]] bool kept(int unit) const { return homes_[index(unit)].kept; }
  [[nodiscard]] bool lives_at_home(int unit) const { return has_home(unit) && !kept(unit); }
  // Units whose homes have memory in common with this one's.
  [[nodiscard]] const std::vector<int>& rivals(int unit) const {
    return homes_[index(unit)].rivals;
  }
  // Whether others are brought to its home, so that it comes over the link at each use.
  [[nodiscard]] bool shares(int unit) const { return !rivals(unit).empty(); }
  // Whether its bytes come over the link at each use, if they don't stay in a slot.
  [[nodiscard]] bool crosses(int unit) const { return !has_home(unit) || shares(unit); }
  [[nodiscard]] std::uint64_t bytes_of_crossing_images() const {
    std::uint64_t sum = 0;
    for (int unit = 0; unit < shape_.units; ++unit) {
      if (crosses(unit)) sum += image(unit)->bytes();
    }
    return sum;
  }
  // Runs of bytes of its home that are one unit's as a whole, at most.
  [[nodiscard]] std::size_t most_stretches(int unit) const {
    std::size_t sum = homes_[index(unit)].pieces.size();
    for (const int rival : rivals(unit)) sum += 2 * homes_[index(rival)].pieces.size();
    return sum;
  }
  [[nodiscard]] int sharing_units() const {
    int count = 0;
    for (int unit = 0; unit < shape_.units; ++unit) count += shares(unit) ? 1 : 0;
    return count;
  }
  // Units that need a slot for each use.
  [[nodiscard]] int passing_units() const {
    int count = 0;
    for (int unit = 0; unit < shape_.units; ++unit) count += lives_at_home(unit) ? 0 : 1;
    return count;
  }
  template <class Predicate>
  [[nodiscard]] std::uint64_t count_images(const Predicate& predicate) const {
    return static_cast<std::uint64_t>(std::count_if(
        units_.begin(), units_.end(), [&](const Unit& unit) { return predicate(*unit.image); }));
  }

 private:
  using Content = std::shared_ptr<const std::vector<std::byte>>;
  struct Bytes {
    Content stored;
    Content plain;
  };
  struct Unit {
    ImagePtr image;
    HostImagePtr memory;  // where its bytes stand, if that is in memory
    bool to_lock = false;
    SourceFilePtr file;
    Content content;                    // its bytes now
    std::vector<PackedTensor> tensors;  // of a packed one
  };
  struct Run {
    std::size_t begin, bytes;
  };
  // Memory of its own on the device, for the unit's plain bytes or its packed ones; or, for plain
  // bytes, pieces of the memory that is shared.
  struct UnitHome {
    bool there;
    std::size_t bytes;              // that may be used; of the slots, if there is no home
    std::vector<std::byte> memory;  // not empty, even if no byte of it is used, if it is its own
    bool kept = false;
    std::vector<Run> pieces{};  // of the shared memory
    std::vector<int> rivals{};  // who has some of the same bytes
    bool filled = false;        // to be given to the next prefetcher as filled
    bool crossed = false;       // the bytes of now have come over the link, or been adopted
  };
  struct Reading {
    int unit;
    Content wanted;
    int slot;
    std::vector<std::byte> seen;  // stays where it is when the list grows
  };

  static constexpr std::byte kUntouched{0xD5};
  static std::size_t index(int number) { return static_cast<std::size_t>(number); }
  static Content random_content(Random& random, std::size_t bytes) {
    return std::make_shared<const std::vector<std::byte>>(pattern(random.seed(), bytes));
  }
  static void write(const HostImage& image, const std::vector<std::byte>& content) {
    std::copy(content.begin(), content.end(), image.data());
  }
  static void lock(const Unit& unit) {
    if (unit.to_lock) unit.memory->lock();
  }

  // A chunk that no packing makes smaller, and its table.
  [[nodiscard]] std::size_t staging_bytes() const { return shape_.slot_bytes + 4096; }

  // As large as what comes first may need, or larger.
  UnitHome new_home(Random& random, bool packed) {
    const bool kept =
        packed && shape_.slots > 0 && (shape_.staging == 0 || random.chance(shape_.kept_share));
    const bool must = shape_.slots == 0 || (packed && shape_.staging == 0);
    if (!must && !random.chance(shape_.home_share)) return {false, shape_.slot_bytes, {}};
    const std::size_t least = kept ? packed::kAlignment : 0;
    const std::size_t bytes =
        random.chance(0.5) ? shape_.slot_bytes + (kept ? 4096 : 0)
                           : std::max(least, random.between<std::size_t>(0, shape_.slot_bytes));
    if (!kept && random.chance(shape_.shared_share)) {
      return {true, bytes, {}, false, shared_place(random, bytes, packed)};
    }
    return {true, bytes, std::vector(std::max<std::size_t>(bytes, 1), kUntouched), kept};
  }

  [[nodiscard]] std::size_t shared_bytes() const {
    return static_cast<std::size_t>(static_cast<double>(shape_.slot_bytes) * shape_.shared_size);
  }
  // Packed images are unpacked to one run, at a multiple of 16.
  std::vector<Run> shared_place(Random& random, std::size_t bytes, bool packed) {
    if (shape_.ring) return place_in_ring(bytes, packed);
    const std::size_t room = shared_bytes() - bytes;
    if (packed) return {{random.between<std::size_t>(0, room / 16) * 16, bytes}};
    return place_anywhere(random, bytes, random.between<std::size_t>(1, 4));
  }
  std::vector<Run> place_in_ring(std::size_t bytes, bool packed) {
    std::size_t begin = packed ? (ring_end_ + 15) / 16 * 16 : ring_end_;
    if (begin >= shared_bytes() || (packed && begin + bytes > shared_bytes())) begin = 0;
    const std::size_t first = std::min(bytes, shared_bytes() - begin);
    ring_end_ = first < bytes ? bytes - first : begin + bytes;
    if (first == bytes) return {{begin, bytes}};
    return {{begin, first}, {0, bytes - first}};
  }
  // Pieces, perhaps some of no bytes, that don't overlap, in any order.
  std::vector<Run> place_anywhere(Random& random, std::size_t bytes, std::size_t count) const {
    const auto sorted = [&](std::size_t most, std::size_t numbers) {
      std::vector<std::size_t> result;
      while (result.size() < numbers) result.push_back(random.between<std::size_t>(0, most));
      std::sort(result.begin(), result.end());
      return result;
    };
    auto ends = sorted(bytes, count - 1);
    ends.push_back(bytes);
    const auto gaps = sorted(shared_bytes() - bytes, count);
    std::vector<Run> pieces;
    std::size_t done = 0;
    for (std::size_t i = 0; i < count; ++i) {
      pieces.push_back({gaps[i] + done, ends[i] - done});
      done = ends[i];
    }
    random.shuffle(pieces);
    return pieces;
  }
  void find_rivals() {
    for (int one = 0; one < shape_.units; ++one) {
      for (int other = 0; other < shape_.units; ++other) {
        if (one == other || !overlap(homes_[index(one)].pieces, homes_[index(other)].pieces)) {
          continue;
        }
        homes_[index(one)].rivals.push_back(other);
      }
    }
  }
  static bool overlap(const std::vector<Run>& some, const std::vector<Run>& others) {
    for (const Run& a : some) {
      for (const Run& b : others) {
        if (std::max(a.begin, b.begin) < std::min(a.begin + a.bytes, b.begin + b.bytes)) {
          return true;
        }
      }
    }
    return false;
  }
  [[nodiscard]] std::vector<DeviceRange> place_of_home(const UnitHome& home) const {
    if (home.pieces.empty()) {
      return {{reinterpret_cast<DeviceAddress>(home.memory.data()), home.bytes}};
    }
    std::vector<DeviceRange> place;
    for (const Run& piece : home.pieces) {
      place.push_back({reinterpret_cast<DeviceAddress>(shared_.data() + piece.begin), piece.bytes});
    }
    return place;
  }
  // Where an acquired unit is to be read.
  [[nodiscard]] std::vector<DeviceRange> place_of(int unit, int slot) const {
    if (lives_at_home(unit)) {
      check_equal(slot, home_slot(unit), "the slot that is the unit's home");
      return place_of_home(homes_[index(unit)]);
    }
    check_at_most(slot, shape_.slots - 1, "the slot of a unit");
    return {{reinterpret_cast<DeviceAddress>(slots_[index(slot)].data()), shape_.slot_bytes}};
  }
  // Of the shared memory, what is nobody's place is as it was.
  void check_untouched() const {
    std::vector<bool> used(shared_.size());
    for (const UnitHome& home : homes_) {
      for (const Run& piece : home.pieces) {
        std::fill_n(used.begin() + static_cast<std::ptrdiff_t>(piece.begin), piece.bytes, true);
      }
    }
    for (std::size_t i = 0; i < shared_.size(); ++i) {
      check(used[i] || shared_[i] == kUntouched, "nothing is written where no home is");
    }
  }
  // Whether each fetch is one that an acquire could not do without.
  [[nodiscard]] bool fetches_are_known() const {
    return shape_.prefetch.depth == 0 || sharing_units() == 0;
  }
  [[nodiscard]] int home_slot(int unit) const {
    int slot = shape_.slots;
    for (int before = 0; before < unit; ++before) slot += has_home(before) ? 1 : 0;
    return slot;
  }
  void add_unit(int unit) {
    UnitHome& home = homes_[index(unit)];
    Home given;
    if (has_home(unit)) given = {place_of_home(home), home.kept, home.filled};
    check_equal(prefetcher_->add_unit(image(unit), given), unit, "the number of a unit");
    home.crossed = home.filled;
    if (!home.filled && !shares(unit)) most_link_bytes_ += image(unit)->bytes();
  }

  void note_changed(int unit) {
    homes_[index(unit)].crossed = false;
    if (!shares(unit)) most_link_bytes_ += image(unit)->bytes();
  }
  // It is read now. Who shares its memory has to come again.
  void note_crossed(int unit) {
    UnitHome& home = homes_[index(unit)];
    if (!home.crossed) {
      least_link_bytes_ += image(unit)->bytes();
      if (shares(unit)) most_link_bytes_ += image(unit)->bytes();
    }
    home.crossed = true;
    for (const int rival : home.rivals) homes_[index(rival)].crossed = false;
  }

  // `room`: for its plain bytes, or, if they are kept, for its packed ones.
  Unit new_unit(Random& random, bool packed, std::size_t room, bool kept) {
    const std::size_t most = std::min(room, shape_.slot_bytes);
    std::size_t bytes = random.chance(0.1)   ? 0
                        : random.chance(0.5) ? most
                                             : random.between<std::size_t>(0, most);
    if (!packed) return stored_unit(random, pattern(random.seed(), bytes), 0.15);
    PackedContent made = packed_content(random, bytes);
    while (kept && made.packed.size() > room) made = packed_content(random, bytes /= 2);
    Unit unit = stored_unit(random, std::move(made.packed), 0);
    unit.image = std::make_shared<PackedImage>(unit.image);
    unit.content = std::make_shared<const std::vector<std::byte>>(std::move(made.plain));
    unit.tensors = std::move(made.tensors);
    return unit;
  }
  // Of a kind that may take the unit's place.
  Unit another_unit(int unit, Random& random) {
    const UnitHome& home = homes_[index(unit)];
    const bool fits =
        home.pieces.empty() || (home.pieces.size() == 1 && home.pieces[0].begin % 16 == 0);
    const bool packed =
        home.kept || (fits && shape_.staging > 0 && random.chance(shape_.packed_share));
    return new_unit(random, packed, home.bytes, home.kept);
  }
  // What may be written over the unit's bytes in memory, and the plain bytes of that: packed ones
  // must lie as before, so that the exponents stay.
  static Bytes other_bytes(const Unit& unit, Random& random) {
    if (unit.image->packing() == nullptr) {
      const Content content = random_content(random, unit.image->bytes());
      return {content, content};
    }
    PackedContent made = with_other_signs(*unit.content, unit.tensors, random);
    check_equal(made.packed.size(), unit.image->bytes(), "packed bytes with other signs");
    return {std::make_shared<const std::vector<std::byte>>(std::move(made.packed)),
            std::make_shared<const std::vector<std::byte>>(std::move(made.plain))};
  }
  Unit stored_unit(Random& random, std::vector<std::byte> content, double gaps) {
    return random.chance(shape_.file_share) ? unit_in_files(random, std::move(content), gaps)
                                            : unit_in_memory(random, std::move(content));
  }
  Unit unit_in_memory(Random& random, std::vector<std::byte> content) {
    const auto image = HostStore(backend_, {false, 1}).allocate(content.size());
    write(*image, content);
    return {image,
            image,
            random.chance(shape_.locked_share),
            nullptr,
            std::make_shared<const std::vector<std::byte>>(std::move(content)),
            {}};
  }
  Unit unit_in_files(Random& random, std::vector<std::byte> content, double gaps) {
    const bool words = content.size() % 4 == 0 && shape_.prefetch.engine.ring_chunk_bytes % 4 == 0;
    const bool unproven = words && !content.empty() && random.chance(0.3);
    ScatteredImage made = unproven ? unproven_image(random, std::move(content))
                                   : scattered_image(random, std::move(content), gaps);
    return {made.image,
            nullptr,
            false,
            made.file,
            std::make_shared<const std::vector<std::byte>>(std::move(made.content)),
            {}};
  }

  const Shape shape_;
  std::optional<std::uint8_t> poison_;
  const std::shared_ptr<HostBackend> backend_;  // the engine's: its calls can be made to fail
  const std::shared_ptr<HostBackend> device_;   // the kernels'; streams and events fit both
  std::vector<Unit> units_;
  // Apart, so that a write beyond one is seen.
  std::vector<std::vector<std::byte>> slots_;
  std::vector<std::vector<std::byte>> staging_;
  std::vector<std::byte> shared_;       // by homes; each lies at the same place all the time
  std::size_t ring_end_ = 0;            // where the next one begins, in a ring
  std::vector<UnitHome> homes_;         // by unit
  std::uint64_t link_bytes_ = 0;        // that crossed the link until the stats were reset
  std::uint64_t most_link_bytes_ = 0;   // of what has been to be brought to homes so far
  std::uint64_t least_link_bytes_ = 0;  // and was read
  std::vector<Reading> readings_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::optional<Prefetcher> prefetcher_;  // last: its destructor waits for the streams
};

}  // namespace wanoffload::stress
