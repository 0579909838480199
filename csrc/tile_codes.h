// What packing and unpacking a tile have in common. Loops here and there run over whole arrays and
// do one thing each, so that the compiler makes vectors of them.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "packed_format.h"

namespace wanoffload::packed {

constexpr std::uint32_t kNibbles = 0x11111111U;
constexpr std::size_t kWords = kGroups * kLanes;

using Weights = std::array<std::uint16_t, kTileWeights>;
using Bytes = std::array<std::uint8_t, kTileWeights>;  // one of each weight
using Codes = std::array<std::uint32_t, kWords>;       // G(k) of lane l at 32 k + l
// Four weights, or what became of them, in the four 16-bit fields of a word; two words a lane.
using Fours = std::array<std::uint64_t, kTileWeights / 4>;
using SignBytes = std::array<std::uint32_t, kSignBytes / 4>;
using CodeWords = std::array<std::uint32_t, kCodeBytes / 4>;

constexpr std::uint64_t in_each_field(std::uint64_t value) { return value * 0x0001000100010001U; }

// What stands at an address of any alignment. Loops read and write in place with these, because
// the copies that casting whole arrays makes take longer than what is done with them.
template <class Value>
Value load(const void* from) {
  Value value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
template <class Value>
void store(void* to, Value value) {
  std::memcpy(to, &value, sizeof(value));
}

inline Bytes exponents_of(const std::byte* weights) {
  Bytes exponents;
  for (std::size_t i = 0; i < kTileWeights; ++i) {
    exponents[i] = static_cast<std::uint8_t>(load<std::uint16_t>(weights + 2 * i) >> 7);
  }
  return exponents;
}

// A bit for each code that is 7, where its three bits begin.
inline std::uint32_t escapes_in(std::uint32_t word) {
  return word & word >> 1 & word >> 2 & kNibbles;
}

// The same for place j at bit 2 j.
inline std::uint32_t escapes_in_order(std::uint32_t word) {
  const std::uint32_t escapes = escapes_in(word);
  return (escapes | escapes >> 14) & 0x5555U;
}

// A bit for each escape of a lane, in their order: that of place j of group k is bit 16 k + 2 j of
// the two words of the lane.
inline std::array<std::uint32_t, 2 * kLanes> escape_masks(const Codes& words) {
  std::array<std::uint32_t, 2 * kLanes> halves;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    halves[2 * lane] = escapes_in_order(words[lane]) | escapes_in_order(words[kLanes + lane]) << 16;
    halves[2 * lane + 1] = escapes_in_order(words[2 * kLanes + lane]) |
                           escapes_in_order(words[3 * kLanes + lane]) << 16;
  }
  return halves;
}

inline std::size_t weight_of(std::size_t lane, int bit) {
  const auto at = static_cast<std::size_t>(bit);
  return 256 * (at / 16) + 8 * lane + at % 16 / 2;
}

// Calls each(weight number, true) for the escapes of a tile, in their order; sometimes
// each(any weight number, false), which must do nothing: most lanes have two escapes or less, and
// a processor that needs not guess how many is faster.
template <class Each>
void for_each_escape(const Codes& words, const Each& each) {
  constexpr std::uint64_t kNoEscape = std::uint64_t{1} << 63;
  const auto masks = escape_masks(words);
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    auto rest = load<std::uint64_t>(masks.data() + 2 * lane);
    for (int i = 0; i < 2; ++i, rest &= rest - 1) {
      each(weight_of(lane, std::countr_zero(rest | kNoEscape)), rest != 0);
    }
    for (; rest != 0; rest &= rest - 1) each(weight_of(lane, std::countr_zero(rest)), true);
  }
}

// As many escapes as a tile can have, and one that is none.
using Escapes = std::array<std::byte, kTileWeights + 1>;

}  // namespace wanoffload::packed
