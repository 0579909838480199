// A file whose bytes become images: a checkpoint or a cache file. Opened once, read by many
// threads, and noticed when it is not what it was when it was opened.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace wanoffload {

// What O_DIRECT asks of offset, length and memory. A filesystem that asks for more refuses, and is
// read buffered.
inline constexpr std::size_t kDirectAlignment = 4096;

enum class ReadBy : std::uint8_t {
  kPageCache,  // buffered: quick for what is in the page cache, and leaves what it read there
  kDirect,     // O_DIRECT, but for what is in the page cache; buffered where the filesystem refuses
};

// Owns a descriptor.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();
  [[nodiscard]] int number() const { return number_; }

 private:
  const int number_;
};

// Owns a mapping of a whole file, to be read; null where there is none to be had.
class Mapping {
 public:
  Mapping(const Descriptor& file, std::size_t bytes);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  [[nodiscard]] std::byte* data() const { return data_; }

 private:
  const std::size_t bytes_;
  std::byte* data_ = nullptr;
};

// Any thread may call any method. A file that is replaced by rename still reads as what was opened.
class SourceFile {
 public:
  // `direct`: open it with O_DIRECT too. Throws TransferError if it can't be opened or is no
  // regular file.
  SourceFile(const std::string& path, bool direct);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::size_t bytes() const { return opened_.bytes; }  // when it was opened
  // Whether ReadBy::kDirect goes past the page cache. Turns to false for good when the filesystem
  // refuses, which it may do at the first read; direct_refusal() says how, "" if it did not.
  [[nodiscard]] bool direct() const { return direct_; }
  [[nodiscard]] std::string direct_refusal() const;

  // Reads these bytes, all of them, and writes nowhere else. Throws TransferError with the path,
  // the offset and what happened: the file ended, could not be read, or its size or time of
  // modification is not what it was when it was opened.
  void read(std::size_t offset, std::size_t bytes, std::byte* destination, ReadBy by) const;

  // The same with kDirect, in whole blocks: what is read around the bytes is written too.
  // `chunk` must be one that fits_in_blocks. Returns where in it the bytes begin. Buffered where
  // O_DIRECT is not to be had.
  [[nodiscard]] std::size_t read_blocks(std::size_t offset, std::size_t bytes,
                                        std::byte* chunk) const;

  // Throws TransferError, which names this offset, if the file is not what it was when it was
  // opened.
  void check_unchanged(std::size_t offset) const;
  // The whole file, mapped to be read. What is cut off meanwhile ends the process that touches it:
  // check_unchanged() comes first. Throws TransferError. Lives as long as this object.
  [[nodiscard]] const std::byte* mapped() const;

  // For tests: the n-th read from now on (1 is the next; one call of read() makes one or more)
  // answers with this error, once; with 0 it comes back with half of what was asked for. nth_read 0
  // takes that back.
  void fail_at(std::uint64_t nth_read, int error);
  // Reads issued to the system since construction.
  [[nodiscard]] std::uint64_t reads() const { return reads_; }

 private:
  // What tells one state of a file from another.
  struct State {
    std::size_t bytes;
    std::int64_t modified_s, modified_ns;
    dev_t device;
    ino_t inode;
  };

  void read_buffered(std::size_t offset, std::size_t bytes, std::byte* destination) const;
  void read_direct(std::size_t offset, std::size_t bytes, std::byte* destination) const;
  void read_through_bounce(std::size_t offset, std::size_t bytes, std::byte* destination) const;
  void read_aligned(std::size_t offset, std::size_t most, std::size_t least,
                    std::byte* destination) const;
  [[nodiscard]] ssize_t read_once(const Descriptor& file, std::size_t offset, std::size_t bytes,
                                  std::byte* destination) const;
  [[nodiscard]] bool in_page_cache(std::size_t offset, std::size_t bytes) const;
  [[nodiscard]] State state_of(const Descriptor& file) const;
  void refuse_direct(const std::string& why) const;
  [[noreturn]] void fail(std::size_t offset, const std::string& what) const;

  const std::string path_;
  const Descriptor buffered_;
  const State opened_;
  const Mapping mapping_;
  const Descriptor direct_file_;
  mutable std::atomic<bool> direct_{false};
  mutable std::atomic<std::uint64_t> reads_{0};
  std::atomic<std::uint64_t> fail_at_{0};
  std::atomic<int> fail_with_{0};

  mutable std::mutex mutex_;
  mutable std::string refusal_;  // guarded by mutex_
};

// Whether the blocks that hold these bytes of a file fit into this memory, aligned.
[[nodiscard]] bool fits_in_blocks(std::size_t offset, std::size_t bytes, const std::byte* memory,
                                  std::size_t memory_bytes);

using SourceFilePtr = std::shared_ptr<SourceFile>;

// A run of bytes of a file and where it stands in an image.
struct FileExtent {
  SourceFilePtr file;
  std::size_t file_offset;
  std::size_t bytes;
  std::size_t offset;  // in the image
};

// The extents in the order of the image, without empty ones. Throws UsageError where one leaves the
// image or meets another, TransferError where a file ends too early.
[[nodiscard]] std::vector<FileExtent> checked_extents(std::vector<FileExtent> extents,
                                                      std::size_t image_bytes);

}  // namespace wanoffload
