#include "pieces_image.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "errors.h"

namespace wanoffload {
namespace {

std::string words(const ImagePiece& piece) {
  return "a piece of " + std::to_string(piece.bytes) + " bytes at " + std::to_string(piece.offset);
}

std::vector<ImagePiece> checked(std::vector<ImagePiece> pieces, std::size_t bytes) {
  std::erase_if(pieces, [](const ImagePiece& piece) { return piece.bytes == 0; });
  std::sort(pieces.begin(), pieces.end(),
            [](const ImagePiece& a, const ImagePiece& b) { return a.offset < b.offset; });
  std::size_t end = 0;
  for (const ImagePiece& piece : pieces) {
    if (piece.offset > bytes || piece.bytes > bytes - piece.offset) {
      throw UsageError(words(piece) + " does not fit an image of " + std::to_string(bytes));
    }
    if (piece.offset < end) throw UsageError(words(piece) + " overlaps the one before it");
    end = piece.offset + piece.bytes;
  }
  return pieces;
}

}  // namespace

PiecesImage::PiecesImage(std::vector<ImagePiece> pieces, std::size_t bytes)
    : Image(bytes), pieces_(checked(std::move(pieces), bytes)) {}

void PiecesImage::read(std::size_t offset, std::size_t bytes, std::byte* destination) const {
  const std::size_t end = offset + bytes;
  std::size_t at = offset;
  auto piece = std::partition_point(pieces_.begin(), pieces_.end(), [&](const ImagePiece& each) {
    return each.offset + each.bytes <= offset;
  });
  for (; piece != pieces_.end() && piece->offset < end; ++piece) {
    const std::size_t begin = std::max(at, piece->offset);
    const std::size_t count = std::min(end, piece->offset + piece->bytes) - begin;
    std::memset(destination + (at - offset), 0, begin - at);
    std::memcpy(destination + (begin - offset),
                static_cast<const std::byte*>(piece->source) + (begin - piece->offset), count);
    at = begin + count;
  }
  std::memset(destination + (at - offset), 0, end - at);
}

}  // namespace wanoffload
