#include "file_image.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "errors.h"
#include "fingerprint.h"

namespace wanoffload {

FileImage::FileImage(std::vector<FileExtent> extents, std::size_t bytes, std::uint64_t fingerprint)
    : Image(bytes),
      extents_(checked_extents(std::move(extents), bytes)),
      fingerprint_(fingerprint),
      proven_(fingerprint == 0) {
  const bool whole = extents_.size() == 1 && extents_.front().bytes == bytes && bytes % 4 == 0;
  if (fingerprint != 0 && !whole) {
    throw UsageError("an image with a fingerprint is one extent, of whole words");
  }
}

void FileImage::prove(std::uint64_t found) const {
  if (fingerprint_ != 0 && found != fingerprint_) {
    const FileExtent& extent = extents_.front();
    throw TransferError(extent.file->path() + ", byte " + std::to_string(extent.file_offset) +
                        ": the " + std::to_string(bytes()) +
                        " bytes from here are not those that were written: their checksum differs");
  }
  proven_ = true;
}

const std::byte* FileImage::mapped(std::size_t offset, std::size_t bytes) const {
  const auto extent = extent_at(offset);
  if (extent == extents_.end() || extent->offset > offset ||
      extent->offset + extent->bytes - offset < bytes) {
    throw UsageError(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                     " are not of one extent");
  }
  return extent->file->mapped() + extent->file_offset + (offset - extent->offset);
}

void FileImage::check() const {
  const SourceFile* last = nullptr;
  for (const FileExtent& extent : extents_) {
    if (extent.file.get() != last) extent.file->check_unchanged(extent.file_offset);
    last = extent.file.get();
  }
  if (!proven_) prove(fingerprint_part(mapped(0, bytes()), 0, bytes()));
}

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
