#include "staging_ring.h"

#include <string>

#include "errors.h"

namespace wanoffload {
namespace {

const StagingMemory& checked(const StagingMemory& memory) {
  for (const DeviceAddress address : memory.slots) {
    StagingRing::check_aligned(address, "a staging slot");
  }
  return memory;
}

}  // namespace

void StagingRing::check_aligned(DeviceAddress address, const char* what) {
  constexpr std::size_t kAlignment = 16;  // what unpacking reads and writes at once
  if (address % kAlignment == 0) return;
  throw UsageError(std::string(what) + " begins at " + std::to_string(address) +
                   ", which is no multiple of " + std::to_string(kAlignment));
}

StagingRing::StagingRing(const BackendPtr& backend, const StagingMemory& memory)
    : backend_(backend),
      slot_bytes_(checked(memory).slot_bytes),
      stream_(backend, StreamPriority::kHigh) {
  slots_.reserve(memory.slots.size());
  free_.reserve(memory.slots.size());
  for (const DeviceAddress address : memory.slots) {
    free_.push_back(slots_.size());
    slots_.push_back(Slot{address, Event(backend), Event(backend)});
  }
}

std::size_t StagingRing::take(Milliseconds timeout) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, timeout, [&] { return !free_.empty(); })) {
    throw TransferTimeout("no staging slot was closed within " + std::to_string(timeout.count()) +
                          " ms");
  }
  const std::size_t index = free_.front();
  free_.erase(free_.begin());
  return index;
}

void StagingRing::give_back(std::size_t index) {
  const std::lock_guard lock(mutex_);
  free_.push_back(index);
  changed_.notify_all();
}

// Again, should it have failed behind the unpacking.
void StagingRing::record_read(Slot& slot) {
  if (slot.read != Read::kUnrecorded) return;
  backend_->record(slot.free.handle(), stream());
  slot.read = Read::kRecorded;
}

StagingRing::Place StagingRing::open(StreamHandle copies, Milliseconds timeout) {
  const std::size_t index = take(timeout);
  Slot& slot = slots_[index];
  try {
    record_read(slot);
    if (slot.read == Read::kRecorded) backend_->wait(copies, slot.free.handle());
  } catch (...) {
    give_back(index);
    throw;
  }
  return {slot.address, index};
}

void StagingRing::unpack(const Place& place, const UnpackJob& job, StreamHandle copies) {
  Slot& slot = slots_[place.index];
  try {
    backend_->record(slot.staged.handle(), copies);
    backend_->wait(stream(), slot.staged.handle());
    backend_->unpack(job, stream());
    slot.read = Read::kUnrecorded;
    record_read(slot);
  } catch (...) {
    give_back(place.index);
    throw;
  }
  give_back(place.index);
}

void StagingRing::abandon(const Place& place) { give_back(place.index); }

}  // namespace wanoffload
