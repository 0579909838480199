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

void FileImage::read(std::size_t offset, std::size_t bytes, std::byte* destination) const {
  const std::size_t end = offset + bytes;
  auto extent = std::partition_point(extents_.begin(), extents_.end(), [&](const FileExtent& each) {
    return each.offset + each.bytes <= offset;
  });
  std::size_t at = offset;
  const auto place = [&] { return destination + (at - offset); };
  for (; extent != extents_.end() && extent->offset < end; ++extent) {
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

}  // namespace wanoffload
