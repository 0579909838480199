// The seam below a transfer: "these bytes of yours, into that place". Memory answers with a copy, a
// file with reads; what is page-locked the copy engine takes as it stands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace wanoffload {

// What a transfer has to know of packed bytes: chunks that are unpacked one by one.
struct PackedChunk {
  std::size_t offset;  // in the packed bytes, a multiple of 256
  std::size_t bytes;
  std::uint32_t blocks;  // groups of threads that unpack it
};
struct Packing {
  std::size_t plain_bytes;
  std::size_t head_bytes;  // that precede the first chunk
  std::size_t largest_chunk;
  std::vector<PackedChunk> chunks;
};

// One unit's bytes, wherever they are. Their number never changes.
class Image {
 public:
  explicit Image(std::size_t bytes) : bytes_(bytes) {}
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;
  virtual ~Image() = default;

  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  // Where the bytes stand if they are page-locked, else null.
  [[nodiscard]] virtual const std::byte* locked_data() const = 0;
  [[nodiscard]] bool locked() const { return locked_data() != nullptr; }
  // Where the bytes stand if they are in memory, locked or not, else null.
  [[nodiscard]] virtual const std::byte* host_data() const { return locked_data(); }
  // How the bytes are to be unpacked, or null if they are plain. Always the same answer.
  [[nodiscard]] virtual const Packing* packing() const { return nullptr; }
  // What the unit takes in a slot, unpacked.
  [[nodiscard]] std::size_t plain_bytes() const {
    return packing() != nullptr ? packing()->plain_bytes : bytes_;
  }
  // Puts the bytes [offset, offset + bytes), which must be of this image, into `destination` and
  // writes nowhere else. The ring's threads call this, several at once. Throws TransferError; what
  // is in `destination` then means nothing.
  virtual void read(std::size_t offset, std::size_t bytes, std::byte* destination) const = 0;

  // The same for a chunk of the ring, all of which may be written: puts the bytes anywhere into it
  // and returns where they begin. A file is read in whole blocks like that, without a copy.
  [[nodiscard]] virtual std::size_t read_piece(std::size_t offset, std::size_t bytes,
                                               std::byte* chunk, std::size_t chunk_bytes) const {
    (void)chunk_bytes;
    read(offset, bytes, chunk);
    return 0;
  }
  // How many bytes to ask of read_piece at once for chunks of this size. Always the same answer.
  [[nodiscard]] virtual std::size_t piece_bytes(std::size_t chunk_bytes) const {
    return chunk_bytes;
  }

  // Whether the bytes need no proof. Those that do are proved by the first fetch that brings them.
  [[nodiscard]] virtual bool proven() const { return true; }
  // `found`: the fingerprint of all bytes, as they were read. Throws TransferError if it is not
  // what it should be. Any thread.
  virtual void prove(std::uint64_t found) const { (void)found; }

 private:
  const std::size_t bytes_;
};

using ImagePtr = std::shared_ptr<Image>;

}  // namespace wanoffload
