#include <array>
#include <cstring>

#include "packed_tile.h"
#include "tile_codes.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

Codes load_codes(const std::byte* codes) {
  CodeWords packed;
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
  Fours fields;
  for (std::size_t i = 0; i < kWords; ++i) {
    const std::uint64_t word = words[i];
    fields[2 * i] = (word & 0x00070007U) | (word >> 4 & 0x00070007U) << 32;
    fields[2 * i + 1] = (word >> 8 & 0x00070007U) | (word >> 12 & 0x00070007U) << 32;
  }
  SignBytes bytes;
  std::memcpy(bytes.data(), signs, sizeof(bytes));
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const std::uint64_t sign =
        (bytes[i] & 0x00FF00FFU) | static_cast<std::uint64_t>(bytes[i] >> 8 & 0x00FF00FFU) << 32;
    fields[i] = (fields[i] << 7) + in_each_field(base << 7);
    fields[i] = (fields[i] & in_each_field(0x7F80)) | (sign & in_each_field(0x80)) << 8 |
                (sign & in_each_field(0x7F));
  }
  return std::bit_cast<Weights>(fields);
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
