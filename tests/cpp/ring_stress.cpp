// Producers on several threads send bytes through one small ring. Every byte arrives, no chunk has
// two owners, none is lost, and none is refilled before its copy has ended.
#include <algorithm>
#include <memory>

#include "backend/host_backend.h"
#include "check.h"
#include "errors.h"
#include "pinned_ring.h"

namespace wanoffload::stress {
namespace {

constexpr Milliseconds kLong{30'000};

// What was sent, and where it went.
struct Sent {
  std::uint64_t key;
  std::vector<std::byte> arrived;
};

// The ring's own view and the test's, kept apart: the ring computes `checked_out` from the others.
class Owners {
 public:
  explicit Owners(std::size_t chunks) : owned_(chunks) {}
  void take(const PinnedRing::Chunk& chunk) {
    check_at_most(chunk.index + 1, owned_.size(), "a chunk's index");
    check(!owned_[chunk.index].exchange(true), "a chunk that is checked out has one owner");
  }
  void leave(const PinnedRing::Chunk& chunk) { owned_[chunk.index] = false; }

 private:
  std::vector<std::atomic<bool>> owned_;
};

// `most_out`: how many chunks may be checked out at this time.
void check_invariant(const PinnedRing& ring, std::size_t most_out) {
  const auto counts = ring.counts();
  check_equal(counts.free + counts.checked_out + counts.in_flight, ring.size(),
              "free + checked out + in flight");
  check_at_most(counts.checked_out, most_out, "checked out");
}

class Producer {
 public:
  Producer(PinnedRing& ring, HostBackend& device, Owners& owners, std::size_t producers,
           std::vector<StreamHandle> streams, std::uint64_t seed)
      : ring_(ring),
        device_(device),
        owners_(owners),
        producers_(producers),
        streams_(std::move(streams)),
        random_(seed) {}

  void run() {
    const int copies = random_.between(1, 40);
    for (int i = 0; i < copies; ++i) {
      const auto chunk = ring_.check_out(kLong);
      owners_.take(chunk);
      if (random_.chance(0.1)) {
        owners_.leave(chunk);
        ring_.give_back(chunk);
      } else {
        send(chunk);
      }
      check_invariant(ring_, producers_);
    }
  }

  void verify() const {
    for (const Sent& sent : sent_) {
      check_bytes(sent.arrived, pattern(sent.key, sent.arrived.size()), "what arrived");
    }
  }

 private:
  void send(const PinnedRing::Chunk& chunk) {
    const std::size_t bytes = random_.between<std::size_t>(0, ring_.chunk_bytes());
    Sent& sent = sent_.emplace_back(Sent{random_.seed(), std::vector<std::byte>(bytes)});
    const auto content = pattern(sent.key, bytes);
    std::copy(content.begin(), content.end(), chunk.data);
    if (random_.chance(0.2)) random_.pause(100);
    const StreamHandle stream = random_.one_of(streams_);
    device_.copy_to_device(reinterpret_cast<DeviceAddress>(sent.arrived.data()), chunk.data, bytes,
                           stream);
    owners_.leave(chunk);
    ring_.send(chunk, stream);
  }

  PinnedRing& ring_;
  HostBackend& device_;
  Owners& owners_;
  const std::size_t producers_;
  const std::vector<StreamHandle> streams_;
  Random random_;
  std::vector<Sent> sent_;  // buffers stay where they are when this grows
};

// Every chunk can be had once, and no more; then all are free.
void check_nothing_is_lost(PinnedRing& ring) {
  check_invariant(ring, 0);
  Owners owners(ring.size());
  std::vector<PinnedRing::Chunk> chunks;
  for (std::size_t i = 0; i < ring.size(); ++i) {
    chunks.push_back(ring.check_out(kLong));
    owners.take(chunks.back());
  }
  check_equal(ring.counts().checked_out, ring.size(), "all checked out");
  check_throws<TransferTimeout>([&] { (void)ring.check_out(Milliseconds(1)); },
                                "a chunk beyond the last");
  for (const auto& chunk : chunks) ring.give_back(chunk);
  check_equal(ring.counts().free, ring.size(), "all given back");
}

void bytes_arrive(Random& random) {
  HostOptions options;
  if (random.chance(0.7)) options.jitter_us = random.between(1, 400);
  options.seed = random.seed();
  const auto backend = std::make_shared<HostBackend>(options);
  {
    const std::size_t chunks = random.between<std::size_t>(1, 9);
    const std::size_t bytes = random.one_of<std::size_t>(
        {1, 2, 63, 64, 4095, 4096, 4097, random.between<std::size_t>(1, 20'000)});
    PinnedRing ring(backend, chunks, bytes);
    check_equal(ring.locked_bytes(), (chunks * bytes + 4095) / 4096 * 4096, "locked by the ring");
    check_equal(backend->locked_bytes(), ring.locked_bytes(), "locked in the backend");

    std::vector<std::unique_ptr<Stream>> owned;
    std::vector<StreamHandle> streams;
    for (int i = random.between(1, 3); i > 0; --i) {
      streams.push_back(owned.emplace_back(std::make_unique<Stream>(backend))->handle());
    }
    if (random.chance(0.2)) streams.push_back(0);

    Owners owners(chunks);
    const std::size_t count = random.between<std::size_t>(1, 5);
    std::vector<std::unique_ptr<Producer>> producers;
    for (std::size_t i = 0; i < count; ++i) {
      producers.push_back(
          std::make_unique<Producer>(ring, *backend, owners, count, streams, random.seed()));
    }
    {
      std::vector<std::jthread> threads;
      for (const auto& producer : producers) threads.emplace_back([&] { producer->run(); });
    }
    check_nothing_is_lost(ring);  // and with that every copy has ended
    for (const auto& producer : producers) producer->verify();
  }
  check_equal(backend->locked_bytes(), 0U, "locked after the ring is gone");
}

// One thread gives up waiting for the only chunk; another, that waits longer, must still get it.
void a_timeout_loses_no_chunk(Random& random) {
  HostOptions options;
  options.latency_us = 60'000;
  const auto slow = std::make_shared<HostBackend>(options);
  PinnedRing ring(slow, 1, random.between<std::size_t>(1, 100));
  const Stream stream(slow);
  std::byte target{};
  const auto chunk = ring.check_out(kLong);
  chunk.data[0] = std::byte{7};
  slow->copy_to_device(reinterpret_cast<DeviceAddress>(&target), chunk.data, 1, stream.handle());
  ring.send(chunk, stream.handle());

  std::atomic<bool> gave_up{false};
  std::jthread impatient([&] {
    check_throws<TransferTimeout>([&] { (void)ring.check_out(Milliseconds(10)); },
                                  "a chunk whose copy is slow");
    gave_up = true;
  });
  while (ring.counts().in_flight != 0 && !gave_up) std::this_thread::yield();  // until it waits
  ring.give_back(ring.check_out(Milliseconds(5'000)));
  impatient.join();
  check_equal(std::to_integer<int>(target), 7, "what the slow copy brought");
  check_nothing_is_lost(ring);
}

}  // namespace
}  // namespace wanoffload::stress

int main(int argc, char** argv) {
  using namespace wanoffload::stress;
  for (Run run(argc, argv); run.next();) {
    if (run.random().chance(0.05)) {
      a_timeout_loses_no_chunk(run.random());
    } else {
      bytes_arrive(run.random());
    }
  }
}
