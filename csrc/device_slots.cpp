#include "device_slots.h"

#include <string>

#include "errors.h"

namespace wanoffload {

DeviceSlots::DeviceSlots(BackendPtr backend, const std::vector<DeviceAddress>& addresses,
                         std::size_t slot_bytes)
    : backend_(std::move(backend)), slot_bytes_(slot_bytes) {
  if (addresses.empty()) throw UsageError("there must be a slot at least");
  slots_.reserve(addresses.size());
  for (const DeviceAddress address : addresses) {
    Slot& slot = slots_.emplace_back(backend_);
    slot.transfer.destination = address;
    slot.transfer.ready = slot.ready.handle();
    slot.readers.reserve(4);
    slot.transfer.wait_for.reserve(4);
  }
}

int DeviceSlots::find(int unit) const {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].unit == unit) return static_cast<int>(i);
  }
  return -1;
}

void DeviceSlots::fill(int index, int unit, const ImagePtr& image, CopyEngine& engine) {
  Slot& slot = (*this)[index];
  if (slot.users != 0) throw UsageError("slot " + std::to_string(index) + " is in use");
  if (image->plain_bytes() > slot_bytes_) {
    throw UsageError("a unit of " + std::to_string(image->plain_bytes()) + " bytes in slots of " +
                     std::to_string(slot_bytes_));
  }
  drop(index);
  record_reads(slot);
  slot.transfer.wait_for.clear();
  for (const SlotReader& reader : slot.readers) {
    if (reader.read) slot.transfer.wait_for.push_back(reader.free.handle());
  }
  slot.transfer.image = image;
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
