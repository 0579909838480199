// An image that stands in files and is read anew for each fetch.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "image.h"
#include "source_file.h"

namespace wanoffload {

// Made of extents of one or more files; bytes that no extent holds (the padding between tensors)
// read as zeros. Holds no bytes itself: an extent that does not stand in its file as it will in
// memory, modulo 4096, passes a buffer of 4 MiB of the thread that reads it.
class FileImage final : public Image {
 public:
  // Throws what checked_extents throws.
  FileImage(std::vector<FileExtent> extents, std::size_t bytes);

  // Whether all of its files are read past the page cache, as far as is known by now.
  [[nodiscard]] bool direct() const;
  [[nodiscard]] const std::byte* locked_data() const override { return nullptr; }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override;

 private:
  const std::vector<FileExtent> extents_;  // in the order of the image
};

using FileImagePtr = std::shared_ptr<FileImage>;

}  // namespace wanoffload
