#include "packed_image.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "errors.h"
#include "parallel.h"
#include "unpacker.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

void check(bool right, const std::string& wrong) {
  if (!right) throw TransferError("a packed image is spoilt: " + wrong);
}

// Bytes of an image where they stand in memory; else `buffer` is filled with them.
const std::byte* bytes_of(const Image& image, std::size_t offset, std::size_t bytes,
                          std::vector<std::byte>& buffer) {
  if (const std::byte* const data = image.host_data()) return data + offset;
  buffer.resize(bytes);
  image.read(offset, bytes, buffer.data());
  return buffer.data();
}

Head read_head(const Image& stored) {
  Head head{};
  const bool room = stored.bytes() >= sizeof(head);
  if (room) stored.read(0, sizeof(head), reinterpret_cast<std::byte*>(&head));
  if (!room || std::memcmp(head.magic, kMagic, sizeof(kMagic)) != 0) {
    throw TransferError("these " + std::to_string(stored.bytes()) + " bytes are no packed image");
  }
  check(head.version == kVersion, "it has version " + std::to_string(head.version) +
                                      "; only version 1 is known. Pack the weights anew");
  check(head.packed_bytes == stored.bytes(), "it should have " + std::to_string(head.packed_bytes) +
                                                 " bytes, and has " +
                                                 std::to_string(stored.bytes()));
  check(head.chunks <= kMostChunks && head_bytes(head.chunks) <= stored.bytes(),
        "it can't have " + std::to_string(head.chunks) + " chunks");
  check(head.plain_bytes % kAlignment == 0, "its plain image has no multiple of 256 bytes");
  return head;
}

void check_entry(const ChunkEntry& entry, std::size_t number, std::size_t from, std::size_t end) {
  const std::string named = "chunk " + std::to_string(number) + " ";
  check(entry.offset % kAlignment == 0 && entry.bytes % kAlignment == 0 && entry.bytes > 0,
        named + "is not whole lines of 256 bytes");
  check(entry.offset >= from && entry.offset <= end && entry.bytes <= end - entry.offset,
        named + "lies outside of it, or over the one before it");
  check(entry.blocks > 0 && entry.blocks <= kMostRuns * blocks_of(kMostRunBytes),
        named + "can't have " + std::to_string(entry.blocks) + " blocks");
}

}  // namespace

PackedImage::PackedImage(ImagePtr stored)
    : Image(stored->bytes()),
      stored_(std::move(stored)),
      head_(read_head(*stored_)),
      packing_(read_packing()) {}

Packing PackedImage::read_packing() const {
  std::vector<ChunkEntry> entries(head_.chunks);
  if (!entries.empty()) {
    stored_->read(sizeof(Head), entries.size() * sizeof(ChunkEntry),
                  reinterpret_cast<std::byte*>(entries.data()));
  }
  Packing packing{head_.plain_bytes, head_bytes(head_.chunks), 0, {}};
  std::size_t end = packing.head_bytes;
  std::size_t blocks = 0;
  for (const ChunkEntry& entry : entries) {
    check_entry(entry, packing.chunks.size(), end, bytes());
    packing.chunks.push_back({entry.offset, entry.bytes, entry.blocks});
    packing.largest_chunk = std::max<std::size_t>(packing.largest_chunk, entry.bytes);
    end = entry.offset + entry.bytes;
    blocks += entry.blocks;
  }
  // A block unpacks to 256 bytes at least, and 16,384 at most.
  check(blocks <= head_.plain_bytes / kAlignment && head_.plain_bytes / kBlockBytes <= blocks,
        "its plain image can't have " + std::to_string(head_.plain_bytes) + " bytes");
  return packing;
}

const std::vector<PackedImage::Run>& PackedImage::runs() const {
  const std::lock_guard lock(mutex_);
  if (!runs_) runs_ = read_runs();
  return *runs_;
}

std::vector<PackedImage::Run> PackedImage::read_runs() const {
  std::vector<Run> runs;
  std::vector<std::byte> buffer;
  std::size_t end = 0;
  std::uint64_t fingerprint = 0;
  for (const PackedChunk& chunk : packing_.chunks) {
    const std::size_t start_bytes = std::min(table_bytes(kMostRuns), chunk.bytes);
    const std::byte* const start = bytes_of(*stored_, chunk.offset, start_bytes, buffer);
    for (const RunEntry& entry :
         read_chunk_table(start, start_bytes, chunk.bytes, head_.plain_bytes)) {
      check(entry.plain_offset == end, "its runs do not follow each other");
      runs.push_back({entry, chunk.offset + entry.sections});
      end = runs.back().end();
      fingerprint += entry.checksum;
    }
  }
  check(end == head_.plain_bytes, "its runs do not cover the plain image");
  check(fingerprint == head_.fingerprint, "its runs' checksums are not those of the head");
  return runs;
}

void PackedImage::unpack(std::size_t offset, std::size_t bytes, std::byte* destination,
                         unsigned threads) const {
  if (offset > head_.plain_bytes || bytes > head_.plain_bytes - offset) {
    throw UsageError(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                     " are not in a plain image of " + std::to_string(head_.plain_bytes));
  }
  if (bytes == 0) return;
  const std::size_t end = offset + bytes;
  const std::vector<Run>& all = runs();
  const auto first = std::partition_point(all.begin(), all.end(),
                                          [&](const Run& run) { return run.end() <= offset; });
  const auto last = std::partition_point(
      first, all.end(), [&](const Run& run) { return run.entry.plain_offset < end; });
  const auto count = static_cast<std::size_t>(last - first);
  parallel_each(count, thread_count(threads), [&](std::size_t i) {
    const Run& run = first[static_cast<std::ptrdiff_t>(i)];
    const std::size_t from = std::max<std::size_t>(offset, run.entry.plain_offset);
    unpack_part(run, from - run.entry.plain_offset,
                std::min(end, run.end()) - run.entry.plain_offset, destination + (from - offset));
  });
}

// The bytes [begin, end) of what the run covers.
void PackedImage::unpack_part(const Run& run, std::size_t begin, std::size_t end,
                              std::byte* destination) const {
  const RunEntry& entry = run.entry;
  std::vector<std::byte> buffer;
  const std::byte* const sections = bytes_of(
      *stored_, run.sections, section_bytes(entry.codec, entry.plain_bytes, entry.escapes), buffer);
  const bool whole = end - begin == entry.plain_bytes;
  const bool right = whole ? unpack_whole_run(entry, sections, destination)
                           : unpack_run(entry, sections, begin, end, destination);
  check(right, "the plain bytes " + std::to_string(entry.plain_offset) + " to " +
                   std::to_string(run.end()) +
                   " do not come out as they were packed. Pack the weights anew");
}

}  // namespace wanoffload
