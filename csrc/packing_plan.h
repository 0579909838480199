// What a packed image will look like: its runs, chunks and size, from the tensors and the number of
// escapes of every tile. Every encoder plans with this, so all give the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "packed_format.h"

namespace wanoffload {

// A tensor of a plain image. What lies between it and the next one (or the end) belongs to it.
struct PackedTensor {
  std::size_t offset;
  std::size_t bytes;
  bool bf16;

  [[nodiscard]] std::size_t tiles() const { return bf16 ? bytes / packed::kTileBytes : 0; }
};

struct PlannedRun {
  static constexpr std::size_t kNoTile = std::numeric_limits<std::size_t>::max();

  packed::Codec codec;
  std::size_t plain_offset;
  std::size_t plain_bytes;
  std::size_t first_tile;  // among those of all bf16 tensors; kNoTile for a plain run
  std::size_t escapes;
  std::size_t sections = 0;  // where they begin in the packed image

  [[nodiscard]] std::size_t section_bytes() const {
    return packed::section_bytes(codec, plain_bytes, escapes);
  }
};

struct PlannedChunk {
  std::size_t offset;  // in the packed image
  std::size_t bytes;
  std::size_t used_bytes;  // what is behind them is zero
  std::size_t first_run;
  std::size_t runs;
};

// Throws UsageError unless the tensors stand in order, at multiples of 256, the first at 0, do not
// overlap, and end within the image, whose size is a multiple of 256.
void check_tensors(std::size_t plain_bytes, const std::vector<PackedTensor>& tensors);

class PackingPlan {
 public:
  // `escapes`: of each tile of all bf16 tensors, in order. Throws UsageError, and what
  // check_tensors throws.
  PackingPlan(std::size_t plain_bytes, const std::vector<PackedTensor>& tensors,
              std::span<const std::uint32_t> escapes);

  [[nodiscard]] std::size_t plain_bytes() const { return plain_bytes_; }
  [[nodiscard]] std::size_t packed_bytes() const { return packed_bytes_; }
  [[nodiscard]] const std::vector<PlannedRun>& runs() const { return runs_; }
  [[nodiscard]] const std::vector<PlannedChunk>& chunks() const { return chunks_; }

  // Writes the head (zeros behind it included) and each chunk's header and table, and nothing else,
  // into a packed image. `checksums`: one for each run. Throws UsageError.
  void write_heads(std::byte* image, std::span<const std::uint64_t> checksums) const;

 private:
  void add_tensor(std::size_t offset, std::size_t bytes, std::span<const std::uint32_t> escapes,
                  std::size_t first_tile);
  void add_plain_runs(std::size_t offset, std::size_t bytes);
  void place_chunks();
  void write_table(std::byte* image, const PlannedChunk& chunk,
                   std::span<const std::uint64_t> checksums) const;

  const std::size_t plain_bytes_;
  std::size_t packed_bytes_ = 0;
  std::vector<PlannedRun> runs_;
  std::vector<PlannedChunk> chunks_;
};

}  // namespace wanoffload
