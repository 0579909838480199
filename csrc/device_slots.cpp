#include "device_slots.h"

#include <string>

#include "errors.h"

namespace wanoffload {

Slot::Slot(const BackendPtr& backend, DeviceAddress address, std::size_t size)
    : bytes(size), ready(backend) {
  transfer.destination = address;
  transfer.ready = ready.handle();
  readers.reserve(4);
  transfer.wait_for.reserve(4);
}

DeviceSlots::DeviceSlots(BackendPtr backend, const std::vector<DeviceAddress>& addresses,
                         std::size_t slot_bytes)
    : backend_(std::move(backend)),
      slot_bytes_(slot_bytes),
      passing_(static_cast<int>(addresses.size())) {
  for (const DeviceAddress address : addresses) slots_.emplace_back(backend_, address, slot_bytes);
}

void DeviceSlots::add_unit(const Home& home, CopyEngine& engine) {
  if (home) {
    Slot& slot = slots_.emplace_back(backend_, home.address, home.bytes);
    slot.transfer.as_stored = home.as_stored;
    try {
      if (home.filled) adopt(slot, units(), engine);
    } catch (...) {
      slots_.pop_back();
      throw;
    }
  }
  homes_.push_back({home ? size() - 1 : kNoSlot, home.as_stored});
}

bool DeviceSlots::keeps_packed(int unit) const {
  const UnitHome& home = homes_[static_cast<std::size_t>(unit)];
  return home.slot != kNoSlot && home.as_stored;
}

bool DeviceSlots::lives_at_home(int unit) const {
  return home_of(unit) != kNoSlot && !keeps_packed(unit);
}

int DeviceSlots::find(int unit) const {
  if (lives_at_home(unit)) {
    const int home = home_of(unit);
    return at(home).unit == unit ? home : kNoSlot;
  }
  for (int i = 0; i < passing_; ++i) {
    if (at(i).unit == unit) return i;
  }
  return kNoSlot;
}

bool DeviceSlots::filled(int unit) const {
  const int home = home_of(unit);
  if (home == kNoSlot) return false;
  const Slot& slot = at(home);
  return slot.unit == unit && slot.transfer.ready_generation() == slot.generation &&
         !slot.transfer.spoilt();
}

// The home holds the unit's bytes already.
void DeviceSlots::adopt(Slot& slot, int unit, CopyEngine& engine) {
  slot.transfer.generation = ++slot.generation;
  engine.adopt(slot.transfer);
  slot.unit = unit;
  slot.fresh = true;
}

void DeviceSlots::fill(int index, int unit, const ImagePtr& image, CopyEngine& engine,
                       DeviceAddress source) {
  Slot& slot = (*this)[index];
  if (slot.users != 0) throw UsageError("slot " + std::to_string(index) + " is in use");
  const std::size_t bytes = slot.transfer.as_stored ? image->bytes() : image->plain_bytes();
  if (bytes > slot.bytes) {
    throw UsageError("a unit of " + std::to_string(bytes) + " bytes in a slot of " +
                     std::to_string(slot.bytes));
  }
  drop(index);
  record_reads(slot);
  slot.transfer.wait_for.clear();
  for (const SlotReader& reader : slot.readers) {
    if (reader.read) slot.transfer.wait_for.push_back(reader.free.handle());
  }
  slot.transfer.image = image;
  slot.transfer.source = source;
  slot.transfer.generation = ++slot.generation;
  engine.submit(slot.transfer);
  slot.unit = unit;
  slot.fresh = true;
}

void DeviceSlots::begin_read(int index, StreamHandle stream) {
  Slot& slot = (*this)[index];
  if (slot.transfer.ready_generation() != slot.generation) {
    throw Error("slot " + std::to_string(index) + ": fill " + std::to_string(slot.generation) +
                " was never recorded; the last that was is " +
                std::to_string(slot.transfer.ready_generation()));
  }
  SlotReader& reader = reader_of(slot, stream);
  backend_->wait(stream, slot.ready.handle());
  if (slot.transfer.spoilt()) {
    throw TransferError("a chunk of its packed bytes is spoilt: it could not be unpacked");
  }
  slot.transfer.note_read();
  if (slot.fresh) {
    // The fill came behind all reads of what was here before, and later fills come behind it.
    for (SlotReader& other : slot.readers) other.read = other.recorded = false;
    slot.fresh = false;
  }
  reader.read = true;
  reader.recorded = false;
  ++slot.users;
}

void DeviceSlots::end_read(int index, StreamHandle stream) {
  Slot& slot = (*this)[index];
  SlotReader& reader = reader_of(slot, stream);
  --slot.users;
  reader.read = true;  // it may not be the stream that the slot was acquired for
  reader.recorded = false;
  backend_->record(reader.free.handle(), stream);
  reader.recorded = true;
}

void DeviceSlots::drop(int index) { (*this)[index].unit = kNoUnit; }

void DeviceSlots::wait_for_readers(int index, Milliseconds timeout) {
  Slot& slot = (*this)[index];
  record_reads(slot);
  for (const SlotReader& reader : slot.readers) {
    if (reader.read) synchronize(*backend_, reader.free.handle(), timeout);
  }
}

// Makes up for reads whose event is not there: not released, or it could not be recorded.
void DeviceSlots::record_reads(Slot& slot) {
  for (SlotReader& reader : slot.readers) {
    if (!reader.read || reader.recorded) continue;
    backend_->record(reader.free.handle(), reader.stream);
    reader.recorded = true;
  }
}

SlotReader& DeviceSlots::reader_of(Slot& slot, StreamHandle stream) {
  for (SlotReader& reader : slot.readers) {
    if (reader.stream == stream) return reader;
  }
  return slot.readers.emplace_back(SlotReader{stream, Event(backend_)});
}

}  // namespace wanoffload
