#include "packed_tile.h"

#include <array>
#include <cstring>

#include "packed_format.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

constexpr std::size_t kExponents = 256;
constexpr std::size_t kWindow = 7;  // exponents with a code of their own
constexpr std::array<std::size_t, kPlaces> kSignOrder = {0, 2, 1, 3, 4, 6, 5, 7};

std::uint16_t weight_at(const std::byte* weights, std::size_t i) {
  std::uint16_t weight;
  std::memcpy(&weight, weights + 2 * i, sizeof(weight));
  return weight;
}
std::uint32_t exponent_of(std::uint16_t weight) { return weight >> 7 & 0xFFU; }

std::size_t index_of(std::size_t group, std::size_t lane, std::size_t place) {
  return 256 * group + 8 * lane + place;
}
std::size_t bit_of(std::size_t place) { return 4 * (place / 2) + 16 * (place % 2); }

std::uint32_t code_of(std::uint32_t exponent, std::uint32_t base) {
  const std::uint32_t code = exponent - base;  // below the base: a large number
  return code < kEscape ? code : kEscape;
}

}  // namespace

TileBase best_base(const std::byte* weights) {
  std::array<std::uint32_t, kExponents> counts{};
  for (std::size_t i = 0; i < kTileWeights; ++i) ++counts[exponent_of(weight_at(weights, i))];
  std::uint32_t outside = kTileWeights;
  for (std::size_t e = 0; e < kWindow; ++e) outside -= counts[e];
  TileBase best{0, outside};
  for (std::uint32_t base = 1; base <= kMostBase; ++base) {
    outside += counts[base - 1] - counts[base + kWindow - 1];
    if (outside < best.escapes) best = {base, outside};
  }
  return best;
}

void pack_tile(const std::byte* weights, std::uint32_t base, std::byte* signs, std::byte* codes,
               std::byte* escapes) {
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    std::array<std::uint32_t, kGroups> words{};
    for (std::size_t group = 0; group < kGroups; ++group) {
      for (std::size_t place = 0; place < kPlaces; ++place) {
        const std::uint16_t weight = weight_at(weights, index_of(group, lane, place));
        const std::uint32_t code = code_of(exponent_of(weight), base);
        words[group] |= code << bit_of(place);
        signs[index_of(group, lane, kSignOrder[place])] =
            static_cast<std::byte>((weight >> 8 & 0x80U) | (weight & 0x7FU));
        if (code == kEscape) *escapes++ = static_cast<std::byte>(exponent_of(weight));
      }
    }
    for (std::size_t p = 0; p < 3; ++p) {
      const std::uint32_t word = words[p] | ((words[3] >> p) & 0x11111111U) << 3;
      std::memcpy(codes + 128 * p + 4 * lane, &word, sizeof(word));
    }
  }
}

namespace {

// G(0) to G(3) of a lane.
std::array<std::uint32_t, kGroups> code_words(const std::byte* codes, std::size_t lane) {
  std::array<std::uint32_t, kGroups> words{};
  for (std::size_t p = 0; p < 3; ++p) {
    std::memcpy(&words[p], codes + 128 * p + 4 * lane, 4);
    words[3] |= (words[p] >> 3 & 0x11111111U) << p;
    words[p] &= 0x77777777U;
  }
  return words;
}

// How many of the eight codes are 7.
std::uint32_t escapes_in(std::uint32_t word) {
  return ((word & word >> 1 & word >> 2 & 0x11111111U) * 0x11111111U) >> 28;
}

std::size_t escapes_of(const std::byte* codes) {
  std::size_t count = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    for (const std::uint32_t word : code_words(codes, lane)) count += escapes_in(word);
  }
  return count;
}

}  // namespace

bool unpack_tile(const std::byte* signs, const std::byte* codes, std::uint32_t base,
                 const std::byte* escapes, std::size_t escape_count, std::byte* weights) {
  if (escapes_of(codes) != escape_count) return false;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const auto words = code_words(codes, lane);
    for (std::size_t group = 0; group < kGroups; ++group) {
      for (std::size_t place = 0; place < kPlaces; ++place) {
        const std::uint32_t code = words[group] >> bit_of(place) & 7U;
        const std::uint32_t exponent =
            code == kEscape ? std::to_integer<std::uint32_t>(*escapes++) : base + code;
        const auto sign =
            std::to_integer<std::uint32_t>(signs[index_of(group, lane, kSignOrder[place])]);
        const auto weight = static_cast<std::uint16_t>((sign & 0x80U) << 8 |
                                                       (exponent & 0xFFU) << 7 | (sign & 0x7FU));
        std::memcpy(weights + 2 * index_of(group, lane, place), &weight, sizeof(weight));
      }
    }
  }
  return true;
}

}  // namespace wanoffload
