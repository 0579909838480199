// Several threads bring plain and packed images, from locked memory, from ordinary memory and from
// files, through one engine with few staging slots, again and again into the same places, read or
// not in between, while calls fail. What is read is what was brought last.
#include <memory>
#include <optional>

#include "backend/host_backend.h"
#include "check.h"
#include "copy_engine.h"
#include "errors.h"
#include "host_store.h"
#include "packed_content.h"
#include "packed_image.h"
#include "scratch_file.h"

namespace wanoffload::stress {
namespace {

struct Source {
  ImagePtr image;
  std::vector<std::byte> plain;
};

Source random_source(Random& random, const std::shared_ptr<HostBackend>& backend,
                     std::size_t most_bytes) {
  const bool packed = random.chance(0.7);
  const std::size_t bytes = random.chance(0.1) ? 0 : random.between<std::size_t>(0, most_bytes);
  PackedContent content =
      packed ? packed_content(random, bytes) : PackedContent{{}, pattern(random.seed(), bytes), {}};
  Source source;
  source.plain = packed ? std::move(content.plain) : content.packed;
  if (random.chance(0.3)) {
    source.image = scattered_image(random, std::move(content.packed), 0).image;
  } else {
    const auto memory = HostStore(backend, {false, 1}).allocate(content.packed.size());
    std::copy(content.packed.begin(), content.packed.end(), memory->data());
    if (random.chance(0.6)) memory->lock();
    source.image = memory;
  }
  if (packed) source.image = std::make_shared<PackedImage>(source.image);
  return source;
}

// A place on the device that one thread has filled and read.
class Place {
 public:
  Place(const std::shared_ptr<HostBackend>& backend, std::size_t bytes)
      : backend_(backend), memory_(bytes), ready_(backend), free_(backend) {
    transfer_.go_to(reinterpret_cast<DeviceAddress>(memory_.data()), bytes);
    transfer_.ready = ready_.handle();
  }

  // Starts a fill, or throws. One that was started before has ended, or failed.
  void fill(CopyEngine& engine, const Source& source) {
    finish(engine);
    settled_ = false;
    transfer_.image = source.image;
    ++transfer_.generation;
    wanted_ = &source.plain;
    sound_ = false;
    engine.submit(transfer_);
    sound_ = true;
  }
  // Waits until the last fill is enqueued, or has failed. Returns whether the place holds it.
  bool finish(CopyEngine& engine) {
    if (settled_) return sound_;
    settled_ = true;
    try {
      if (sound_) engine.wait_settled(transfer_);
    } catch (const BackendError&) {
      sound_ = false;
    }
    return sound_;
  }
  // A kernel reads the place, behind the fill and before the next one.
  void read(CopyEngine& engine, StreamHandle stream) {
    if (!finish(engine)) return;
    check_equal(transfer_.ready_generation(), transfer_.generation, "the fill that is ready");
    Reading& reading =
        readings_.emplace_back(Reading{*wanted_, std::vector<std::byte>(wanted_->size())});
    backend_->wait(stream, ready_.handle());
    transfer_.note_read();
    backend_->copy_to_device(reinterpret_cast<DeviceAddress>(reading.seen.data()), memory_.data(),
                             reading.seen.size(), stream);
    backend_->record(free_.handle(), stream);
    transfer_.wait_for = {free_.handle()};
    transfer_.go_to(reinterpret_cast<DeviceAddress>(memory_.data()), memory_.size());
  }
  void verify() const {
    check(!transfer_.spoilt(), "no chunk is spoilt");
    for (const Reading& reading : readings_) check_bytes(reading.seen, reading.wanted, "a place");
  }

 private:
  struct Reading {
    std::vector<std::byte> wanted;
    std::vector<std::byte> seen;  // stays where it is when the list grows
  };

  const std::shared_ptr<HostBackend> backend_;  // of the readers: its calls do not fail
  std::vector<std::byte> memory_;
  Event ready_;
  Event free_;
  Transfer transfer_;
  const std::vector<std::byte>* wanted_ = nullptr;
  bool settled_ = true;
  bool sound_ = false;
  std::vector<Reading> readings_;
};

// What all threads of a case share. Destroyed in reverse: the engine before what its copies use.
struct Shared {
  std::shared_ptr<HostBackend> backend;
  std::shared_ptr<HostBackend> readers;
  std::size_t most_bytes;
  std::vector<std::vector<std::byte>> staging;
  std::optional<CopyEngine> engine;
};

class Loader {
 public:
  // `failing`: it makes calls of the backend fail, its own and the others'.
  Loader(Shared& shared, std::uint64_t seed, bool failing)
      : shared_(shared), random_(seed), failing_(failing), stream_(shared.readers) {
    for (int i = random_.between(1, 3); i > 0; --i) {
      places_.push_back(std::make_unique<Place>(shared.readers, shared.most_bytes));
    }
    for (int i = random_.between(1, 5); i > 0; --i) {
      sources_.push_back(random_source(random_, shared.backend, shared.most_bytes));
    }
  }

  void run() {
    for (int i = random_.between(1, 25); i > 0; --i) {
      if (failing_ && random_.chance(0.2))
        shared_.backend->fail_at(random_.between<std::uint64_t>(1, 30));
      Place& place = *random_.one_of(pointers());
      fill(place, random_.one_of(source_pointers()));
      if (random_.chance(0.5)) place.read(*shared_.engine, stream_.handle());
      if (random_.chance(0.1)) random_.pause(100);
    }
  }
  // No call fails any more.
  void end() {
    for (const auto& place : places_) {
      if (random_.chance(0.5)) fill(*place, random_.one_of(source_pointers()));
      place->read(*shared_.engine, stream_.handle());
    }
    const Event event(shared_.readers);
    shared_.readers->record(event.handle(), stream_.handle());
    synchronize(*shared_.readers, event.handle(), Milliseconds(30'000));
    for (const auto& place : places_) place->verify();
  }

 private:
  void fill(Place& place, const Source* source) {
    try {
      place.fill(*shared_.engine, *source);
    } catch (const BackendError&) {  // this one, or another thread's
    }
  }
  std::vector<Place*> pointers() const {
    std::vector<Place*> list;
    for (const auto& place : places_) list.push_back(place.get());
    return list;
  }
  std::vector<const Source*> source_pointers() const {
    std::vector<const Source*> list;
    for (const auto& source : sources_) list.push_back(&source);
    return list;
  }

  Shared& shared_;
  Random random_;
  const bool failing_;
  std::vector<std::unique_ptr<Place>> places_;
  std::vector<Source> sources_;
  const Stream stream_;
};

void bytes_arrive(Random& random) {
  HostOptions options;
  if (random.chance(0.7)) options.jitter_us = random.between(1, 300);
  options.seed = random.seed();
  const auto backend = std::make_shared<HostBackend>(options);
  Shared shared{backend,
                std::make_shared<HostBackend>(options),
                random.one_of<std::size_t>({256, 20'000, 80'000}),
                {},
                {}};
  EngineOptions engine;
  engine.ring_chunks = random.between<std::size_t>(1, 4);
  engine.ring_chunk_bytes = random.one_of<std::size_t>({700, 5000, 64 << 10});
  engine.threads = random.between(1U, 3U);
  engine.staging.slot_bytes = shared.most_bytes + 4096;
  for (int i = random.between(1, 4); i > 0; --i) {
    auto& slot = shared.staging.emplace_back(engine.staging.slot_bytes);
    engine.staging.slots.push_back(reinterpret_cast<DeviceAddress>(slot.data()));
  }
  std::vector<std::unique_ptr<Loader>> loaders;
  for (int i = random.between(1, 4); i > 0; --i) {
    const bool failing = loaders.empty() && random.chance(0.4);
    loaders.push_back(std::make_unique<Loader>(shared, random.seed(), failing));
  }
  shared.engine.emplace(backend, engine);
  shared.engine->prepare_ring();
  if (random.chance(0.5)) shared.engine->set_poison(std::uint8_t{0xA5});
  {
    std::vector<std::jthread> threads;
    for (const auto& loader : loaders) threads.emplace_back([&] { loader->run(); });
  }
  backend->fail_at(0);
  for (const auto& loader : loaders) loader->end();
  shared.engine.reset();
}

void what_can_not_be_staged_is_refused() {
  const auto backend = std::make_shared<HostBackend>();
  Random random(1);
  std::vector<std::byte> memory(64);
  const auto address = reinterpret_cast<DeviceAddress>(memory.data());
  const auto make = [&](std::vector<DeviceAddress> slots, std::size_t bytes) {
    return StagingRing(backend, {std::move(slots), bytes}).slot_bytes();
  };
  check_throws<UsageError>([&] { (void)make({address, address + 8}, 8); }, "a slot at 8");

  PackedContent content = packed_content(random, 4096);
  const auto image =
      std::make_shared<PackedImage>(scattered_image(random, std::move(content.packed), 0).image);
  Transfer transfer;
  transfer.image = image;
  transfer.go_to(address, image->plain_bytes());
  EngineOptions options;
  CopyEngine without(backend, options);
  check_throws<UsageError>([&] { without.submit(transfer); }, "no staging memory");
  options.staging = {{address, address + 32}, 32};
  CopyEngine small(backend, options);
  check_throws<UsageError>([&] { small.submit(transfer); }, "staging memory that is too small");
  options.staging.slot_bytes = image->packing()->largest_chunk;
  transfer.go_to(address + 8, image->plain_bytes());
  CopyEngine enough(backend, options);
  check_throws<UsageError>([&] { enough.submit(transfer); }, "a place at 8");
}

}  // namespace
}  // namespace wanoffload::stress

int main(int argc, char** argv) {
  using namespace wanoffload::stress;
  what_can_not_be_staged_is_refused();
  for (Run run(argc, argv); run.next();) bytes_arrive(run.random());
}
