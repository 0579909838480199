// Where the images of units live on the host. An image is one run of bytes with a mapping of its
// own: exact to the page, touched first by the threads that fill it, page-locked or not, and given
// back alone.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "image.h"
#include "source_file.h"

namespace wanoffload {

struct StoreOptions {
  bool huge_pages = true;  // ask for 2 MiB pages: touching and locking are 2 times faster
  unsigned threads = 0;    // that fill and touch; 0: as many as there are cores, 16 at most
};

// Bytes held by the images of one store, now.
struct StoreBytes {
  std::atomic<std::size_t> mapped{0};
  std::atomic<std::size_t> locked{0};
};

// Bytes to be copied into an image.
struct ImagePiece {
  const void* source;
  std::size_t offset;
  std::size_t bytes;
};

// A place in memory that other processes may have mapped too (a memfd).
struct SharedPlace {
  std::shared_ptr<const Descriptor> memory;
  std::size_t offset;
};

// One unit's bytes in memory. Not synchronised: filling, lock, unlock, protect and make_own are
// set-up work of one thread. The owner must not let it go while a copy from it is in flight.
class HostImage final : public Image {
 public:
  // Maps zeroed memory. Throws HostMemoryError.
  HostImage(BackendPtr backend, std::size_t bytes, StoreOptions options,
            std::shared_ptr<StoreBytes> totals);
  // Maps shared memory, as it is. Owns the descriptor with others as long as it is shared. Throws
  // UsageError unless the offset is a multiple of 4096 and the image, rounded up to pages, lies
  // within; HostMemoryError.
  HostImage(BackendPtr backend, std::size_t bytes, StoreOptions options,
            std::shared_ptr<StoreBytes> totals, SharedPlace place);
  ~HostImage() override;

  [[nodiscard]] std::byte* data() const { return data_; }
  // Whether other processes may read these bytes: then nobody may change them.
  [[nodiscard]] bool shared() const { return memory_ != nullptr; }
  [[nodiscard]] const std::byte* locked_data() const override { return locked_ ? data_ : nullptr; }
  [[nodiscard]] const std::byte* host_data() const override { return data_; }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override;

  // Copies the pieces in with many threads; the first touch of the memory.
  void fill(const std::vector<ImagePiece>& pieces);
  // Reads the extents in with many threads, straight to their places; the first touch of the
  // memory. Bytes that no extent holds stay as they are (zeros, in a new image). Throws what
  // checked_extents and SourceFile::read throw; the image's bytes then mean nothing.
  void fill_from(std::vector<FileExtent> extents, ReadBy by = ReadBy::kPageCache);
  // Reads another image of the same size in with many threads, and proves it if that is still to be
  // done. Throws what its read throws; the bytes then mean nothing.
  void copy_from(const Image& image);
  // Makes every page present with many threads, without changing what is there, whoever else reads
  // or writes it meanwhile. Throws HostMemoryError where shared memory has no page left to give:
  // it is touched before it is filled, for then the system would end the process.
  void touch();
  // Gives the whole pages within the range back to the system (the last page of the image counts as
  // whole): they read as zeros, and take memory again when they are written to. Throws UsageError
  // if the range is not of the image, or its memory is page-locked or (once was) shared.
  void drop(std::size_t offset, std::size_t bytes);
  // Page-locks the image. Throws HostMemoryError or BackendError; does nothing if locked.
  void lock();
  void unlock() noexcept;

  // Shared memory is read-only in this process from here on: a stray write ends this process, and
  // changes nothing for the others. Locked or not. Does nothing to memory that is not shared.
  void protect();
  // Moves shared bytes into memory of this process, at the same address and writable; what was
  // locked is locked again. Throws HostMemoryError, and nothing has changed; or what lock() throws,
  // and the image is this process's own, but not locked. Does nothing if it is not shared.
  void make_own();
  // The same without a move: nobody else will look at these bytes again.
  void keep();

 private:
  void check_writable() const;

  const BackendPtr backend_;
  const std::size_t mapped_bytes_;
  const StoreOptions options_;
  const std::shared_ptr<StoreBytes> totals_;
  std::shared_ptr<const Descriptor> memory_;  // while shared
  bool anonymous_;                            // the mapping is this process's alone
  std::byte* data_ = nullptr;
  bool locked_ = false;
  bool protected_ = false;
};

using HostImagePtr = std::shared_ptr<HostImage>;

// Makes images and knows how many bytes they hold. Images may outlive it.
class HostStore {
 public:
  explicit HostStore(BackendPtr backend, StoreOptions options = {});

  [[nodiscard]] HostImagePtr allocate(std::size_t bytes);
  // An image over a range of shared memory, filled or not.
  [[nodiscard]] HostImagePtr map_shared(SharedPlace place, std::size_t bytes);
  [[nodiscard]] std::size_t mapped_bytes() const { return totals_->mapped; }
  [[nodiscard]] std::size_t locked_bytes() const { return totals_->locked; }

 private:
  const BackendPtr backend_;
  const StoreOptions options_;
  const std::shared_ptr<StoreBytes> totals_;
};

}  // namespace wanoffload
