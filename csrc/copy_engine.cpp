#include "copy_engine.h"

#include <algorithm>
#include <cstdio>

#include "errors.h"
#include "fingerprint.h"

namespace wanoffload {
namespace {

unsigned ring_threads(unsigned wanted) {
  if (wanted != 0) return wanted;
  return std::clamp(std::thread::hardware_concurrency() * 3 / 4, 1U, 12U);
}

}  // namespace

CopyEngine::CopyEngine(BackendPtr backend, EngineOptions options)
    : backend_(std::move(backend)),
      options_(std::move(options)),
      copied_(backend_),
      unpacked_(backend_),
      stream_(backend_) {
  if (!options_.staging.slots.empty()) staging_.emplace(backend_, options_.staging);
  queue_.reserve(64);
}

CopyEngine::~CopyEngine() {
  try {
    close();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wanoffload: while closing the copy engine: %s\n", error.what());
  }
}

void CopyEngine::prepare_ring() {
  const std::lock_guard lock(mutex_);
  if (ring_ || closed_) return;
  ring_.emplace(backend_, options_.ring_chunks, options_.ring_chunk_bytes);
  const unsigned threads = ring_threads(options_.threads);
  done_.resize(options_.ring_chunks + threads);
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { work(); });
  }
}

void CopyEngine::check_staging(const Image& image, DeviceAddress destination,
                               DeviceAddress source) const {
  const Packing* const packing = image.packing();
  if (packing == nullptr) return;
  StagingRing::check_aligned(destination, "the place of a packed image");
  if (source != 0) return StagingRing::check_aligned(source, "the place of packed bytes");
  if (!staging_) {
    throw UsageError("a packed image needs staging memory on the device, of " +
                     std::to_string(packing->largest_chunk) +
                     " bytes a slot at least; none was given");
  }
  if (packing->largest_chunk > staging_->slot_bytes()) {
    throw UsageError("a packed image has a chunk of " + std::to_string(packing->largest_chunk) +
                     " bytes; the staging slots have " + std::to_string(staging_->slot_bytes()));
  }
}

// The stream that writes to the transfer's destination.
StreamHandle CopyEngine::way_of(const Transfer& transfer) const {
  if (transfer.source != 0) return transfer.reader;
  return transfer.packing() == nullptr ? stream() : unpack_stream();
}

EventHandle CopyEngine::end_of(StreamHandle way) const {
  return way == stream() ? copied_.handle() : unpacked_.handle();
}

void CopyEngine::reset(Transfer& transfer) {
  transfer.entered_ = 0;
  transfer.next_packed_ = 0;
  transfer.place_.reset();
}

void CopyEngine::poison(DeviceAddress place, std::size_t bytes, StreamHandle stream) {
  const int value = poison_;
  if (value == kNoPoison || bytes == 0) return;
  backend_->fill_device(place, static_cast<std::uint8_t>(value), bytes, stream);
}

// What precedes the first byte of the stretch that comes next.
void CopyEngine::enter_next(Transfer& transfer) {
  const StreamHandle way = way_of(transfer);
  if (transfer.entered_ == 0) {
    come_behind_unread(transfer, way);
    transfer.unread_on_ = transfer.source != 0 ? 0 : way;
  }
  const Stretch& stretch = transfer.stretches[transfer.entered_];
  for (std::size_t i = stretch.first_wait; i < stretch.end_wait; ++i) {
    backend_->wait(way, transfer.wait_for[i]);
  }
  poison(stretch.address, stretch.bytes, way);
  ++transfer.entered_;
}

void CopyEngine::enter_all(Transfer& transfer) {
  while (transfer.entered_ < transfer.stretches.size()) enter_next(transfer);
}

// What was brought to these addresses and nobody read may have gone another way, as a whole or
// until it failed: no reader's event stands behind it.
void CopyEngine::come_behind_unread(const Transfer& transfer, StreamHandle way) {
  come_behind(transfer.unread_on_, way);
  for (const StreamHandle other : transfer.behind) come_behind(other, way);
}

void CopyEngine::come_behind(StreamHandle other, StreamHandle way) {
  if (other == 0 || other == way) return;
  backend_->record(end_of(other), other);
  backend_->wait(way, end_of(other));
}

// The stretch with the byte at `offset` of the image. It, and those before it, may be written.
const Stretch& CopyEngine::enter(Transfer& transfer, std::size_t offset) {
  const auto& row = transfer.stretches;
  while (transfer.entered_ < row.size() && row[transfer.entered_].offset <= offset) {
    enter_next(transfer);
  }
  return row[transfer.entered_ - 1];
}

// Enqueues the bytes [offset, offset + bytes) of the image, which stand at `data`, behind those
// before them.
void CopyEngine::put(Transfer& transfer, std::size_t offset, const std::byte* data,
                     std::size_t bytes) {
  if (transfer.packing() != nullptr) return put_packed(transfer, offset, data, bytes);
  while (bytes > 0) {
    const Stretch& stretch = enter(transfer, offset);
    const std::size_t within = offset - stretch.offset;
    const std::size_t now = std::min(bytes, stretch.bytes - within);
    backend_->copy_to_device(stretch.address + within, data, now, stream());
    offset += now;
    data += now;
    bytes -= now;
  }
}

// Of these bytes, what is of chunks goes to their staging slots; each chunk that is whole there is
// unpacked. The head, and what lies between chunks, stays here.
void CopyEngine::put_packed(Transfer& transfer, std::size_t offset, const std::byte* data,
                            std::size_t bytes) {
  const auto& chunks = transfer.packing()->chunks;
  for (; transfer.next_packed_ < chunks.size(); ++transfer.next_packed_) {
    const PackedChunk& chunk = chunks[transfer.next_packed_];
    const std::size_t chunk_end = chunk.offset + chunk.bytes;
    const std::size_t begin = std::max(offset, chunk.offset);
    const std::size_t end = std::min(offset + bytes, chunk_end);
    if (begin >= end) return;  // the chunk begins behind these bytes
    if (!transfer.place_) transfer.place_ = open_staging(chunk);
    backend_->copy_to_device(transfer.place_->address + (begin - chunk.offset),
                             data + (begin - offset), end - begin, stream());
    if (end < chunk_end) return;  // the rest comes with the next bytes
    unpack(transfer, chunk);
  }
}

StagingRing::Place CopyEngine::open_staging(const PackedChunk& chunk) {
  const StagingRing::Place place = staging_->open(stream(), options_.timeout);
  try {
    poison(place.address, chunk.bytes, stream());
  } catch (...) {
    staging_->abandon(place);
    throw;
  }
  return place;
}

// The chunk is whole in its staging slot.
void CopyEngine::unpack(Transfer& transfer, const PackedChunk& chunk) {
  enter_all(transfer);  // bytes that are spoilt may ask to be unpacked to anywhere in the image
  const StagingRing::Place place = *transfer.place_;
  transfer.place_.reset();  // whatever comes of it
  staging_->unpack(place, job_of(transfer, chunk, place.address), stream());
}

UnpackJob CopyEngine::job_of(const Transfer& transfer, const PackedChunk& chunk,
                             DeviceAddress place) {
  return {place,        chunk.bytes,      transfer.destination(), transfer.bytes_there(),
          chunk.blocks, transfer.spoilt_, transfer.generation};
}

// The packed bytes stand on the device, and stay: nothing is copied.
void CopyEngine::unpack_in_place(Transfer& transfer) {
  enter_all(transfer);
  for (const PackedChunk& chunk : transfer.packing()->chunks) {
    backend_->unpack(job_of(transfer, chunk, transfer.source + chunk.offset), transfer.reader);
  }
}

// What follows the last byte. Also what the image left of the place is free by then.
void CopyEngine::finish(Transfer& transfer) {
  enter_all(transfer);
  backend_->record(transfer.ready, way_of(transfer));
  transfer.ready_generation_ = transfer.generation;
}

// No more of its bytes will be put.
void CopyEngine::give_up(Transfer& transfer) {
  if (!transfer.place_) return;
  staging_->abandon(*transfer.place_);
  transfer.place_.reset();
}

void CopyEngine::submit(Transfer& transfer) {
  if (!transfer.as_stored) check_staging(*transfer.image, transfer.destination(), transfer.source);
  if (transfer.image->locked() || transfer.image->bytes() == 0 || transfer.source != 0) {
    return submit_locked(transfer);
  }
  const std::lock_guard lock(mutex_);
  if (closed_) throw ClosedError("the copy engine is closed");
  if (!ring_) throw UsageError("prepare_ring() comes before an image that is not page-locked");
  transfer.settled_ = false;
  transfer.error_ = nullptr;
  reset(transfer);
  transfer.next_chunk_ = 0;
  transfer.proves_ = !transfer.image->proven();
  transfer.fingerprint_ = 0;
  queue_.push_back(&transfer);
  changed_.notify_all();
}

void CopyEngine::submit_locked(Transfer& transfer) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) throw ClosedError("the copy engine is closed");
    transfer.settled_ = true;
    transfer.error_ = nullptr;
  }
  reset(transfer);
  try {
    if (transfer.source != 0) {
      unpack_in_place(transfer);
    } else {
      put(transfer, 0, transfer.image->locked_data(), transfer.image->bytes());
    }
    finish(transfer);
  } catch (...) {
    give_up(transfer);
    throw;
  }
}

void CopyEngine::adopt(Transfer& transfer) {
  reset(transfer);
  backend_->record(transfer.ready, stream());
  transfer.ready_generation_ = transfer.generation;
}

void CopyEngine::wait_settled(Transfer& transfer) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, options_.timeout, [&] { return transfer.settled_; })) {
    throw TransferTimeout("a fetch through the pinned ring was not enqueued within " +
                          std::to_string(options_.timeout.count()) + " ms");
  }
  if (transfer.error_) std::rethrow_exception(transfer.error_);
}

bool CopyEngine::settled(const Transfer& transfer) const {
  const std::lock_guard lock(mutex_);
  return transfer.settled_;
}

void CopyEngine::drain() {
  std::vector<StreamHandle> ways{stream()};
  if (staging_) ways.push_back(unpack_stream());
  for (const StreamHandle way : ways) backend_->record(end_of(way), way);
  for (const StreamHandle way : ways) synchronize(*backend_, end_of(way), options_.timeout);
}

// What one chunk of the ring holds of this transfer.
std::size_t CopyEngine::piece_bytes(const Transfer& transfer) const {
  return transfer.image->piece_bytes(ring_->chunk_bytes());
}

std::size_t CopyEngine::chunks_of(const Transfer& transfer) const {
  const std::size_t piece = piece_bytes(transfer);
  return (transfer.image->bytes() + piece - 1) / piece;
}

void CopyEngine::work() {
  while (const auto task = take_task()) carry_out(*task);
}

std::optional<CopyEngine::Task> CopyEngine::take_task() {
  const std::lock_guard intake(intake_);
  Task task{};
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || !queue_.empty(); });
    if (closed_) return std::nullopt;
    Transfer& transfer = *queue_.front();
    task = {&transfer, transfer.next_chunk_++, next_turn_++, {}};
    if (transfer.next_chunk_ == chunks_of(transfer)) queue_.erase(queue_.begin());
    if (transfer.error_) return task;  // no buffer: do not wait for the device once more
  }
  try {
    task.buffer = ring_->check_out(options_.timeout);
  } catch (...) {
    task.buffer.data = nullptr;
    settle(*task.transfer, std::current_exception());
  }
  return task;
}

bool CopyEngine::is_last(const Task& task) const {
  return task.chunk + 1 == chunks_of(*task.transfer);
}

// Brings the task's bytes into its buffer, if it has one. What fails is noted in the transfer.
CopyEngine::Piece CopyEngine::read(const Task& task) {
  const Image& image = *task.transfer->image;
  const std::size_t size = piece_bytes(*task.transfer);
  Piece piece{task.chunk * size, std::min(size, image.bytes() - task.chunk * size)};
  if (task.buffer.data == nullptr) return piece;
  try {
    piece.lead =
        image.read_piece(piece.offset, piece.bytes, task.buffer.data, ring_->chunk_bytes());
    if (task.transfer->proves_) {
      piece.fingerprint =
          fingerprint_part(task.buffer.data + piece.lead, piece.offset, piece.bytes);
    }
  } catch (...) {
    settle(*task.transfer, std::current_exception());
  }
  return piece;
}

// Reads without a lock and leaves what it read to be sent in its turn. The thread goes on to the
// next chunk; without a buffer, which is what bounds their number, it waits for its turn.
void CopyEngine::carry_out(const Task& task) {
  const Piece piece = read(task);
  std::unique_lock lock(mutex_);
  done_[task.turn % done_.size()] = {task, piece};
  send_in_turn(lock);
  if (task.buffer.data == nullptr) {
    changed_.wait(lock, [&] { return turn_ > task.turn; });
  }
}

// One thread at a time sends whatever is read and has its turn: chunks are enqueued in the order
// they were taken.
void CopyEngine::send_in_turn(std::unique_lock<std::mutex>& lock) {
  if (sending_) return;  // and will find what was left
  sending_ = true;
  while (auto next = std::exchange(done_[turn_ % done_.size()], std::nullopt)) {
    Transfer& transfer = *next->task.transfer;
    const bool failed_earlier = transfer.error_ != nullptr;
    transfer.fingerprint_ += next->piece.fingerprint;
    lock.unlock();
    const std::exception_ptr error = send(*next, failed_earlier);
    lock.lock();
    ++turn_;
    if (error && !transfer.error_) transfer.error_ = error;
    if (transfer.error_) give_up(transfer);
    // Only behind its last chunk: until then this transfer is still being read here.
    if (is_last(next->task)) transfer.settled_ = true;
    changed_.notify_all();
  }
  sending_ = false;
}

// What went wrong, if something did. The buffer is in flight or given back.
std::exception_ptr CopyEngine::send(const Done& done, bool failed_earlier) {
  if (done.task.buffer.data == nullptr) return nullptr;
  try {
    if (failed_earlier) {
      ring_->give_back(done.task.buffer);
    } else {
      enqueue(done.task, done.piece);
    }
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void CopyEngine::enqueue(const Task& task, const Piece& piece) {
  Transfer& transfer = *task.transfer;
  try {
    if (is_last(task) && transfer.proves_) transfer.image->prove(transfer.fingerprint_);
    put(transfer, piece.offset, task.buffer.data + piece.lead, piece.bytes);
    ring_->send(task.buffer, stream());
  } catch (...) {
    // A copy of it may be running, so the chunk must not come free without an event. If this
    // fails too it stays checked out for good, rather than be overwritten under the copy.
    ring_->send(task.buffer, stream());
    throw;
  }
  if (is_last(task)) finish(transfer);
}

// Notes an error; the transfer settles when its last chunk's turn has come.
void CopyEngine::settle(Transfer& transfer, std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  if (!transfer.error_) transfer.error_ = std::move(error);
}

void CopyEngine::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  threads_.clear();  // joins: each finishes the chunk it has taken
  {
    const std::lock_guard lock(mutex_);
    for (Transfer* const transfer : queue_) {
      transfer->error_ = std::make_exception_ptr(ClosedError("the copy engine was closed"));
      transfer->settled_ = true;
    }
    queue_.clear();
    changed_.notify_all();
  }
  drain();
  const std::lock_guard lock(mutex_);
  ring_.reset();
}

}  // namespace wanoffload
