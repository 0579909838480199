#include "packing_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "errors.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

std::size_t next_offset(const std::vector<PackedTensor>& tensors, std::size_t i,
                        std::size_t plain_bytes) {
  return i + 1 < tensors.size() ? tensors[i + 1].offset : plain_bytes;
}

std::string named(std::size_t i) { return "tensor " + std::to_string(i) + " to be packed "; }

// Coded runs of a tensor's whole tiles.
std::vector<PlannedRun> coded_runs(std::size_t offset, std::span<const std::uint32_t> escapes,
                                   std::size_t first_tile) {
  constexpr std::size_t kMostTiles = kMostRunBytes / kTileBytes;
  std::vector<PlannedRun> runs;
  for (std::size_t tile = 0; tile < escapes.size(); tile += kMostTiles) {
    const auto part = escapes.subspan(tile, std::min(kMostTiles, escapes.size() - tile));
    runs.push_back({Codec::kExponentCodes, offset + tile * kTileBytes, part.size() * kTileBytes,
                    first_tile + tile, std::accumulate(part.begin(), part.end(), std::size_t{0})});
  }
  return runs;
}

}  // namespace

void check_tensors(std::size_t plain_bytes, const std::vector<PackedTensor>& tensors) {
  if (plain_bytes % kAlignment != 0) {
    throw UsageError("a plain image has a multiple of 256 bytes, not " +
                     std::to_string(plain_bytes));
  }
  if ((tensors.empty() && plain_bytes > 0) || (!tensors.empty() && tensors[0].offset != 0)) {
    throw UsageError("the first tensor of a plain image stands at its first byte");
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const PackedTensor& tensor = tensors[i];
    const std::size_t end = next_offset(tensors, i, plain_bytes);
    if (tensor.offset % kAlignment != 0) throw UsageError(named(i) + "is not 256-byte aligned");
    if (tensor.offset > end || tensor.bytes > end - tensor.offset) {
      throw UsageError(named(i) + "reaches into the next one, or beyond the image");
    }
    if (tensor.bf16 && tensor.bytes % 2 != 0) throw UsageError(named(i) + "has half a weight");
  }
}

PackingPlan::PackingPlan(std::size_t plain_bytes, const std::vector<PackedTensor>& tensors,
                         std::span<const std::uint32_t> escapes)
    : plain_bytes_(plain_bytes) {
  check_tensors(plain_bytes, tensors);
  std::size_t tiles = 0;
  for (const PackedTensor& tensor : tensors) tiles += tensor.tiles();
  if (tiles != escapes.size()) {
    throw UsageError(std::to_string(tiles) + " tiles are to be packed, and the escapes of " +
                     std::to_string(escapes.size()) + " are known");
  }
  if (std::any_of(escapes.begin(), escapes.end(), [](auto n) { return n > kTileWeights; })) {
    throw UsageError("a tile has at most 1,024 escapes");
  }
  std::size_t tile = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::size_t offset = tensors[i].offset;
    add_tensor(offset, next_offset(tensors, i, plain_bytes) - offset,
               escapes.subspan(tile, tensors[i].tiles()), tile);
    tile += tensors[i].tiles();
  }
  place_chunks();
}

// `bytes`: up to the next tensor.
void PackingPlan::add_tensor(std::size_t offset, std::size_t bytes,
                             std::span<const std::uint32_t> escapes, std::size_t first_tile) {
  const auto coded = coded_runs(offset, escapes, first_tile);
  const std::size_t behind = bytes - escapes.size() * kTileBytes;
  std::size_t packed_bytes = behind;
  for (const PlannedRun& run : coded) packed_bytes += run.section_bytes();
  if (10 * packed_bytes > 9 * bytes) return add_plain_runs(offset, bytes);
  runs_.insert(runs_.end(), coded.begin(), coded.end());
  add_plain_runs(offset + bytes - behind, behind);
}

void PackingPlan::add_plain_runs(std::size_t offset, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kMostRunBytes) {
    runs_.push_back(
        {Codec::kPlain, offset + at, std::min(kMostRunBytes, bytes - at), PlannedRun::kNoTile, 0});
  }
}

// Runs into chunks, and everything to its place.
void PackingPlan::place_chunks() {
  std::size_t sections = 0;
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    sections += runs_[i].section_bytes();
    if (i == 0 || chunks_.back().runs == kMostRuns ||
        table_bytes(chunks_.back().runs + 1) + sections > kMostChunkBytes) {
      chunks_.push_back({0, 0, 0, i, 0});
      sections = runs_[i].section_bytes();
    }
    ++chunks_.back().runs;
  }
  if (chunks_.size() > kMostChunks) {
    throw UsageError("a packed image has at most 65,536 chunks; this would have " +
                     std::to_string(chunks_.size()));
  }
  packed_bytes_ = head_bytes(chunks_.size());
  for (PlannedChunk& chunk : chunks_) {
    chunk.offset = packed_bytes_;
    chunk.used_bytes = table_bytes(chunk.runs);
    for (PlannedRun& run : std::span(runs_).subspan(chunk.first_run, chunk.runs)) {
      run.sections = chunk.offset + chunk.used_bytes;
      chunk.used_bytes += run.section_bytes();
    }
    chunk.bytes = align(chunk.used_bytes, kAlignment);
    packed_bytes_ += chunk.bytes;
  }
}

void PackingPlan::write_heads(std::byte* image, std::span<const std::uint64_t> checksums) const {
  if (checksums.size() != runs_.size()) {
    throw UsageError("one checksum for each of " + std::to_string(runs_.size()) + " runs, not " +
                     std::to_string(checksums.size()));
  }
  Head head{{},
            kVersion,
            static_cast<std::uint32_t>(chunks_.size()),
            plain_bytes_,
            packed_bytes_,
            std::accumulate(checksums.begin(), checksums.end(), std::uint64_t{0})};
  std::memcpy(head.magic, kMagic, sizeof(kMagic));
  std::memset(image, 0, head_bytes(chunks_.size()));
  std::memcpy(image, &head, sizeof(head));
  std::byte* entry_at = image + sizeof(head);
  for (const PlannedChunk& chunk : chunks_) {
    write_table(image, chunk, checksums);
    ChunkHeader header;
    std::memcpy(&header, image + chunk.offset, sizeof(header));
    const ChunkEntry entry{chunk.offset, header.bytes, header.blocks};
    std::memcpy(entry_at, &entry, sizeof(entry));
    entry_at += sizeof(entry);
  }
}

void PackingPlan::write_table(std::byte* image, const PlannedChunk& chunk,
                              std::span<const std::uint64_t> checksums) const {
  std::byte* const start = image + chunk.offset;
  std::uint32_t blocks = 0;
  for (std::size_t i = 0; i < chunk.runs; ++i) {
    const PlannedRun& run = runs_[chunk.first_run + i];
    const RunEntry entry{run.codec,
                         blocks,
                         run.plain_offset,
                         static_cast<std::uint32_t>(run.plain_bytes),
                         static_cast<std::uint32_t>(run.sections - chunk.offset),
                         static_cast<std::uint32_t>(run.escapes),
                         0,
                         checksums[chunk.first_run + i],
                         0};
    std::memcpy(start + table_bytes(i), &entry, sizeof(entry));
    blocks += blocks_of(run.plain_bytes);
  }
  const ChunkHeader header{static_cast<std::uint32_t>(chunk.runs), blocks,
                           static_cast<std::uint32_t>(chunk.bytes), 0};
  std::memcpy(start, &header, sizeof(header));
}

}  // namespace wanoffload
