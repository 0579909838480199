// An image that stands in files and is read anew for each fetch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "image.h"
#include "source_file.h"

namespace wanoffload {

// Made of extents of one or more files; bytes that no extent holds (the padding between tensors)
// read as zeros. Holds no bytes itself. With O_DIRECT, a piece within one extent is read straight
// into the ring's chunk; a piece of several extents, and whatever read() brings, only where file
// and memory are alike modulo 4096, else through a buffer of 4 MiB of the thread that reads it.
class FileImage final : public Image {
 public:
  // `fingerprint`: of the image's bytes, which are then one extent, and to be proved by the first
  // fetch; 0: not known. Throws what checked_extents throws.
  FileImage(std::vector<FileExtent> extents, std::size_t bytes, std::uint64_t fingerprint = 0);

  // Whether all of its files are read past the page cache, as far as is known by now.
  [[nodiscard]] bool direct() const;
  [[nodiscard]] const std::byte* locked_data() const override { return nullptr; }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override;
  [[nodiscard]] std::size_t read_piece(std::size_t offset, std::size_t bytes, std::byte* chunk,
                                       std::size_t chunk_bytes) const override;
  // Less than a chunk by a block, where chunks are whole blocks: there is room for ragged ends.
  [[nodiscard]] std::size_t piece_bytes(std::size_t chunk_bytes) const override;
  [[nodiscard]] bool proven() const override { return proven_; }
  void prove(std::uint64_t found) const override;

  // Bytes of one extent, mapped: true as long as the file is as it was opened, which
  // check_unchanged() tells. Only to be read. Throws UsageError for bytes of no or several extents.
  [[nodiscard]] const std::byte* mapped(std::size_t offset, std::size_t bytes) const;
  // Throws TransferError if one of the files is not what it was when it was opened, or if its bytes
  // are still to be proved and are not what they should be.
  void check() const;

 private:
  using Extents = std::vector<FileExtent>;
  // The first that ends behind this byte of the image.
  [[nodiscard]] Extents::const_iterator extent_at(std::size_t offset) const;

  const Extents extents_;  // in the order of the image
  const std::uint64_t fingerprint_;
  mutable std::atomic<bool> proven_;
};

using FileImagePtr = std::shared_ptr<FileImage>;

}  // namespace wanoffload
