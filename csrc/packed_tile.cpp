#include "packed_tile.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "packed_format.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

// Loops here run over whole arrays and do one thing each: so the compiler makes vectors of them.
// Four weights, or what became of them, stand in the four 16-bit fields of one 64-bit word.
namespace {

constexpr std::size_t kExponents = 256;
constexpr std::size_t kWindow = 7;                 // exponents with a code of their own
constexpr std::size_t kHalves = kTileWeights / 4;  // words of four weights: two for each lane
constexpr std::size_t kWords = kGroups * kLanes;
constexpr std::uint32_t kNibbles = 0x11111111U;

using Counts = std::array<std::uint16_t, kExponents>;
using Weights = std::array<std::uint16_t, kTileWeights>;
using Codes = std::array<std::uint32_t, kWords>;  // G(k) of lane l at 32 k + l

constexpr std::uint64_t in_each_field(std::uint64_t value) { return value * 0x0001000100010001U; }

Weights load(const std::byte* weights) {
  Weights loaded;
  std::memcpy(loaded.data(), weights, sizeof(loaded));
  return loaded;
}

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
  const auto* const best = std::find(inside.begin(), inside.end(), most);
  return {static_cast<std::uint32_t>(best - inside.begin()),
          static_cast<std::uint32_t>(kTileWeights - static_cast<std::size_t>(most))};
}

namespace {

void pack_signs(const Weights& weights, std::byte* signs) {
  std::array<std::uint64_t, kHalves> fours;
  std::array<std::uint32_t, kHalves> bytes;
  std::memcpy(fours.data(), weights.data(), sizeof(fours));
  for (std::size_t i = 0; i < kHalves; ++i) {
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
  Codes words;
  for (std::size_t i = 0; i < kWords; ++i) {
    std::array<std::uint64_t, 2> fours;
    std::memcpy(fours.data(), &fields[8 * i], sizeof(fours));
    words[i] = static_cast<std::uint32_t>(fours[0] | fours[0] >> 28) |
               static_cast<std::uint32_t>(fours[1] | fours[1] >> 28) << 8;
  }
  return words;
}

void pack_codes(const Codes& words, std::byte* codes) {
  std::array<std::uint32_t, 3 * kLanes> packed;
  for (std::size_t p = 0; p < 3; ++p) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      packed[kLanes * p + lane] =
          words[kLanes * p + lane] | ((words[kLanes * 3 + lane] >> p) & kNibbles) << 3;
    }
  }
  std::memcpy(codes, packed.data(), sizeof(packed));
}

// A bit for each code that is 7, where its three bits begin.
std::uint32_t escapes_in(std::uint32_t word) { return word & word >> 1 & word >> 2 & kNibbles; }

// The same for place j at bit 2 j.
std::uint32_t escapes_in_order(std::uint32_t word) {
  const std::uint32_t escapes = escapes_in(word);
  return (escapes | escapes >> 14) & 0x5555U;
}

// A bit for each escape of a lane, in their order: that of place j of group k is bit 16 k + 2 j.
std::array<std::uint64_t, kLanes> escape_masks(const Codes& words) {
  std::array<std::uint32_t, 2 * kLanes> halves;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    halves[2 * lane] = escapes_in_order(words[lane]) | escapes_in_order(words[kLanes + lane]) << 16;
    halves[2 * lane + 1] = escapes_in_order(words[2 * kLanes + lane]) |
                           escapes_in_order(words[3 * kLanes + lane]) << 16;
  }
  return std::bit_cast<std::array<std::uint64_t, kLanes>>(halves);
}

std::size_t weight_of(std::size_t lane, int bit) {
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
    std::uint64_t rest = masks[lane];
    for (int i = 0; i < 2; ++i, rest &= rest - 1) {
      each(weight_of(lane, std::countr_zero(rest | kNoEscape)), rest != 0);
    }
    for (; rest != 0; rest &= rest - 1) each(weight_of(lane, std::countr_zero(rest)), true);
  }
}

// As many escapes as a tile can have, and one that is none.
using Escapes = std::array<std::byte, kTileWeights + 1>;

}  // namespace

void pack_tile(const std::byte* weights, std::uint32_t base, std::byte* signs, std::byte* codes,
               std::byte* escapes) {
  const Weights loaded = load(weights);
  pack_signs(loaded, signs);
  const Codes words = code_words(loaded, base);
  pack_codes(words, codes);
  Escapes found;
  std::size_t count = 0;
  for_each_escape(words, [&](std::size_t i, bool there) {
    found[count] = static_cast<std::byte>(exponent_of(loaded[i]));
    count += there;
  });
  std::memcpy(escapes, found.data(), count);
}

namespace {

Codes load_codes(const std::byte* codes) {
  std::array<std::uint32_t, 3 * kLanes> packed;
  std::memcpy(packed.data(), codes, sizeof(packed));
  Codes words;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    std::uint32_t last = 0;
    for (std::size_t p = 0; p < 3; ++p) {
      const std::uint32_t word = packed[kLanes * p + lane];
      words[kLanes * p + lane] = word & 7 * kNibbles;
      last |= (word >> 3 & kNibbles) << p;
    }
    words[kLanes * 3 + lane] = last;
  }
  return words;
}

std::size_t count_escapes(const Codes& words) {
  std::size_t count = 0;
  for (const std::uint32_t word : words) count += escapes_in(word) * kNibbles >> 28;
  return count;
}

// Weights as if there were no escapes.
Weights unpack_weights(const Codes& words, const std::byte* signs, std::uint32_t base) {
  std::array<std::uint64_t, kHalves> fields;
  for (std::size_t i = 0; i < kWords; ++i) {
    const std::uint64_t word = words[i];
    fields[2 * i] = (word & 0x00070007U) | (word >> 4 & 0x00070007U) << 32;
    fields[2 * i + 1] = (word >> 8 & 0x00070007U) | (word >> 12 & 0x00070007U) << 32;
  }
  std::array<std::uint32_t, kHalves> bytes;
  std::memcpy(bytes.data(), signs, sizeof(bytes));
  for (std::size_t i = 0; i < kHalves; ++i) {
    const std::uint64_t sign =
        (bytes[i] & 0x00FF00FFU) | static_cast<std::uint64_t>(bytes[i] >> 8 & 0x00FF00FFU) << 32;
    fields[i] = (fields[i] << 7) + in_each_field(base << 7);
    fields[i] = (fields[i] & in_each_field(0x7F80)) | (sign & in_each_field(0x80)) << 8 |
                (sign & in_each_field(0x7F));
  }
  Weights weights;
  std::memcpy(weights.data(), fields.data(), sizeof(weights));
  return weights;
}

}  // namespace

bool unpack_tile(const std::byte* signs, const std::byte* codes, std::uint32_t base,
                 const std::byte* escapes, std::size_t escape_count, std::byte* weights) {
  const Codes words = load_codes(codes);
  if (count_escapes(words) != escape_count) return false;
  Weights unpacked = unpack_weights(words, signs, base);
  Escapes raw{};
  std::memcpy(raw.data(), escapes, escape_count);
  std::size_t count = 0;
  for_each_escape(words, [&](std::size_t i, bool there) {
    const auto exponent = std::to_integer<std::uint16_t>(raw[count]);
    const auto weight = static_cast<std::uint16_t>((unpacked[i] & 0x807F) | exponent << 7);
    unpacked[i] = there ? weight : unpacked[i];
    count += there;
  });
  std::memcpy(weights, unpacked.data(), sizeof(unpacked));
  return true;
}

}  // namespace wanoffload
