#include "file_image.h"

#include <algorithm>
#include <cstring>

namespace wanoffload {

FileImage::FileImage(std::vector<FileExtent> extents, std::size_t bytes)
    : Image(bytes), extents_(checked_extents(std::move(extents), bytes)) {}

bool FileImage::direct() const {
  return std::all_of(extents_.begin(), extents_.end(),
                     [](const FileExtent& extent) { return extent.file->direct(); });
}

FileImage::Extents::const_iterator FileImage::extent_at(std::size_t offset) const {
  return std::partition_point(extents_.begin(), extents_.end(), [&](const FileExtent& each) {
    return each.offset + each.bytes <= offset;
  });
}

void FileImage::read(std::size_t offset, std::size_t bytes, std::byte* destination) const {
  const std::size_t end = offset + bytes;
  std::size_t at = offset;
  const auto place = [&] { return destination + (at - offset); };
  for (auto extent = extent_at(offset); extent != extents_.end() && extent->offset < end;
       ++extent) {
    if (at < extent->offset) {
      std::memset(place(), 0, extent->offset - at);
      at = extent->offset;
    }
    const std::size_t count = std::min(end, extent->offset + extent->bytes) - at;
    extent->file->read(extent->file_offset + (at - extent->offset), count, place(),
                       ReadBy::kDirect);
    at += count;
  }
  std::memset(place(), 0, end - at);
}

std::size_t FileImage::read_piece(std::size_t offset, std::size_t bytes, std::byte* chunk,
                                  std::size_t chunk_bytes) const {
  const auto extent = extent_at(offset);
  const bool within = extent != extents_.end() && extent->offset <= offset &&
                      extent->offset + extent->bytes >= offset + bytes;
  if (within) {
    const std::size_t file_offset = extent->file_offset + (offset - extent->offset);
    if (fits_in_blocks(file_offset, bytes, chunk, chunk_bytes)) {
      return extent->file->read_blocks(file_offset, bytes, chunk);
    }
  }
  read(offset, bytes, chunk);
  return 0;
}

std::size_t FileImage::piece_bytes(std::size_t chunk_bytes) const {
  const bool blocks = chunk_bytes % kDirectAlignment == 0 && chunk_bytes >= 16 * kDirectAlignment;
  return blocks ? chunk_bytes - kDirectAlignment : chunk_bytes;
}

}  // namespace wanoffload
