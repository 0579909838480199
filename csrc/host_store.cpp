#include "host_store.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <string>

#include "errors.h"
#include "fingerprint.h"
#include "parallel.h"

namespace wanoffload {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kGrain = std::size_t{4} << 20;
// One registration of 512 GiB or more fails on every driver; stay far below.
constexpr std::size_t kMaxLockBytes = std::size_t{64} << 30;

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

StoreOptions resolved(StoreOptions options) {
  options.threads = thread_count(options.threads);
  return options;
}

// Maps `bytes` so that what stands `phase` bytes further begins a huge page: then all but the
// ragged ends can be huge pages.
std::byte* map_aligned(std::size_t bytes, std::size_t phase = 0) {
  const std::size_t reserved = bytes + kHugePage;
  void* memory =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw HostMemoryError("could not map " + std::to_string(bytes) +
                          " bytes of host memory: " + std::strerror(errno));
  }
  auto* const start = static_cast<std::byte*>(memory);
  const std::size_t first = reinterpret_cast<std::uintptr_t>(start) + phase;
  const std::size_t lead = round_up(first, kHugePage) - first;
  if (lead > 0) munmap(start, lead);
  if (lead < kHugePage) munmap(start + lead + bytes, kHugePage - lead);
  return start + lead;
}

// Where the next huge page begins, seen from an offset or an address.
std::size_t to_huge_page(std::size_t at) { return round_up(at, kHugePage) - at; }

// Maps a range of shared memory, which can have huge pages where the address allows for them.
std::byte* map_place(const SharedPlace& place, std::size_t bytes) {
  struct stat found{};
  if (fstat(place.memory->number(), &found) != 0) {
    throw UsageError(std::string("this is no shared memory: ") + std::strerror(errno));
  }
  const auto size = static_cast<std::size_t>(found.st_size);
  if (place.offset % kPage != 0 || bytes > size || place.offset > size - bytes) {
    throw UsageError(std::to_string(bytes) + " bytes at " + std::to_string(place.offset) +
                     " are not whole pages of shared memory of " + std::to_string(size));
  }
  std::byte* const target = map_aligned(bytes, to_huge_page(place.offset));
  if (mmap(target, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, place.memory->number(),
           static_cast<off_t>(place.offset)) == MAP_FAILED) {
    const int error = errno;
    munmap(target, bytes);
    throw HostMemoryError("could not map " + std::to_string(bytes) +
                          " bytes of shared memory: " + std::strerror(error));
  }
  return target;
}

std::size_t mapped_size(std::size_t bytes) {
  if (bytes > std::numeric_limits<std::size_t>::max() / 2) {
    throw HostMemoryError("an image cannot have " + std::to_string(bytes) + " bytes");
  }
  return round_up(std::max<std::size_t>(bytes, 1), kPage);
}

// Advice only: a kernel without huge pages fills with small ones, slower.
void advise(std::byte* data, std::size_t bytes, const StoreOptions& options) {
  madvise(data, bytes, options.huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

void touch_by_write(std::byte* begin, std::byte* end) {
  for (std::byte* at = begin; at < end; at += kPage) {
    // One read-modify-write: a read alone would bring the shared page of zeros first, and the
    // write behind it would fault again and interrupt all other threads.
    std::atomic_ref(reinterpret_cast<unsigned char&>(*at)).fetch_or(0);
  }
}

// Makes shared pages present. Returns what the system said, 0 if it did. Kernels before 5.14 know
// no other way than to write, and end the process where there is no page left.
int populate(std::byte* begin, std::byte* end) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE
  const auto bytes = static_cast<std::size_t>(end - begin);
  while (madvise(begin, bytes, kPopulateWrite) != 0) {
    if (errno == EINVAL) {
      touch_by_write(begin, end);
      return 0;
    }
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  return 0;
}

// In pieces for one thread each, cut at the image's grains, which are whole huge pages.
std::vector<FileExtent> split_extents(const std::vector<FileExtent>& extents) {
  std::vector<FileExtent> pieces;
  for (FileExtent rest : extents) {
    while (rest.bytes > 0) {
      FileExtent piece = rest;
      piece.bytes = std::min(rest.bytes, kGrain - rest.offset % kGrain);
      rest.file_offset += piece.bytes;
      rest.offset += piece.bytes;
      rest.bytes -= piece.bytes;
      pieces.push_back(std::move(piece));
    }
  }
  return pieces;
}

}  // namespace

HostImage::HostImage(BackendPtr backend, std::size_t bytes, StoreOptions options,
                     std::shared_ptr<StoreBytes> totals)
    : Image(bytes),
      backend_(std::move(backend)),
      mapped_bytes_(mapped_size(bytes)),
      options_(resolved(options)),
      totals_(std::move(totals)),
      anonymous_(true),
      data_(map_aligned(mapped_bytes_)) {
  advise(data_, mapped_bytes_, options_);
  totals_->mapped += mapped_bytes_;
}

HostImage::HostImage(BackendPtr backend, std::size_t bytes, StoreOptions options,
                     std::shared_ptr<StoreBytes> totals, SharedPlace place)
    : Image(bytes),
      backend_(std::move(backend)),
      mapped_bytes_(mapped_size(bytes)),
      options_(resolved(options)),
      totals_(std::move(totals)),
      memory_(std::move(place.memory)),
      anonymous_(false),
      data_(map_place({memory_, place.offset}, mapped_bytes_)) {
  advise(data_, mapped_bytes_, options_);
  totals_->mapped += mapped_bytes_;
}

HostImage::~HostImage() {
  unlock();
  munmap(data_, mapped_bytes_);
  totals_->mapped -= mapped_bytes_;
}

void HostImage::check_writable() const {
  if (protected_) throw UsageError("this image is shared, and was filled: make_own() comes first");
}

void HostImage::fill(const std::vector<ImagePiece>& pieces) {
  check_writable();
  for (const ImagePiece& piece : pieces) {
    if (piece.offset > bytes() || piece.bytes > bytes() - piece.offset) {
      throw UsageError("a piece of " + std::to_string(piece.bytes) + " bytes at " +
                       std::to_string(piece.offset) + " does not fit an image of " +
                       std::to_string(bytes()));
    }
  }
  for (const ImagePiece& piece : pieces) {
    const auto* source = static_cast<const std::byte*>(piece.source);
    std::byte* const target = data_ + piece.offset;
    parallel_for(piece.bytes, kGrain, options_.threads, [&](std::size_t begin, std::size_t end) {
      std::memcpy(target + begin, source + begin, end - begin);
    });
  }
}

void HostImage::read(std::size_t offset, std::size_t bytes, std::byte* destination) const {
  std::memcpy(destination, data_ + offset, bytes);
}

void HostImage::fill_from(std::vector<FileExtent> extents, ReadBy by) {
  check_writable();
  const auto pieces = split_extents(checked_extents(std::move(extents), bytes()));
  parallel_each(pieces.size(), options_.threads, [&](std::size_t i) {
    const FileExtent& piece = pieces[i];
    piece.file->read(piece.file_offset, piece.bytes, data_ + piece.offset, by);
  });
}

void HostImage::copy_from(const Image& image) {
  check_writable();
  if (image.bytes() != bytes()) {
    throw UsageError("an image of " + std::to_string(image.bytes()) +
                     " bytes does not fit one of " + std::to_string(bytes()));
  }
  parallel_each((bytes() + kGrain - 1) / kGrain, options_.threads, [&](std::size_t i) {
    image.read(i * kGrain, std::min(kGrain, bytes() - i * kGrain), data_ + i * kGrain);
  });
  if (!image.proven()) image.prove(fingerprint(data_, bytes(), options_.threads));
}

void HostImage::touch() {
  std::atomic<int> error{0};
  parallel_for(mapped_bytes_, kGrain, options_.threads, [&](std::size_t begin, std::size_t end) {
    if (!shared()) return touch_by_write(data_ + begin, data_ + end);
    if (const int found = populate(data_ + begin, data_ + end)) error = found;
  });
  if (error != 0) {
    throw HostMemoryError("shared memory of " + std::to_string(mapped_bytes_) +
                          " bytes could not be had: " + std::strerror(error));
  }
}

void HostImage::drop(std::size_t offset, std::size_t bytes) {
  if (offset > this->bytes() || bytes > this->bytes() - offset) {
    throw UsageError(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                     " are not in an image of " + std::to_string(this->bytes()));
  }
  if (locked_ || !anonymous_) {
    throw UsageError(std::string("pages can't be given back while they are ") +
                     (locked_ ? "page-locked: unlock() comes first" : "shared memory"));
  }
  const std::size_t begin = round_up(offset, kPage);
  const std::size_t end =
      offset + bytes == this->bytes() ? mapped_bytes_ : (offset + bytes) / kPage * kPage;
  if (begin >= end) return;
  if (madvise(data_ + begin, end - begin, MADV_DONTNEED) != 0) {
    throw HostMemoryError(std::string("pages could not be given back: ") + std::strerror(errno));
  }
}

void HostImage::lock() {
  if (locked_) return;
  if (mapped_bytes_ > kMaxLockBytes) {
    throw HostMemoryError("one unit has " + std::to_string(bytes()) +
                          " bytes; at most 64 GiB can be page-locked in one piece");
  }
  if (protected_) mprotect(data_, mapped_bytes_, PROT_READ | PROT_WRITE);  // what locking asks for
  try {
    touch();  // pages that are there are locked much faster
    backend_->lock_host(data_, mapped_bytes_);
  } catch (...) {
    if (protected_) mprotect(data_, mapped_bytes_, PROT_READ);
    throw;
  }
  if (protected_) mprotect(data_, mapped_bytes_, PROT_READ);
  locked_ = true;
  totals_->locked += mapped_bytes_;
}

void HostImage::unlock() noexcept {
  if (!locked_) return;
  backend_->unlock_host(data_);
  locked_ = false;
  totals_->locked -= mapped_bytes_;
}

void HostImage::protect() {
  if (!shared() || protected_) return;
  if (mprotect(data_, mapped_bytes_, PROT_READ) != 0) {
    throw HostMemoryError(std::string("shared memory can't be made read-only: ") +
                          std::strerror(errno));
  }
  protected_ = true;
}

void HostImage::make_own() {
  if (!shared()) return;
  const bool relock = locked_;
  std::byte* const own =
      map_aligned(mapped_bytes_, to_huge_page(reinterpret_cast<std::uintptr_t>(data_)));
  advise(own, mapped_bytes_, options_);
  parallel_for(mapped_bytes_, kGrain, options_.threads, [&](std::size_t begin, std::size_t end) {
    std::memcpy(own + begin, data_ + begin, end - begin);
  });
  unlock();
  // In one step: whoever reads meanwhile finds the same bytes, there or here.
  if (mremap(own, mapped_bytes_, mapped_bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, data_) ==
      MAP_FAILED) {
    const int error = errno;
    munmap(own, mapped_bytes_);
    if (relock) lock();
    throw HostMemoryError(std::string("memory could not be moved: ") + std::strerror(error));
  }
  memory_.reset();
  anonymous_ = true;
  protected_ = false;
  if (relock) lock();
}

void HostImage::keep() {
  if (protected_) mprotect(data_, mapped_bytes_, PROT_READ | PROT_WRITE);
  protected_ = false;
  memory_.reset();
}

HostStore::HostStore(BackendPtr backend, StoreOptions options)
    : backend_(std::move(backend)),
      options_(resolved(options)),
      totals_(std::make_shared<StoreBytes>()) {}

HostImagePtr HostStore::allocate(std::size_t bytes) {
  return std::make_shared<HostImage>(backend_, bytes, options_, totals_);
}

HostImagePtr HostStore::map_shared(SharedPlace place, std::size_t bytes) {
  return std::make_shared<HostImage>(backend_, bytes, options_, totals_, std::move(place));
}

}  // namespace wanoffload
