// Brings images into device memory, in the order they were asked for, on one stream of its own.
// A page-locked image is enqueued by the caller's thread as one copy. Everything else goes through
// the pinned ring, filled by the engine's threads: from memory, or from files. Either way, a packed
// image is copied chunk by chunk into the staging ring, and unpacked from there on that ring's
// stream. One whose packed bytes the device has is not copied: whoever needs it unpacks it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "image.h"
#include "pinned_ring.h"
#include "staging_ring.h"

namespace wanoffload {

struct EngineOptions {
  std::size_t ring_chunks = 16;
  std::size_t ring_chunk_bytes = std::size_t{8} << 20;
  unsigned threads = 0;  // that fill the ring; 0: 3/4 of the cores, 12 at most
  Milliseconds timeout{60'000};
  StagingMemory staging{};  // for packed images; none: they are refused
};

// A run of an image's bytes and where it goes, behind what it has to wait for.
struct Stretch {
  std::size_t offset;  // in the image
  std::size_t bytes;
  DeviceAddress address;
  std::size_t first_wait, end_wait;  // of Transfer::wait_for
};

// One image on its way to one place. Owned by the caller, who keeps it (and the image, and the
// events) until the transfer is settled: enqueued or failed. The same one is used again for the
// next fill of that place.
class Transfer {
 public:
  ImagePtr image;
  // Where its bytes go, in their order, without gaps; all there is of the place, though the image
  // may end before. What is unpacked goes to one run of addresses.
  std::vector<Stretch> stretches;
  std::vector<EventHandle> wait_for;  // each before the first byte of its stretch is written
  std::vector<StreamHandle> behind;   // what these are given until then precedes all of it, too
  bool as_stored = false;    // packed bytes stay packed: they are brought as if they were plain
  DeviceAddress source = 0;  // where the device has the image's packed bytes; 0: the host has them
  StreamHandle reader = 0;   // where they are unpacked then: on the stream that reads them next
  EventHandle ready = 0;     // recorded behind the last byte
  std::uint64_t generation = 0;  // which fill of its destination this is

  // How the bytes are unpacked on their way, or null.
  [[nodiscard]] const Packing* packing() const { return as_stored ? nullptr : image->packing(); }
  // What they take at the destination.
  [[nodiscard]] std::size_t bytes_there() const {
    return as_stored ? image->bytes() : image->plain_bytes();
  }
  // The fill that `ready` stands behind: equal to `generation` once settled without an error.
  // Rule 1: nobody waits on an event that was not recorded for the bytes that are meant.
  [[nodiscard]] std::uint64_t ready_generation() const { return ready_generation_; }
  // Whether the backend found a chunk of this fill spoilt, once `ready` is complete.
  [[nodiscard]] bool spoilt() const { return *spoilt_ == generation; }
  // Where the first byte goes.
  [[nodiscard]] DeviceAddress destination() const {
    return stretches.empty() ? 0 : stretches[0].address;
  }
  // The stream that wrote to the place since it was read last, or 0; also 0 where a reader of the
  // place unpacked to it. Only once settled.
  [[nodiscard]] StreamHandle unread_on() const { return unread_on_; }
  // A stream has waited for `ready`, and `wait_for` of the next fill will stand behind that.
  void note_read() { unread_on_ = 0; }
  // One place as a whole, behind all of `wait_for`.
  void go_to(DeviceAddress address, std::size_t bytes) {
    stretches.assign(1, {0, bytes, address, 0, wait_for.size()});
  }

 private:
  friend class CopyEngine;
  std::uint64_t ready_generation_ = 0;  // written before settled_, read after it
  static constexpr std::uint64_t kNoFill = ~std::uint64_t{0};
  std::shared_ptr<std::atomic<std::uint64_t>> spoilt_ =  // the last fill that was
      std::make_shared<std::atomic<std::uint64_t>>(kNoFill);
  StreamHandle unread_on_ = 0;  // where the place was written since it was read; 0: nowhere

  // of whoever enqueues its bytes, one thread at a time
  std::size_t entered_ = 0;      // stretches whose waits are enqueued: the first ones
  std::size_t next_packed_ = 0;  // the chunk of the packing that is copied next, or further
  std::optional<StagingRing::Place> place_;  // where that chunk is, if it was begun

  // guarded by CopyEngine::mutex_
  bool settled_ = true;
  std::exception_ptr error_;
  std::size_t next_chunk_ = 0;     // the next to be taken by a thread
  bool proves_ = false;            // its bytes are to be proved; constant from submit on
  std::uint64_t fingerprint_ = 0;  // of what was read, chunk by chunk in their turns
};

// Any thread may call submit, wait_settled and settled; transfers are carried out in the order of
// submission among those of the same way.
//
// How far reads run ahead: a thread reads the next chunk of the oldest transfer as soon as a chunk
// of the ring is free. It waits neither for the destination to be free nor for copies before it:
// `wait_for` holds up the copy stream alone. So up to ring_chunks * ring_chunk_bytes are read
// beyond what has reached the device, of what was submitted. Each thread has one read under way.
//
// What stands in a transfer's place is overwritten stretch by stretch, as it comes free.
// A packed image's `wait_for` and `ready` are the unpack stream's: copies into the staging ring run
// ahead of a destination that is still being read. If the device has its packed bytes they are its
// reader's. All streams wait only for events that were recorded before the wait was issued, so
// none can wait for itself.
class CopyEngine {
 public:
  CopyEngine(BackendPtr backend, EngineOptions options);
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;
  ~CopyEngine();  // see close()

  [[nodiscard]] StreamHandle stream() const { return stream_.handle(); }
  // Where packed images are unpacked that come over the link; 0 if there is no staging memory.
  [[nodiscard]] StreamHandle unpack_stream() const { return staging_ ? staging_->stream() : 0; }
  // Throws UsageError, with what is missing, if the image is packed and can't be unpacked to there;
  // `source`: as a Transfer's.
  void check_staging(const Image& image, DeviceAddress destination, DeviceAddress source) const;
  [[nodiscard]] std::size_t ring_bytes() const { return ring_ ? ring_->locked_bytes() : 0; }

  // With a value, every destination, and every staging slot, is overwritten with this byte before
  // it is filled: a reader that comes late, or a copy that came early, shows. For tests; costs
  // device bandwidth.
  void set_poison(std::optional<std::uint8_t> value) { poison_ = value ? *value : kNoPoison; }

  // Allocates the ring and starts the threads, if that has not been done. Set-up work: must have
  // been called before an image that is not page-locked is submitted.
  void prepare_ring();

  // Starts a transfer. A page-locked image, or one whose packed bytes the device has: enqueued when
  // this returns, errors thrown here.
  // Others: this returns at once; errors come out of wait_settled.
  void submit(Transfer& transfer);
  // The bytes are at their destination already, by a copy that has ended: records `ready`.
  void adopt(Transfer& transfer);
  // Waits until every byte of the transfer is enqueued, or rethrows what went wrong. Does not wait
  // for the device. Throws TransferTimeout.
  void wait_settled(Transfer& transfer);
  [[nodiscard]] bool settled(const Transfer& transfer) const;
  // Waits for the device until every copy enqueued so far has ended, and what was staged is
  // unpacked. Throws TransferTimeout.
  void drain();

  // Settles what is queued (with ClosedError), ends the threads, waits for the copies in flight.
  // Idempotent. The destructor does it too, and reports an error instead of throwing it.
  void close();

 private:
  struct Task {
    Transfer* transfer;
    std::size_t chunk;
    std::uint64_t turn;
    PinnedRing::Chunk buffer;
  };

  // What a chunk's buffer holds.
  struct Piece {
    std::size_t offset, bytes;  // of the image
    std::size_t lead = 0;       // where in the buffer
    std::uint64_t fingerprint = 0;
  };
  struct Done {
    Task task;
    Piece piece;
  };

  [[nodiscard]] StreamHandle way_of(const Transfer& transfer) const;
  [[nodiscard]] EventHandle end_of(StreamHandle way) const;
  static void reset(Transfer& transfer);
  void enter_next(Transfer& transfer);
  void enter_all(Transfer& transfer);
  const Stretch& enter(Transfer& transfer, std::size_t offset);
  void come_behind_unread(const Transfer& transfer, StreamHandle way);
  void come_behind(StreamHandle other, StreamHandle way);
  void put(Transfer& transfer, std::size_t offset, const std::byte* data, std::size_t bytes);
  void put_packed(Transfer& transfer, std::size_t offset, const std::byte* data, std::size_t bytes);
  void unpack_in_place(Transfer& transfer);
  [[nodiscard]] StagingRing::Place open_staging(const PackedChunk& chunk);
  void unpack(Transfer& transfer, const PackedChunk& chunk);
  [[nodiscard]] static UnpackJob job_of(const Transfer& transfer, const PackedChunk& chunk,
                                        DeviceAddress place);
  void finish(Transfer& transfer);
  void give_up(Transfer& transfer);
  void poison(DeviceAddress place, std::size_t bytes, StreamHandle stream);
  void submit_locked(Transfer& transfer);
  void work();
  [[nodiscard]] std::optional<Task> take_task();
  void carry_out(const Task& task);
  [[nodiscard]] Piece read(const Task& task);
  void send_in_turn(std::unique_lock<std::mutex>& lock);
  std::exception_ptr send(const Done& done, bool failed_earlier);
  void enqueue(const Task& task, const Piece& piece);
  [[nodiscard]] bool is_last(const Task& task) const;
  void settle(Transfer& transfer, std::exception_ptr error);
  [[nodiscard]] std::size_t piece_bytes(const Transfer& transfer) const;
  [[nodiscard]] std::size_t chunks_of(const Transfer& transfer) const;

  static constexpr int kNoPoison = -1;

  const BackendPtr backend_;
  const EngineOptions options_;
  std::atomic<int> poison_{kNoPoison};
  Event copied_;    // the end of the copy stream, for whoever has to come behind it
  Event unpacked_;  // of the unpack stream
  std::optional<PinnedRing> ring_;
  // Either stream may be drained (on the host, by its end) while the other is there or has ended:
  // each waits only for what the other was given before.
  std::optional<StagingRing> staging_;
  Stream stream_;  // behind what its copies use: it goes first

  std::mutex intake_;  // held from choosing a chunk to having a buffer for it: buffers are handed
                       // out in the order of turns, so the next turn always has one
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // guarded by mutex_
  std::vector<Transfer*> queue_;
  std::uint64_t next_turn_ = 0;  // to be given to the next chunk taken
  std::uint64_t turn_ = 0;       // whose bytes are enqueued next
  bool sending_ = false;         // a thread enqueues
  // What was read and waits for its turn: turn n stands at n % size. Enough for every buffer, and
  // for one chunk without a buffer of each thread.
  std::vector<std::optional<Done>> done_;
  bool closed_ = false;

  std::vector<std::jthread> threads_;  // last: they use everything above
};

}  // namespace wanoffload
