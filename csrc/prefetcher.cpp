#include "prefetcher.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "errors.h"

namespace wanoffload {

Prefetcher::Prefetcher(const BackendPtr& backend, const std::vector<DeviceAddress>& slots,
                       std::size_t slot_bytes, PrefetchOptions options)
    : backend_(backend),
      options_(options),
      slots_(backend, slots, slot_bytes, options.least_stretch),
      engine_(backend, options.engine) {
  if (options.depth < 0) throw UsageError("prefetch must be 0 or more");
}

Prefetcher::~Prefetcher() {
  try {
    close();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wanoffload: while closing: %s\n", error.what());
  }
}

namespace {

void check_fits(std::size_t bytes, std::size_t room, const char* where) {
  if (bytes <= room) return;
  throw UsageError("a unit of " + std::to_string(bytes) + " bytes in " + where + " of " +
                   std::to_string(room));
}

}  // namespace

// Refuses an image that its home, or the slots it passes through, can't hold.
void Prefetcher::make_room_for(const Image& image, const Home& home) const {
  if (!home && (home.as_stored || home.filled)) {
    throw UsageError("a home begins at an address; none was given");
  }
  std::size_t room = 0;
  for (const DeviceRange& piece : home.pieces) {
    if (piece.address == 0) throw UsageError("a home begins at an address; none was given");
    room += piece.bytes;
  }
  if (home.pieces.size() > 1 && (home.as_stored || image.packing() != nullptr)) {
    throw UsageError("a packed unit has a home of one piece");
  }
  if (home.as_stored && image.packing() == nullptr) {
    throw UsageError("a unit whose packed bytes are to stay on the device is not packed");
  }
  if (home && !home.as_stored) {
    check_fits(image.plain_bytes(), room, "a home");
    return engine_.check_staging(image, home.pieces[0].address, 0);
  }
  if (home) check_fits(image.bytes(), room, "a home");
  const DeviceAddress source = home ? home.pieces[0].address : 0;
  if (slots_.passing() == 0) throw UsageError("there must be a slot at least");
  check_fits(image.plain_bytes(), slots_.slot_bytes(), "slots");
  for (int i = 0; i < slots_.passing(); ++i) {
    engine_.check_staging(image, slots_.address(i), source);
  }
}

int Prefetcher::add_unit(ImagePtr image, const Home& home) {
  const std::lock_guard lock(mutex_);
  check_open();
  make_room_for(*image, home);
  if (!image->locked()) engine_.prepare_ring();  // if this is the first that needs it
  const int unit = units();
  slots_.add_unit(home, engine_);
  images_.push_back(std::move(image));
  failures_.emplace_back();
  place_.push_back(static_cast<int>(order_.size()));
  order_.push_back(unit);
  return unit;
}

void Prefetcher::set_order(const std::vector<int>& order) {
  const std::lock_guard lock(mutex_);
  check_open();
  std::vector<int> place(images_.size(), -1);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const int unit = order[i];
    if (unit < 0 || unit >= units() || place[static_cast<std::size_t>(unit)] != -1) {
      throw UsageError("an order names every unit once; unit " + std::to_string(unit) +
                       " is unknown or named twice");
    }
    place[static_cast<std::size_t>(unit)] = static_cast<int>(i);
  }
  if (order.size() != images_.size()) {
    throw UsageError("an order names every unit once; this one has " +
                     std::to_string(order.size()) + " of " + std::to_string(images_.size()));
  }
  order_ = order;
  place_ = std::move(place);
  next_ = 0;
}

std::vector<int> Prefetcher::order() const {
  const std::lock_guard lock(mutex_);
  return order_;
}

void Prefetcher::check_open() const {
  if (closed_) throw ClosedError("this model's offloader is closed");
}

void Prefetcher::check_open(int unit) const {
  check_open();
  check_known(unit);
}

// Also of one that was there before close().
void Prefetcher::check_known(int unit) const {
  if (unit < 0 || unit >= slots_.units()) {
    throw UsageError("there is no unit " + std::to_string(unit));
  }
}

// How many units of the order come before this one, counted from the one needed next.
int Prefetcher::distance(int unit) const {
  const int ahead = place_[static_cast<std::size_t>(unit)] - next_;
  return ahead >= 0 ? ahead : ahead + units();
}

// Whether the unit comes over the link among the `ahead` units that come next.
bool Prefetcher::crosses_soon(int unit, int ahead) const {
  return needs_link(unit) && distance(unit) < ahead;
}

// The slot to give up first: an empty one, else that whose unit is needed last; one that holds what
// crosses the link soon only if all do. -1: all in use.
int Prefetcher::slot_to_give_up(int ahead) const {
  int best = kNoSlot;
  std::pair<bool, int> best_worth;
  for (int i = 0; i < slots_.passing(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.users != 0) continue;
    if (slot.unit == kNoUnit) return i;
    const std::pair worth(crosses_soon(slot.unit, ahead), -distance(slot.unit));
    if (best == kNoSlot || worth < best_worth) {
      best = i;
      best_worth = worth;
    }
  }
  return best;
}

// Where the unit is to be brought to: its home, if it lives there, else the slot to give up first.
int Prefetcher::place_for(int unit, int ahead) const {
  return slots_.lives_at_home(unit) ? slots_.home_of(unit) : slot_to_give_up(ahead);
}

int Prefetcher::coming(int places) const {
  return order_[static_cast<std::size_t>((next_ + places) % units())];
}

// Whether bytes of the unit have to come over the link before it can be read.
bool Prefetcher::needs_link(int unit) const {
  return !slots_.stays(unit) || slots_.unit_in(slots_.home_of(unit)) != unit;
}

// How many places of the order, from the next on, are looked at: until `depth` units are found that
// need the link, or as many as the slots can hold, one of which is for what is unpacked from homes.
// The last place, of the unit acquired just now, is not.
int Prefetcher::horizon() const {
  int to_come = options_.depth;
  int room = slots_.passing();
  bool unpacks = false;
  int places = 0;
  for (; places < units() - 1 && to_come > 0; ++places) {
    const int unit = coming(places);
    if (slots_.keeps_packed(unit) ? !std::exchange(unpacks, true) : !slots_.lives_at_home(unit)) {
      if (room-- == 0) break;
    }
    if (needs_link(unit)) --to_come;
  }
  return places;
}

void Prefetcher::prefetch() {
  const std::lock_guard lock(mutex_);
  check_open();
  top_up();
}

// Brings the units that come next into slots that hold nothing needed sooner, or to their homes.
// What fails here is thrown by the acquire that needs it.
void Prefetcher::top_up() {
  const int ahead = horizon();
  for (int i = 0; i < ahead; ++i) {
    const int unit = coming(i);
    if (slots_.find(unit) == kNoSlot && !fetch_ahead(unit, ahead)) break;
  }
}

// False if nothing further is to be fetched now: there is no room, or it failed.
bool Prefetcher::fetch_ahead(int unit, int ahead) {
  if (failures_[static_cast<std::size_t>(unit)]) return false;
  try {
    if (slots_.keeps_packed(unit)) {
      const int home = slots_.home_of(unit);
      if (slots_[home].unit != unit && engine_.settled(slots_[home].transfer)) bring(unit, home);
      return true;
    }
    const int slot = place_for(unit, ahead);
    if (!may_take(slot, unit)) return false;
    bring(unit, slot);
    return true;
  } catch (...) {
    failures_[static_cast<std::size_t>(unit)] = std::current_exception();
    return false;
  }
}

// Whether a slot may be given up for a unit that comes over the link and is not needed at once: not
// if what it holds is needed sooner, unless that can be unpacked again.
bool Prefetcher::may_take(int slot, int unit) {
  if (slot == kNoSlot || !engine_.settled(slots_[slot].transfer)) return false;
  return std::ranges::all_of(slots_.holders(slot), [&](int holder) {
    if (slots_[holder].users != 0 || !engine_.settled(slots_[holder].transfer)) return false;
    const int held = slots_[holder].unit;
    return held == kNoUnit || slots_.keeps_packed(held) || distance(held) > distance(unit);
  });
}

// Over the link.
void Prefetcher::bring(int unit, int slot) {
  const ImagePtr& image = images_[static_cast<std::size_t>(unit)];
  note(Happened::kFetch, unit, slot);
  slots_.fill(slot, unit, image, engine_);
  ++stats_.fetches;
  stats_.bytes_fetched += image->bytes();
}

// By the stream that will read the slot. It reads the unit's home as it reads slots: behind
// `ready`, and what is brought there next comes behind `free`.
void Prefetcher::unpack_from_home(int unit, int slot, StreamHandle stream) {
  const int home = slots_.home_of(unit);
  if (slots_[home].unit != unit) {
    wait_until_over(slots_[home].transfer);  // it may have been forgotten while it was late
    ++stats_.cold;
    bring(unit, home);
  }
  settle(unit, home);
  note(Happened::kFetch, unit, slot);
  slots_.begin_read(home, stream);
  try {
    slots_.unpack(slot, unit, images_[static_cast<std::size_t>(unit)], engine_,
                  slots_.address(home), stream);
  } catch (...) {
    slots_.end_read(home, stream);
    throw;
  }
  try {
    slots_.end_read(home, stream);
  } catch (...) {
    slots_.drop(slot);  // a fetch that is told to have failed has left nothing
    throw;
  }
  ++stats_.fetches;
}

// Throws what went wrong with a prefetch, once: the acquire after this one tries again.
void Prefetcher::rethrow_failure(int unit) {
  std::exception_ptr& failure = failures_[static_cast<std::size_t>(unit)];
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

// The slot where the unit is or is being brought now. `stream` is about to read it.
int Prefetcher::slot_with(int unit, StreamHandle stream) {
  if (const int slot = slots_.find(unit); slot >= 0) return slot;
  rethrow_failure(unit);
  const int slot = place_for(unit, horizon());
  if (slot < 0) {
    throw UsageError("all " + std::to_string(slot_count()) + " slots are in use: unit " +
                     std::to_string(unit) + " was acquired while others were not released");
  }
  // There, another unit may still be on its way that was then skipped.
  for (const int holder : slots_.holders(slot)) {
    if (slots_[holder].users != 0) {
      throw UsageError("unit " + std::to_string(unit) + " was acquired while unit " +
                       std::to_string(slots_[holder].unit) +
                       ", which has a part of its memory, was not released");
    }
    wait_until_over(slots_[holder].transfer);
  }
  wait_until_over(slots_[slot].transfer);
  if (slots_.keeps_packed(unit)) {
    unpack_from_home(unit, slot, stream);
  } else {
    ++stats_.cold;
    bring(unit, slot);
  }
  return slot;
}

void Prefetcher::settle(int unit, int slot) {
  try {
    engine_.wait_settled(slots_[slot].transfer);
  } catch (...) {
    // One that is only late goes on, and the next acquire waits for it again.
    if (!engine_.settled(slots_[slot].transfer)) throw;
    slots_.drop(slot);
    note(Happened::kFetchFailed, unit, slot);
    throw;
  }
}

void Prefetcher::begin_read(int unit, int slot, StreamHandle stream) {
  try {
    slots_.begin_read(slot, stream);
  } catch (const TransferError&) {  // what is there is of no use, nor what it was unpacked from
    slots_.drop(slot);
    if (slots_.keeps_packed(unit)) slots_.drop(slots_.home_of(unit));
    note(Happened::kFetchFailed, unit, slot);
    throw;
  }
}

// For a transfer whose bytes nobody needs any more: that it failed does not matter.
void Prefetcher::wait_until_over(Transfer& transfer) {
  try {
    engine_.wait_settled(transfer);
  } catch (const std::exception&) {
    if (!engine_.settled(transfer)) throw;
  }
}

Acquired Prefetcher::acquire(int unit, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  check_open(unit);
  next_ = place_[static_cast<std::size_t>(unit)];
  int slot = -1;
  try {
    slot = slot_with(unit, stream);
    settle(unit, slot);
    begin_read(unit, slot, stream);
  } catch (const UsageError&) {
    throw;
  } catch (const ClosedError&) {
    throw;
  } catch (const TransferTimeout& error) {
    throw TransferTimeout(why(unit, slot, error));
  } catch (const std::exception& error) {
    ++stats_.failures;
    throw TransferError(why(unit, slot, error));
  }
  ++stats_.acquires;
  note(Happened::kAcquire, unit, slot);
  next_ = (next_ + 1) % units();
  top_up();
  return {slot, slots_[slot].generation};
}

void Prefetcher::release(int unit, StreamHandle stream, std::uint64_t generation) {
  const std::lock_guard lock(mutex_);
  check_open(unit);
  const int slot = slots_.find(unit);
  if (slot < 0 || slots_[slot].users == 0) {
    throw UsageError("unit " + std::to_string(unit) + " is released but was not acquired");
  }
  if (slots_[slot].generation != generation) {
    throw Error("slot " + std::to_string(slot) + " was refilled while unit " +
                std::to_string(unit) + " was in use:\n" + events_text());
  }
  note(Happened::kRelease, unit, slot);
  slots_.end_read(slot, stream);
  top_up();
}

void Prefetcher::abandon(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  if (closed_) return;
  for (int slot = 0; slot < slots_.size(); ++slot) {
    while (slots_[slot].users > 0) {
      note(Happened::kRelease, slots_[slot].unit, slot);
      slots_.end_read(slot, stream);
    }
  }
}

void Prefetcher::invalidate(int unit) {
  const std::lock_guard lock(mutex_);
  check_open(unit);
  forget(unit);
}

void Prefetcher::replace_unit(int unit, ImagePtr image) {
  const std::lock_guard lock(mutex_);
  check_open(unit);
  make_room_for(*image, home_of(unit));
  if (!image->locked()) engine_.prepare_ring();
  forget(unit);
  ImagePtr& place = images_[static_cast<std::size_t>(unit)];
  for (int i = 0; i < slots_.size(); ++i) {
    ImagePtr& used = slots_[i].transfer.image;
    if (used == place) used = nullptr;
  }
  place = std::move(image);
}

// As it was given to add_unit, but for `filled`.
Home Prefetcher::home_of(int unit) const {
  const int home = slots_.home_of(unit);
  if (home == kNoSlot) return {};
  return {slots_.pieces(home), slots_.keeps_packed(unit)};
}

bool Prefetcher::home_filled(int unit) const {
  const std::lock_guard lock(mutex_);
  check_known(unit);
  return given_back_ && slots_.filled(unit);
}

// Drops what was fetched of the unit and waits until no copy reads its image.
void Prefetcher::forget(int unit) {
  const int slot = slots_.find(unit);
  if (slot >= 0 && slots_[slot].users != 0) {
    throw UsageError("unit " + std::to_string(unit) + " is in use: its weights can't be changed");
  }
  failures_[static_cast<std::size_t>(unit)] = nullptr;
  bool fetched = false;
  for (const int place : {slot, slots_.home_of(unit)}) {
    if (place == kNoSlot || slots_[place].unit != unit) continue;
    note(Happened::kInvalidate, unit, place);
    slots_.drop(place);
    fetched = true;
  }
  if (fetched) ++stats_.invalidations;
  // The host may be far ahead of the device: a copy of this unit can be in flight although its
  // slot belongs to another unit by now, or to nobody because the fetch failed behind the copy.
  try {
    for (int i = 0; i < slots_.size(); ++i) {
      Transfer& transfer = slots_[i].transfer;
      if (transfer.image == images_[static_cast<std::size_t>(unit)]) wait_until_over(transfer);
    }
    engine_.drain();
  } catch (const TransferTimeout& error) {
    throw TransferTimeout(with_events(error));
  }
}

int Prefetcher::unit_count() const {
  const std::lock_guard lock(mutex_);
  return units();
}

std::size_t Prefetcher::ring_bytes() const {
  const std::lock_guard lock(mutex_);
  return engine_.ring_bytes();
}

PrefetchStats Prefetcher::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Prefetcher::reset_stats() {
  const std::lock_guard lock(mutex_);
  stats_ = {};
}

void Prefetcher::note(Happened what, int unit, int slot) {
  records_[recorded_ % records_.size()] = {what, unit, slot};
  ++recorded_;
}

std::string Prefetcher::recent_events() const {
  const std::lock_guard lock(mutex_);
  return events_text();
}

std::string Prefetcher::events_text() const {
  constexpr std::array<const char*, 5> kWords = {"fetch", "fetch failed", "acquire", "release",
                                                 "invalidate"};
  // No string streams: other libraries of a Python process bring their own copies of the C++
  // runtime, whose locales don't mix (seen with triton's: a crash).
  std::string text;
  const std::uint64_t first = recorded_ > records_.size() ? recorded_ - records_.size() : 0;
  for (std::uint64_t i = first; i < recorded_; ++i) {
    const Record& record = records_[i % records_.size()];
    text += "  #" + std::to_string(i) + ' ' + kWords[static_cast<std::size_t>(record.what)] +
            " unit " + std::to_string(record.unit) + " slot " + std::to_string(record.slot) + '\n';
  }
  return text;
}

std::string Prefetcher::why(int unit, int slot, const std::exception& cause) const {
  std::string text = "unit " + std::to_string(unit) + " could not be fetched";
  if (slot >= 0) text += " into slot " + std::to_string(slot);
  return text + ": " + with_events(cause);
}

std::string Prefetcher::with_events(const std::exception& cause) const {
  return std::string(cause.what()) + "\nthe engine's last events:\n" + events_text();
}

void Prefetcher::close() {
  const std::lock_guard lock(mutex_);
  if (given_back_) return;
  closed_ = true;
  try {
    engine_.close();
    for (int i = 0; i < slots_.size(); ++i) {
      slots_.wait_for_readers(i, options_.engine.timeout);
    }
  } catch (const TransferTimeout& error) {
    throw TransferTimeout(with_events(error));
  }
  for (int i = 0; i < slots_.size(); ++i) slots_[i].transfer.image = nullptr;
  images_.clear();
  given_back_ = true;
}

}  // namespace wanoffload
