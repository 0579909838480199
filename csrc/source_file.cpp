#include "source_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include "errors.h"

namespace wanoffload {
namespace {

// Any 4 MiB, with the blocks that they begin and end in.
constexpr std::size_t kBounceBytes = (std::size_t{4} << 20) + 2 * kDirectAlignment;
// Below this, one copy costs less than a read of its own for each ragged end.
constexpr std::size_t kLeastStraight = std::size_t{64} << 10;
constexpr std::size_t kLeastAdvised = std::size_t{256} << 10;

std::size_t round_down(std::size_t value) { return value / kDirectAlignment * kDirectAlignment; }
std::size_t round_up(std::size_t value) { return round_down(value + kDirectAlignment - 1); }

std::string text_of(int error) { return std::strerror(error); }

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

// Of this thread, made at its first unaligned read and freed with it.
std::byte* bounce() {
  thread_local const std::unique_ptr<std::byte, Free> memory(
      static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, kBounceBytes)));
  if (!memory) throw HostMemoryError("no memory for a buffer of 4 MiB to read a file through");
  return memory.get();
}

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) ::close(number_);
}

Mapping::Mapping(const Descriptor& file, std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* const memory = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.number(), 0);
  if (memory != MAP_FAILED) data_ = static_cast<std::byte*>(memory);
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

SourceFile::SourceFile(const std::string& path, bool direct)
    : path_(path),
      buffered_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)),
      opened_(state_of(buffered_)),
      mapping_(buffered_, opened_.bytes),
      direct_file_(direct ? ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT) : -1) {
  if (direct && direct_file_.number() < 0) refusal_ = "open: " + text_of(errno);
  if (direct_file_.number() < 0) return;
  const State other = state_of(direct_file_);
  if (other.inode != opened_.inode || other.device != opened_.device) {
    throw TransferError(path + " was replaced while it was opened");
  }
  direct_ = true;
}

SourceFile::State SourceFile::state_of(const Descriptor& file) const {
  struct stat status{};
  if (file.number() < 0 || ::fstat(file.number(), &status) != 0) {
    throw TransferError(path_ + " could not be " + (file.number() < 0 ? "opened: " : "examined: ") +
                        text_of(errno));
  }
  if (!S_ISREG(status.st_mode)) throw TransferError(path_ + " is not a regular file");
  return {static_cast<std::size_t>(status.st_size), status.st_mtim.tv_sec, status.st_mtim.tv_nsec,
          status.st_dev, status.st_ino};
}

std::string SourceFile::direct_refusal() const {
  const std::lock_guard lock(mutex_);
  return refusal_;
}

void SourceFile::refuse_direct(const std::string& why) const {
  const std::lock_guard lock(mutex_);
  refusal_ = why;
  direct_ = false;
}

void SourceFile::fail(std::size_t offset, const std::string& what) const {
  throw TransferError(path_ + ", byte " + std::to_string(offset) + ": " + what);
}

void SourceFile::fail_at(std::uint64_t nth_read, int error) {
  fail_with_ = error;
  fail_at_ = nth_read == 0 ? 0 : reads_.load() + nth_read;
}

void SourceFile::read(std::size_t offset, std::size_t bytes, std::byte* destination,
                      ReadBy by) const {
  if (bytes == 0) return;
  if (by == ReadBy::kDirect && direct_ && !in_page_cache(offset, bytes)) {
    read_direct(offset, bytes, destination);
  } else {
    read_buffered(offset, bytes, destination);
  }
  // Afterwards: what was written before these bytes were read shows in the time by now.
  check_unchanged(offset);
}

// -1: the filesystem refuses O_DIRECT for this descriptor.
ssize_t SourceFile::read_once(const Descriptor& file, std::size_t offset, std::size_t bytes,
                              std::byte* destination) const {
  const std::uint64_t number = ++reads_;
  const bool told_to_fail = number == fail_at_.load();
  for (;;) {
    ssize_t got = ::pread(file.number(), destination, bytes, static_cast<off_t>(offset));
    int error = got < 0 ? errno : 0;
    if (told_to_fail && fail_with_ != 0) {
      got = -1;
      error = fail_with_;
    }
    if (told_to_fail && fail_with_ == 0 && got > 1) {
      got = got / 2 + static_cast<ssize_t>(number % 2);  // each second time within a block
    }
    if (got >= 0) return got;
    if (error == EINVAL && &file == &direct_file_) return got;
    if (error == EINTR) continue;
    fail(offset, "could not be read: " + text_of(error) +
                     (told_to_fail ? ", told to fail at read " + std::to_string(number) : ""));
  }
}

std::size_t SourceFile::read_blocks(std::size_t offset, std::size_t bytes, std::byte* chunk) const {
  if (!direct_ || in_page_cache(offset, bytes)) {
    read(offset, bytes, chunk, ReadBy::kPageCache);
    return 0;
  }
  // Whatever becomes of direct_ meanwhile, the bytes stand behind this lead.
  const std::size_t lead = offset - round_down(offset);
  read_aligned(offset - lead, round_up(lead + bytes), lead + bytes, chunk);
  check_unchanged(offset);
  return lead;
}

bool fits_in_blocks(std::size_t offset, std::size_t bytes, const std::byte* memory,
                    std::size_t memory_bytes) {
  return reinterpret_cast<std::uintptr_t>(memory) % kDirectAlignment == 0 &&
         round_up(offset + bytes) - round_down(offset) <= memory_bytes;
}

void SourceFile::read_buffered(std::size_t offset, std::size_t bytes,
                               std::byte* destination) const {
  // All at once: reading ahead, the system would ask for much less.
  if (bytes >= kLeastAdvised) {
    ::posix_fadvise(buffered_.number(), static_cast<off_t>(offset), static_cast<off_t>(bytes),
                    POSIX_FADV_WILLNEED);
  }
  while (bytes > 0) {
    const auto got = static_cast<std::size_t>(read_once(buffered_, offset, bytes, destination));
    if (got == 0) {
      check_unchanged(offset);
      fail(offset, "the file ends here, " + std::to_string(bytes) + " bytes too early");
    }
    offset += got;
    bytes -= got;
    destination += got;
  }
}

// Where offset and memory are alike, all but the ragged ends goes straight to its place.
void SourceFile::read_direct(std::size_t offset, std::size_t bytes, std::byte* destination) const {
  const std::size_t ragged = offset % kDirectAlignment;
  const bool alike = reinterpret_cast<std::uintptr_t>(destination) % kDirectAlignment == ragged;
  if (!alike || bytes < kLeastStraight) return read_through_bounce(offset, bytes, destination);
  const std::size_t head = round_up(offset) - offset;
  const std::size_t straight = round_down(bytes - head);
  read_through_bounce(offset, head, destination);
  read_aligned(offset + head, straight, straight, destination + head);
  read_through_bounce(offset + head + straight, bytes - head - straight,
                      destination + head + straight);
}

void SourceFile::read_through_bounce(std::size_t offset, std::size_t bytes,
                                     std::byte* destination) const {
  while (bytes > 0) {
    std::byte* const buffer = bounce();
    const std::size_t start = round_down(offset);
    const std::size_t lead = offset - start;
    const std::size_t span = std::min(kBounceBytes, round_up(lead + bytes));
    const std::size_t wanted = std::min(bytes, span - lead);
    read_aligned(start, span, lead + wanted, buffer);
    std::memcpy(destination, buffer + lead, wanted);
    offset += wanted;
    bytes -= wanted;
    destination += wanted;
  }
}

// With O_DIRECT; `most` is aligned, and the file may end behind `least`.
void SourceFile::read_aligned(std::size_t offset, std::size_t most, std::size_t least,
                              std::byte* destination) const {
  std::size_t done = 0;
  while (done < least) {
    const ssize_t got = read_once(direct_file_, offset + done, most - done, destination + done);
    if (got < 0) refuse_direct("read: " + text_of(EINVAL));
    if (got > 0) done += static_cast<std::size_t>(got);
    // Refused, or cut off at the file's end or in the middle of a block: no more aligned reads.
    if (got <= 0 || done % kDirectAlignment != 0) break;
  }
  if (done < least) read_buffered(offset + done, least - done, destination + done);
}

const std::byte* SourceFile::mapped() const {
  if (mapping_.data() == nullptr) fail(0, "the file can't be mapped");
  return mapping_.data();
}

// Whether the page cache holds every page of these bytes. Of files that belong to others and may
// not be written, the kernel says so of all: they are then read through it.
bool SourceFile::in_page_cache(std::size_t offset, std::size_t bytes) const {
  if (mapping_.data() == nullptr || bytes == 0) return false;
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t start = offset / page * page;
  std::array<unsigned char, 1024> present;
  for (std::size_t at = start; at < offset + bytes; at += present.size() * page) {
    const std::size_t span = std::min(offset + bytes - at, present.size() * page);
    if (::mincore(mapping_.data() + at, span, present.data()) != 0) return false;
    const auto pages = static_cast<std::ptrdiff_t>((span + page - 1) / page);
    const auto is_there = [](unsigned char value) { return (value & 1U) != 0; };
    if (!std::all_of(present.begin(), present.begin() + pages, is_there)) return false;
  }
  return true;
}

void SourceFile::check_unchanged(std::size_t offset) const {
  const State now = state_of(buffered_);
  if (now.bytes != opened_.bytes) {
    fail(offset, "the file has " + std::to_string(now.bytes) + " bytes, it had " +
                     std::to_string(opened_.bytes) + " when it was opened");
  }
  if (now.modified_s != opened_.modified_s || now.modified_ns != opened_.modified_ns) {
    fail(offset, "the file was written to after it was opened");
  }
}

std::vector<FileExtent> checked_extents(std::vector<FileExtent> extents, std::size_t image_bytes) {
  std::erase_if(extents, [](const FileExtent& extent) { return extent.bytes == 0; });
  std::sort(extents.begin(), extents.end(),
            [](const FileExtent& a, const FileExtent& b) { return a.offset < b.offset; });
  std::size_t end = 0;
  for (const FileExtent& extent : extents) {
    const std::string what =
        std::to_string(extent.bytes) + " bytes at " + std::to_string(extent.offset);
    if (extent.offset > image_bytes || extent.bytes > image_bytes - extent.offset) {
      throw UsageError("an extent of " + what + " does not fit an image of " +
                       std::to_string(image_bytes));
    }
    if (extent.offset < end) throw UsageError("an extent of " + what + " overlaps another");
    end = extent.offset + extent.bytes;
    const std::size_t has = extent.file->bytes();
    if (extent.file_offset > has || extent.bytes > has - extent.file_offset) {
      throw TransferError(extent.file->path() + " has " + std::to_string(has) + " bytes; " +
                          std::to_string(extent.bytes) + " at " +
                          std::to_string(extent.file_offset) + " are not there");
    }
  }
  return extents;
}

}  // namespace wanoffload
