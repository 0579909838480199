// A small model on the host backend: images whose bytes are known, slots, streams, a prefetcher,
// and kernels that read a slot on a compute stream and are checked afterwards.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "backend/host_backend.h"
#include "check.h"
#include "host_store.h"
#include "prefetcher.h"

namespace wanoffload::stress {

struct Shape {
  int units = 1;
  int slots = 1;
  std::size_t slot_bytes = 0;
  double locked_share = 1;  // of the images
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
}

inline Shape random_shape(Random& random, int most_units) {
  Shape shape;
  shape.units = random.between(1, most_units);
  shape.slots = random.between(1, 5);
  set_bytes(random, shape,
            random.one_of<std::size_t>({0, 1, 4096, random.between<std::size_t>(1, 500),
                                        random.between<std::size_t>(1, 9000)}));
  shape.locked_share = random.one_of<double>({0, 0.5, 1});
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
    HostStore store(backend_, {false, 1});
    for (int unit = 0; unit < shape.units; ++unit) {
      const std::size_t bytes = random.chance(0.1) ? 0
                                : random.chance(0.5)
                                    ? shape.slot_bytes
                                    : random.between<std::size_t>(0, shape.slot_bytes);
      units_.push_back({store.allocate(bytes), random.chance(shape.locked_share), random.seed()});
      write(unit);
    }
    for (int i = 0; i < shape.slots; ++i) slots_.emplace_back(shape.slot_bytes);
    for (int i = 0; i < shape.streams; ++i) streams_.push_back(std::make_unique<Stream>(device_));
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() { check_bytes_read(); }

  // Three steps, each of which the backend may refuse; each can be repeated.
  void lock_images() {
    for (Unit& unit : units_) {
      if (unit.locked) unit.image->lock();
    }
  }
  void make_prefetcher() {
    std::vector<DeviceAddress> addresses;
    for (auto& slot : slots_) addresses.push_back(reinterpret_cast<DeviceAddress>(slot.data()));
    prefetcher_.emplace(backend_, addresses, shape_.slot_bytes, shape_.prefetch);
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
        readings_.emplace_back(Reading{unit, units_[index(unit)].key, acquired.slot,
                                       std::vector<std::byte>(image(unit)->bytes())});
    device_->copy_to_device(reinterpret_cast<DeviceAddress>(reading.seen.data()),
                            slots_[index(acquired.slot)].data(), reading.seen.size(), stream);
  }
  // New bytes for a unit whose bytes the engine no longer reads.
  void rewrite(int unit, Random& random) {
    units_[index(unit)].key = random.seed();
    write(unit);
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
          reading.seen, pattern(reading.key, reading.seen.size()),
          "unit " + std::to_string(reading.unit) + " in slot " + std::to_string(reading.slot));
    }
    readings_.clear();
  }
  // The memory of the slots goes as soon as the prefetcher says that it may.
  void close() {
    prefetcher_->close();
    slots_.clear();
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
    for (Unit& unit : units_) unit.image.reset();
    prefetcher_.reset();
  }
  [[nodiscard]] const HostImagePtr& image(int unit) const { return units_[index(unit)].image; }
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
  struct Unit {
    HostImagePtr image;
    bool locked;
    std::uint64_t key;  // of its bytes now
  };
  struct Reading {
    int unit;
    std::uint64_t key;
    int slot;
    std::vector<std::byte> seen;  // stays where it is when the list grows
  };

  static std::size_t index(int number) { return static_cast<std::size_t>(number); }
  void write(int unit) {
    const auto content = pattern(units_[index(unit)].key, image(unit)->bytes());
    std::copy(content.begin(), content.end(), image(unit)->data());
  }

  const Shape shape_;
  bool poison_ = false;
  const std::shared_ptr<HostBackend> backend_;  // the engine's: its calls can be made to fail
  const std::shared_ptr<HostBackend> device_;   // the kernels'; streams and events fit both
  std::vector<Unit> units_;
  std::vector<std::vector<std::byte>> slots_;  // apart, so that a write beyond one is seen
  std::vector<Reading> readings_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::optional<Prefetcher> prefetcher_;  // last: its destructor waits for the streams
};

}  // namespace wanoffload::stress
