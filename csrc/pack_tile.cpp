#include <algorithm>
#include <cstring>

#include "backend/processor.h"
#include "packed_tile.h"
#include "tile_codes.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

// The bytes 0, 2, 1, 3.
std::uint32_t middle_swapped(std::uint32_t four) {
  return (four & 0xFF0000FFU) | (four >> 8 & 0xFF00U) | (four << 8 & 0xFF0000U);
}

void pack_signs(const std::byte* weights, std::byte* signs) {
  Bytes bytes;
  for (std::size_t i = 0; i < kTileWeights; ++i) {
    const auto weight = load<std::uint16_t>(weights + 2 * i);
    bytes[i] = static_cast<std::uint8_t>((weight >> 8 & 0x80) | (weight & 0x7F));
  }
  for (std::size_t i = 0; i < kTileWeights; i += 4) {
    store(signs + i, middle_swapped(load<std::uint32_t>(&bytes[i])));
  }
}

Codes code_words(const Bytes& exponents, std::uint32_t base) {
  Bytes codes;
  for (std::size_t i = 0; i < kTileWeights; ++i) {
    // Below the base: at least 8, for the base is at most 248.
    const auto code = static_cast<std::uint8_t>(exponents[i] - base);
    codes[i] = std::min<std::uint8_t>(code, kEscape);
  }
  std::array<std::uint16_t, kTileWeights / 4> halves;  // the places 0, 2, 1, 3 of four weights
  for (std::size_t i = 0; i < halves.size(); ++i) {
    const auto four = load<std::uint32_t>(&codes[4 * i]);
    halves[i] = static_cast<std::uint16_t>(four | four >> 12);
  }
  Codes words;
  for (std::size_t i = 0; i < kWords; ++i) {
    words[i] = middle_swapped(load<std::uint32_t>(&halves[2 * i]));
  }
  return words;
}

void pack_codes(const Codes& words, std::byte* codes) {
  for (std::size_t p = 0; p < 3; ++p) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t last = words[kLanes * 3 + lane] >> p & kNibbles;
      store(codes + 4 * (kLanes * p + lane), words[kLanes * p + lane] | last << 3);
    }
  }
}

bool pack(const std::byte* weights, std::uint32_t base, std::byte* signs, std::byte* codes,
          std::byte* escapes, std::size_t escape_count) {
  pack_signs(weights, signs);
  const Bytes exponents = exponents_of(weights);
  const Codes words = code_words(exponents, base);
  pack_codes(words, codes);
  Escapes found;
  std::size_t count = 0;
  for_each_escape(words, [&](std::size_t i, bool there) {
    found[count] = std::byte{exponents[i]};
    count += there;
  });
  if (count != escape_count) return false;
  std::memcpy(escapes, found.data(), count);
  return true;
}

WANOFFLOAD_WIDE bool pack_wide(const std::byte* weights, std::uint32_t base, std::byte* signs,
                               std::byte* codes, std::byte* escapes, std::size_t escape_count) {
  return pack(weights, base, signs, codes, escapes, escape_count);
}

}  // namespace

bool pack_tile(const std::byte* weights, std::uint32_t base, std::byte* signs, std::byte* codes,
               std::byte* escapes, std::size_t escape_count) {
  return wide_vectors() ? pack_wide(weights, base, signs, codes, escapes, escape_count)
                        : pack(weights, base, signs, codes, escapes, escape_count);
}

}  // namespace wanoffload
