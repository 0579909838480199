// A small model on the host backend: images whose bytes are known, plain and packed, in memory and
// in files, slots, streams, a prefetcher, and kernels that read a slot on a compute stream and are
// checked afterwards.
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
  int slots = 1;
  std::size_t slot_bytes = 0;
  double locked_share = 1;  // of the images in memory
  double file_share = 0;    // of all images
  double packed_share = 0;  // of all images
  int staging = 2;          // slots
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
  shape.staging = random.between(2, 4);
  shape.streams = random.between(0, 2);
  if (random.chance(0.6)) shape.copy_jitter_us = random.between(1, 300);
  if (random.chance(0.6)) shape.kernel_jitter_us = random.between(1, 300);
  shape.prefetch.depth = random.between(0, 6);
  shape.prefetch.engine.ring_chunks = random.between<std::size_t>(1, 6);
  shape.prefetch.engine.threads = random.between(1U, 4U);
  shape.prefetch.engine.timeout = Milliseconds(30'000);
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
    for (int unit = 0; unit < shape.units; ++unit) units_.push_back(new_unit(random));
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
  }
  void add_units() {
    while (prefetcher_->unit_count() < shape_.units) {
      const int unit = prefetcher_->unit_count();
      check_equal(prefetcher_->add_unit(image(unit)), unit, "the number of a unit");
    }
  }
  void build() {
    lock_images();
    make_prefetcher();
    add_units();
  }

  void set_poison(std::optional<std::uint8_t> value) {
    poison_ = value.has_value();
    prefetcher_->set_poison(value);
  }

  // A kernel: copies the unit's bytes out of its slot, in stream order. They are checked later,
  // against what the unit's bytes are now.
  void read(int unit, const Acquired& acquired, StreamHandle stream) {
    check_at_most(acquired.slot, shape_.slots - 1, "the slot of a unit");
    Reading& reading =
        readings_.emplace_back(Reading{unit, units_[index(unit)].content, acquired.slot,
                                       std::vector<std::byte>(image(unit)->plain_bytes())});
    device_->copy_to_device(reinterpret_cast<DeviceAddress>(reading.seen.data()),
                            slots_[index(acquired.slot)].data(), reading.seen.size(), stream);
  }
  // New bytes for a unit: written over those in memory, or in an image of any kind. The change it
  // returns can be repeated until it goes through.
  [[nodiscard]] std::function<void()> change(int unit, Random& random) {
    Unit& old = units_[index(unit)];
    if (old.memory && old.image->packing() == nullptr && random.chance(0.5)) {
      const auto content = random_content(random, old.image->bytes());
      return [this, unit, content, &old] {
        prefetcher_->invalidate(unit);
        old.content = content;
        write(*old.memory, *content);
      };
    }
    return [this, unit, fresh = new_unit(random), &old] {
      lock(fresh);
      prefetcher_->replace_unit(unit, fresh.image);
      old = fresh;
    };
  }
  // Changes a byte of a packed unit's chunk. The change back comes back; none if there is no chunk.
  [[nodiscard]] std::function<void()> spoil_chunk(int unit, Random& random) {
    const Unit& packed = units_[index(unit)];
    const auto& chunks = packed.image->packing()->chunks;
    if (chunks.empty()) return nullptr;
    prefetcher_->invalidate(unit);
    const PackedChunk& chunk = random.one_of(chunks);
    // Of its header: in the sections there is padding, which nobody looks at.
    std::byte* const place =
        packed.memory->data() + chunk.offset + random.between<std::size_t>(0, 11);
    *place ^= std::byte{0x40};
    return [this, unit, place] {
      prefetcher_->invalidate(unit);
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
    slots_.clear();
    staging_.clear();
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
  [[nodiscard]] bool poison() const { return poison_; }
  template <class Predicate>
  [[nodiscard]] std::uint64_t count_images(const Predicate& predicate) const {
    return static_cast<std::uint64_t>(std::count_if(
        units_.begin(), units_.end(), [&](const Unit& unit) { return predicate(*unit.image); }));
  }
  [[nodiscard]] std::uint64_t bytes_of_images() const {
    std::uint64_t sum = 0;
    for (const Unit& unit : units_) sum += unit.image->bytes();
    return sum;
  }

 private:
  using Content = std::shared_ptr<const std::vector<std::byte>>;
  struct Unit {
    ImagePtr image;
    HostImagePtr memory;  // where its bytes stand, if that is in memory
    bool to_lock = false;
    SourceFilePtr file;
    Content content;  // its bytes now
  };
  struct Reading {
    int unit;
    Content wanted;
    int slot;
    std::vector<std::byte> seen;  // stays where it is when the list grows
  };

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

  Unit new_unit(Random& random) {
    const std::size_t bytes = random.chance(0.1) ? 0
                              : random.chance(0.5)
                                  ? shape_.slot_bytes
                                  : random.between<std::size_t>(0, shape_.slot_bytes);
    if (!random.chance(shape_.packed_share)) {
      return stored_unit(random, pattern(random.seed(), bytes), 0.15);
    }
    PackedContent made = packed_content(random, bytes);
    Unit unit = stored_unit(random, std::move(made.packed), 0);
    unit.image = std::make_shared<PackedImage>(unit.image);
    unit.content = std::make_shared<const std::vector<std::byte>>(std::move(made.plain));
    return unit;
  }
  Unit stored_unit(Random& random, std::vector<std::byte> content, double gaps) {
    return random.chance(shape_.file_share) ? unit_in_files(random, std::move(content), gaps)
                                            : unit_in_memory(random, std::move(content));
  }
  Unit unit_in_memory(Random& random, std::vector<std::byte> content) {
    const auto image = HostStore(backend_, {false, 1}).allocate(content.size());
    write(*image, content);
    return {image, image, random.chance(shape_.locked_share), nullptr,
            std::make_shared<const std::vector<std::byte>>(std::move(content))};
  }
  Unit unit_in_files(Random& random, std::vector<std::byte> content, double gaps) {
    const bool words = content.size() % 4 == 0 && shape_.prefetch.engine.ring_chunk_bytes % 4 == 0;
    const bool unproven = words && !content.empty() && random.chance(0.3);
    ScatteredImage made = unproven ? unproven_image(random, std::move(content))
                                   : scattered_image(random, std::move(content), gaps);
    return {made.image, nullptr, false, made.file,
            std::make_shared<const std::vector<std::byte>>(std::move(made.content))};
  }

  const Shape shape_;
  bool poison_ = false;
  const std::shared_ptr<HostBackend> backend_;  // the engine's: its calls can be made to fail
  const std::shared_ptr<HostBackend> device_;   // the kernels'; streams and events fit both
  std::vector<Unit> units_;
  // Apart, so that a write beyond one is seen.
  std::vector<std::vector<std::byte>> slots_;
  std::vector<std::vector<std::byte>> staging_;
  std::vector<Reading> readings_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::optional<Prefetcher> prefetcher_;  // last: its destructor waits for the streams
};

}  // namespace wanoffload::stress
