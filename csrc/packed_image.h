// An image whose bytes are packed: it is stored, copied and proved as the bytes that it is, and
// knows how they are unpacked. docs/packing.md has the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "image.h"
#include "packed_format.h"

namespace wanoffload {

class PackedImage final : public Image {
 public:
  // `stored`: the packed bytes, in memory or in files. Reads and checks the head. Throws
  // TransferError if it is none, or spoilt, and what reading throws.
  explicit PackedImage(ImagePtr stored);

  [[nodiscard]] const ImagePtr& stored() const { return stored_; }
  [[nodiscard]] std::uint64_t plain_fingerprint() const { return head_.fingerprint; }
  [[nodiscard]] const Packing* packing() const override { return &packing_; }

  // Puts the plain bytes [offset, offset + bytes) into `destination` and writes nowhere else; with
  // this many threads, 0: as many as there are cores, 16 at most. Throws UsageError for bytes that
  // the plain image does not have, and TransferError, with their place, for those that are spoilt:
  // a run whose bytes are all asked for is compared with its checksum, and any contradiction in
  // what has to be read is found. Any thread, several at once.
  void unpack(std::size_t offset, std::size_t bytes, std::byte* destination,
              unsigned threads = 0) const;

  [[nodiscard]] const std::byte* locked_data() const override { return stored_->locked_data(); }
  [[nodiscard]] const std::byte* host_data() const override { return stored_->host_data(); }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override {
    stored_->read(offset, bytes, destination);
  }
  [[nodiscard]] std::size_t read_piece(std::size_t offset, std::size_t bytes, std::byte* chunk,
                                       std::size_t chunk_bytes) const override {
    return stored_->read_piece(offset, bytes, chunk, chunk_bytes);
  }
  [[nodiscard]] std::size_t piece_bytes(std::size_t chunk_bytes) const override {
    return stored_->piece_bytes(chunk_bytes);
  }
  [[nodiscard]] bool proven() const override { return stored_->proven(); }
  void prove(std::uint64_t found) const override { stored_->prove(found); }

 private:
  struct Run {
    packed::RunEntry entry;
    std::size_t sections;  // where they begin in the packed image
    [[nodiscard]] std::size_t end() const { return entry.plain_offset + entry.plain_bytes; }
  };
  Packing read_packing() const;
  const std::vector<Run>& runs() const;
  std::vector<Run> read_runs() const;
  void unpack_part(const Run& run, std::size_t begin, std::size_t end,
                   std::byte* destination) const;

  const ImagePtr stored_;
  const packed::Head head_;
  const Packing packing_;

  // In the order of the plain image, which they cover. Read at the first unpack, as the engine
  // never needs them, and constant then.
  mutable std::mutex mutex_;
  mutable std::optional<std::vector<Run>> runs_;
};

using PackedImagePtr = std::shared_ptr<PackedImage>;

}  // namespace wanoffload
