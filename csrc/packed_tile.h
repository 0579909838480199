// One tile of 1,024 bf16 weights: from weights to sections and back. Addresses need no alignment.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wanoffload {

struct TileBase {
  std::uint32_t base;  // 0..248: that with the most exponents in base..base+6, the lowest of them
  std::uint32_t escapes;  // exponents outside of these
};
[[nodiscard]] TileBase best_base(const std::byte* weights);

// Writes the tile's 1,024 bytes of signs and mantissas, 384 of codes, and its escapes. Returns
// false, with no escape written, if the tile has not exactly this many.
[[nodiscard]] bool pack_tile(const std::byte* weights, std::uint32_t base, std::byte* signs,
                             std::byte* codes, std::byte* escapes, std::size_t escape_count);

// Returns false, with nothing written, if the codes do not ask for exactly this many escapes.
// `base` is 0..255.
[[nodiscard]] bool unpack_tile(const std::byte* signs, const std::byte* codes, std::uint32_t base,
                               const std::byte* escapes, std::size_t escape_count,
                               std::byte* weights);

}  // namespace wanoffload
