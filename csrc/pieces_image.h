// An image whose bytes stand in several places of host memory: tensors where they are, before they
// have an image of their own.
#pragma once

#include <cstddef>
#include <vector>

#include "host_store.h"
#include "image.h"

namespace wanoffload {

// Bytes that no piece holds read as zeros. Keeps nothing alive: the owner must not let the pieces
// go, nor change them, while a transfer reads them.
class PiecesImage final : public Image {
 public:
  // Pieces in any order. Throws UsageError for those that overlap or are not within the image.
  PiecesImage(std::vector<ImagePiece> pieces, std::size_t bytes);

  [[nodiscard]] const std::byte* locked_data() const override { return nullptr; }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override;

 private:
  const std::vector<ImagePiece> pieces_;  // in the order of the image; none is empty
};

}  // namespace wanoffload
