#include <algorithm>
#include <cstring>

#include "packed_tile.h"
#include "tile_codes.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

constexpr std::size_t kExponents = 256;
constexpr std::size_t kWindow = 7;  // exponents with a code of their own

using Counts = std::array<std::uint16_t, kExponents>;

std::uint16_t exponent_of(std::uint16_t weight) { return weight >> 7 & 0xFF; }

// A count of its own for each of eight weights in a row, because one that was just written is slow
// to be read again; 128 is the most that one can come to.
Counts exponent_counts(const std::byte* weights) {
  std::array<std::array<std::uint8_t, kExponents>, 8> parts{};
  for (std::size_t i = 0; i < kTileWeights; i += 8) {
    std::array<std::uint64_t, 2> fours;
    std::memcpy(fours.data(), weights + 2 * i, sizeof(fours));
    for (std::size_t p = 0; p < 4; ++p) {
      ++parts[p][fours[0] >> (16 * p + 7) & 0xFF];
      ++parts[4 + p][fours[1] >> (16 * p + 7) & 0xFF];
    }
  }
  Counts counts;
  for (std::size_t e = 0; e < kExponents; ++e) {
    unsigned sum = 0;
    for (const auto& part : parts) sum += part[e];
    counts[e] = static_cast<std::uint16_t>(sum);
  }
  return counts;
}

}  // namespace

TileBase best_base(const std::byte* weights) {
  const Counts counts = exponent_counts(weights);
  std::array<std::int16_t, kMostBase + 1> inside;
  for (std::size_t base = 0; base <= kMostBase; ++base) {
    int sum = 0;
    for (std::size_t e = 0; e < kWindow; ++e) sum += counts[base + e];
    inside[base] = static_cast<std::int16_t>(sum);
  }
  std::int16_t most = 0;
  for (const std::int16_t each : inside) most = std::max(most, each);
  const auto best = std::find(inside.begin(), inside.end(), most);
  return {static_cast<std::uint32_t>(best - inside.begin()),
          static_cast<std::uint32_t>(kTileWeights - static_cast<std::size_t>(most))};
}

namespace {

void pack_signs(const Weights& weights, std::byte* signs) {
  const auto fours = std::bit_cast<Fours>(weights);
  SignBytes bytes;
  for (std::size_t i = 0; i < fours.size(); ++i) {
    const std::uint64_t four =
        (fours[i] >> 8 & in_each_field(0x80)) | (fours[i] & in_each_field(0x7F));
    bytes[i] = static_cast<std::uint32_t>(four | four >> 24);  // the fields 0, 2, 1, 3
  }
  std::memcpy(signs, bytes.data(), sizeof(bytes));
}

Codes code_words(const Weights& weights, std::uint32_t base) {
  Weights fields;
  for (std::size_t i = 0; i < kTileWeights; ++i) {
    // Below the base: a large number.
    const auto code = static_cast<std::uint16_t>(exponent_of(weights[i]) - base);
    fields[i] = std::min<std::uint16_t>(code, kEscape);
  }
  const auto fours = std::bit_cast<Fours>(fields);
  Codes words;
  for (std::size_t i = 0; i < kWords; ++i) {
    const std::uint64_t low = fours[2 * i];  // places 0 to 3
    const std::uint64_t high = fours[2 * i + 1];
    words[i] = static_cast<std::uint32_t>(low | low >> 28) |
               static_cast<std::uint32_t>(high | high >> 28) << 8;
  }
  return words;
}

void pack_codes(const Codes& words, std::byte* codes) {
  CodeWords packed;
  for (std::size_t p = 0; p < 3; ++p) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      packed[kLanes * p + lane] =
          words[kLanes * p + lane] | ((words[kLanes * 3 + lane] >> p) & kNibbles) << 3;
    }
  }
  std::memcpy(codes, packed.data(), sizeof(packed));
}

}  // namespace

bool pack_tile(const std::byte* weights, std::uint32_t base, std::byte* signs, std::byte* codes,
               std::byte* escapes, std::size_t escape_count) {
  Weights loaded;
  std::memcpy(loaded.data(), weights, sizeof(loaded));
  pack_signs(loaded, signs);
  const Codes words = code_words(loaded, base);
  pack_codes(words, codes);
  Escapes found;
  std::size_t count = 0;
  for_each_escape(words, [&](std::size_t i, bool there) {
    found[count] = static_cast<std::byte>(exponent_of(loaded[i]));
    count += there;
  });
  if (count != escape_count) return false;
  std::memcpy(escapes, found.data(), count);
  return true;
}

}  // namespace wanoffload
