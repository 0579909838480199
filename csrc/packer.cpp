#include "packer.h"

#include <algorithm>
#include <cstring>

#include "backend/processor.h"
#include "errors.h"
#include "fingerprint.h"
#include "packed_tile.h"
#include "parallel.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

// Tiles that one thread looks at, one after the other.
struct TileRange {
  const std::byte* weights;
  std::size_t first_tile;
  std::size_t tiles;
};

std::vector<TileRange> tile_ranges(const std::byte* image,
                                   const std::vector<PackedTensor>& tensors) {
  constexpr std::size_t kGrain = 512;
  std::vector<TileRange> ranges;
  std::size_t first = 0;
  for (const PackedTensor& tensor : tensors) {
    const std::size_t tiles = tensor.tiles();
    for (std::size_t at = 0; at < tiles; at += kGrain) {
      ranges.push_back(
          {image + tensor.offset + at * kTileBytes, first + at, std::min(kGrain, tiles - at)});
    }
    first += tiles;
  }
  return ranges;
}

}  // namespace

Packer::Packer(const std::byte* image, std::size_t plain_bytes,
               const std::vector<PackedTensor>& tensors, unsigned threads)
    : image_(image),
      threads_(thread_count(threads)),
      tiles_(look(image, plain_bytes, tensors, threads_)),
      plan_(plain_bytes, tensors, tiles_.escapes) {}

Packer::Tiles Packer::look(const std::byte* image, std::size_t plain_bytes,
                           const std::vector<PackedTensor>& tensors, unsigned threads) {
  check_tensors(plain_bytes, tensors);
  const auto ranges = tile_ranges(image, tensors);
  const std::size_t count = ranges.empty() ? 0 : ranges.back().first_tile + ranges.back().tiles;
  Tiles tiles{std::vector<std::uint8_t>(count), std::vector<std::uint32_t>(count)};
  parallel_each(ranges.size(), threads, [&](std::size_t i) {
    const TileRange& range = ranges[i];
    for (std::size_t t = 0; t < range.tiles; ++t) {
      if (t + 1 < range.tiles) prefetch(range.weights + (t + 1) * kTileBytes, kTileBytes);
      const TileBase found = best_base(range.weights + t * kTileBytes);
      tiles.bases[range.first_tile + t] = static_cast<std::uint8_t>(found.base);
      tiles.escapes[range.first_tile + t] = found.escapes;
    }
  });
  return tiles;
}

void Packer::write(std::byte* packed) const {
  const auto& runs = plan_.runs();
  std::vector<std::uint64_t> checksums(runs.size());
  parallel_each(runs.size(), threads_, [&](std::size_t i) {
    checksums[i] = write_run(runs[i], packed + runs[i].sections);
  });
  plan_.write_heads(packed, checksums);
  for (const PlannedChunk& chunk : plan_.chunks()) {
    std::memset(packed + chunk.offset + chunk.used_bytes, 0, chunk.bytes - chunk.used_bytes);
  }
}

// Returns the run's checksum.
std::uint64_t Packer::write_run(const PlannedRun& run, std::byte* sections) const {
  if (run.codec == Codec::kExponentCodes) return write_coded(run, sections);
  const std::byte* const plain = image_ + run.plain_offset;
  std::memcpy(sections, plain, run.plain_bytes);  // a multiple of 256: there is no padding
  return fingerprint_part(plain, run.plain_offset, run.plain_bytes);
}

std::uint64_t Packer::write_coded(const PlannedRun& run, std::byte* sections) const {
  const std::size_t tiles = run.plain_bytes / kTileBytes;
  const CodedSections at = coded_sections(tiles, run.escapes);
  std::memset(sections, 0, at.signs);
  std::uint32_t escapes = 0;
  std::uint64_t checksum = 0;
  for (std::size_t t = 0; t < tiles; ++t) {
    const std::size_t offset = run.plain_offset + t * kTileBytes;
    if (t + 1 < tiles) prefetch(image_ + offset + kTileBytes, kTileBytes);
    const std::uint32_t base = tiles_.bases[run.first_tile + t];
    const std::uint32_t entry = base << 24 | escapes;
    std::memcpy(sections + 4 * t, &entry, sizeof(entry));
    const std::uint32_t count = tiles_.escapes[run.first_tile + t];
    if (!pack_tile(image_ + offset, base, sections + at.signs + t * kSignBytes,
                   sections + at.codes + t * kCodeBytes, sections + at.escapes + escapes, count)) {
      throw UsageError("an image was changed while it was packed");
    }
    checksum += fingerprint_part(image_ + offset, offset, kTileBytes);
    escapes += count;
  }
  std::memcpy(sections + 4 * tiles, &escapes, sizeof(escapes));
  std::memset(sections + at.escapes + escapes, 0, at.bytes - at.escapes - escapes);
  return checksum;
}

}  // namespace wanoffload
