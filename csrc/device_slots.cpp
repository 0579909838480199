#include "device_slots.h"

#include <algorithm>
#include <string>
#include <utility>

#include "errors.h"

namespace wanoffload {

namespace {

std::size_t sum(const std::vector<DeviceRange>& pieces) {
  std::size_t bytes = 0;
  for (const DeviceRange& piece : pieces) bytes += piece.bytes;
  return bytes;
}

bool overlap(const DeviceRange& a, const DeviceRange& b) {
  return std::max(a.address, b.address) < std::min(a.address + a.bytes, b.address + b.bytes);
}

bool overlap(const Slot& a, const Slot& b) {
  return std::ranges::any_of(a.pieces, [&](const DeviceRange& of_a) {
    return std::ranges::any_of(b.pieces,
                               [&](const DeviceRange& of_b) { return overlap(of_a, of_b); });
  });
}

void check_pieces(const std::vector<DeviceRange>& pieces) {
  for (std::size_t i = 1; i < pieces.size(); ++i) {
    const bool twice = std::any_of(pieces.begin(), pieces.begin() + static_cast<std::ptrdiff_t>(i),
                                   [&](const DeviceRange& p) { return overlap(p, pieces[i]); });
    if (twice) throw UsageError("the pieces of a home share no memory with each other");
  }
}

}  // namespace

Slot::Slot(const BackendPtr& backend, std::vector<DeviceRange> ranges)
    : pieces(std::move(ranges)), bytes(sum(pieces)), ready(backend) {
  transfer.ready = ready.handle();
  readers.reserve(4);
  transfer.wait_for.reserve(16);
  transfer.stretches.reserve(16);
}

DeviceSlots::DeviceSlots(BackendPtr backend, const std::vector<DeviceAddress>& addresses,
                         std::size_t slot_bytes, std::size_t least_stretch)
    : backend_(std::move(backend)),
      slot_bytes_(slot_bytes),
      least_stretch_(least_stretch),
      passing_(static_cast<int>(addresses.size())) {
  for (const DeviceAddress address : addresses) add_slot({{address, slot_bytes}});
}

void DeviceSlots::add_slot(std::vector<DeviceRange> pieces) {
  const Slot& slot = slots_.emplace_back(backend_, std::move(pieces));
  for (const DeviceRange& piece : slot.pieces) occupancy_.add(piece.address, piece.bytes);
}

void DeviceSlots::add_unit(const Home& home, CopyEngine& engine) {
  if (home) {
    check_pieces(home.pieces);
    add_slot(home.pieces);
    slots_.back().transfer.as_stored = home.as_stored;
    try {
      check_shares(slots_.back());
      if (home.filled) adopt(size() - 1, units(), engine);
    } catch (...) {
      slots_.pop_back();
      throw;
    }
    mark_shared(slots_.back());
  }
  homes_.push_back({home ? size() - 1 : kNoSlot, home.as_stored});
}

void DeviceSlots::check_shares(const Slot& added) const {
  for (const Slot& other : slots_) {
    const bool either = added.transfer.as_stored || other.transfer.as_stored;
    if (&other == &added || !either || !overlap(other, added)) continue;
    throw UsageError("a home where packed bytes stay shares no memory with others");
  }
}

void DeviceSlots::mark_shared(Slot& added) {
  for (Slot& other : slots_) {
    if (&other == &added || !overlap(other, added)) continue;
    other.shared = added.shared = true;
  }
}

bool DeviceSlots::keeps_packed(int unit) const {
  const UnitHome& home = homes_[static_cast<std::size_t>(unit)];
  return home.slot != kNoSlot && home.as_stored;
}

bool DeviceSlots::lives_at_home(int unit) const {
  return home_of(unit) != kNoSlot && !keeps_packed(unit);
}

bool DeviceSlots::stays(int unit) const {
  const int home = home_of(unit);
  return home != kNoSlot && !at(home).shared;
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
void DeviceSlots::adopt(int index, int unit, CopyEngine& engine) {
  if (!holders(index).empty()) {
    throw UsageError("a home can't be filled from the beginning where another has been filled");
  }
  Slot& slot = (*this)[index];
  slot.transfer.generation = ++slot.generation;
  engine.adopt(slot.transfer);
  take_over(index);
  slot.unit = unit;
  slot.fresh = true;
}

const std::vector<int>& DeviceSlots::holders(int slot) {
  holders_.clear();
  if (at(slot).unit != kNoUnit) holders_.push_back(slot);  // perhaps of no bytes
  for (const DeviceRange& piece : pieces(slot)) {
    for (const Occupancy::Cell& cell : occupancy_.cells(piece.address, piece.bytes)) {
      const bool known = std::ranges::find(holders_, cell.holder) != holders_.end();
      if (cell.holder != kNoSlot && !known) holders_.push_back(cell.holder);
    }
  }
  return holders_;
}

void DeviceSlots::fill(int index, int unit, const ImagePtr& image, CopyEngine& engine) {
  make_way(index, image).source = 0;
  submit(index, unit, engine);
}

void DeviceSlots::unpack(int index, int unit, const ImagePtr& image, CopyEngine& engine,
                         DeviceAddress source, StreamHandle stream) {
  SlotReader& reader = reader_of((*this)[index], stream);
  Transfer& transfer = make_way(index, image);
  transfer.source = source;
  transfer.reader = stream;
  reader.read = true;
  reader.recorded = false;
  submit(index, unit, engine);
}

// Ends what the slot's memory holds, and puts together what the next fill waits for.
Transfer& DeviceSlots::make_way(int index, const ImagePtr& image) {
  Slot& slot = (*this)[index];
  const std::size_t bytes = slot.transfer.as_stored ? image->bytes() : image->plain_bytes();
  if (bytes > slot.bytes) {
    throw UsageError("a unit of " + std::to_string(bytes) + " bytes in a slot of " +
                     std::to_string(slot.bytes));
  }
  const std::vector<int>& held_by = holders(index);
  for (const int holder : held_by) {
    if (at(holder).users != 0) throw UsageError("slot " + std::to_string(holder) + " is in use");
  }
  for (const int holder : held_by) drop(holder);
  for (const int holder : held_by) record_reads((*this)[holder]);
  // One whose fill failed has not come behind those that it was to overwrite.
  const bool all_came = std::ranges::all_of(held_by, [this](int holder) {
    return at(holder).transfer.ready_generation() == at(holder).generation;
  });
  slot.transfer.stretches.clear();
  slot.transfer.wait_for.clear();
  slot.transfer.behind.clear();
  if (all_came) {
    come_behind_holders(index);
  } else {
    come_behind_all(index);
  }
  take_over(index);
  slot.transfer.image = image;
  slot.transfer.generation = ++slot.generation;
  return slot.transfer;
}

void DeviceSlots::submit(int index, int unit, CopyEngine& engine) {
  Slot& slot = (*this)[index];
  engine.submit(slot.transfer);
  slot.unit = unit;
  slot.fresh = true;
}

// Each stretch waits for the readers of who has it now.
void DeviceSlots::come_behind_holders(int index) {
  Transfer& transfer = (*this)[index].transfer;
  std::size_t offset = 0;
  for (const DeviceRange& piece : pieces(index)) {
    int last = kNoSlot;
    bool begun = false;  // a stretch goes on in one piece
    for (const Occupancy::Cell& cell : occupancy_.cells(piece.address, piece.bytes)) {
      const std::size_t bytes = cell.end - cell.begin;
      const bool more = begun && (cell.holder == last || bytes < least_stretch_ ||
                                  transfer.stretches.back().bytes < least_stretch_);
      if (!more) {
        const std::size_t waits = transfer.wait_for.size();
        transfer.stretches.push_back({offset, 0, cell.begin, waits, waits});
      }
      if (cell.holder != kNoSlot && !(begun && cell.holder == last)) {
        come_behind(transfer, (*this)[cell.holder]);
      }
      transfer.stretches.back().bytes += bytes;
      transfer.stretches.back().end_wait = transfer.wait_for.size();
      offset += bytes;
      last = cell.holder;
      begun = true;
    }
  }
}

// All of it waits for all readers of slots that have some of its memory. These are settled: one
// that is not would be a holder.
void DeviceSlots::come_behind_all(int index) {
  const Slot& filled = (*this)[index];
  Transfer& transfer = (*this)[index].transfer;
  for (Slot& slot : slots_) {
    if (!overlap(slot, filled)) continue;
    record_reads(slot);
    come_behind(transfer, slot);
  }
  std::size_t offset = 0;
  for (const DeviceRange& piece : pieces(index)) {
    const std::size_t first = offset == 0 ? 0 : transfer.wait_for.size();
    transfer.stretches.push_back(
        {offset, piece.bytes, piece.address, first, transfer.wait_for.size()});
    offset += piece.bytes;
  }
}

void DeviceSlots::come_behind(Transfer& transfer, Slot& holder) {
  for (const SlotReader& reader : holder.readers) {
    if (reader.read) transfer.wait_for.push_back(reader.free.handle());
  }
  if (&holder.transfer == &transfer) return;  // where it was written itself the engine knows
  const StreamHandle unread_on = holder.transfer.unread_on();
  const bool known = std::ranges::find(transfer.behind, unread_on) != transfer.behind.end();
  if (unread_on != 0 && !known) transfer.behind.push_back(unread_on);
}

void DeviceSlots::take_over(int index) {
  for (const DeviceRange& piece : pieces(index)) {
    for (Occupancy::Cell& cell : occupancy_.cells(piece.address, piece.bytes)) {
      cell.holder = index;
    }
  }
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
