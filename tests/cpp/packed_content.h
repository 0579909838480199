// Packed images of random tensors, small ones and many, so that there are several chunks.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "check.h"
#include "packer.h"

namespace wanoffload::stress {

struct PackedContent {
  std::vector<std::byte> plain;
  std::vector<std::byte> packed;
  std::vector<PackedTensor> tensors;
};

inline void pack(PackedContent& content) {
  const Packer packer(content.plain.data(), content.plain.size(), content.tensors, 1);
  content.packed.resize(packer.plan().packed_bytes());
  packer.write(content.packed.data());
}

// Weights whose exponents are alike, with a stray one now and then.
inline void make_weights(Random& random, std::byte* bytes, std::size_t count) {
  const auto base = random.between(0U, 250U);
  const double strays = random.one_of<double>({0, 0.02, 0.2});
  for (std::size_t i = 0; i + 1 < count; i += 2) {
    const unsigned exponent =
        random.chance(strays) ? random.between(0U, 255U) : base + random.between(0U, 5U);
    const unsigned others = random.between(0U, 255U);  // sign and mantissa
    const unsigned bits = (others & 0x80U) << 8 | exponent << 7 | (others & 0x7FU);
    bytes[i] = static_cast<std::byte>(bits);
    bytes[i + 1] = static_cast<std::byte>(bits >> 8);
  }
}

// A plain image of so many bytes, rounded down to a multiple of 256, and the same packed.
inline PackedContent packed_content(Random& random, std::size_t most_bytes) {
  PackedContent content;
  content.plain = pattern(random.seed(), most_bytes / 256 * 256);
  const std::size_t largest = random.one_of<std::size_t>({256, 4096, 40'000});
  for (std::size_t at = 0; at < content.plain.size();) {
    const std::size_t room = content.plain.size() - at;
    const std::size_t bytes = std::min(room, random.between<std::size_t>(1, largest));
    const bool bf16 = bytes % 2 == 0 && random.chance(0.8);
    if (bf16) make_weights(random, content.plain.data() + at, bytes);
    content.tensors.push_back({at, bytes, bf16});
    at += (bytes + 255) / 256 * 256;
  }
  pack(content);
  return content;
}

// The same but for the signs of weights, and other tensors' bits in their places. The packed bytes
// lie as before.
inline PackedContent with_other_signs(std::vector<std::byte> plain,
                                      const std::vector<PackedTensor>& tensors, Random& random) {
  PackedContent content{std::move(plain), {}, tensors};
  for (const PackedTensor& tensor : tensors) {
    if (random.chance(0.1)) continue;
    for (std::size_t i = 1; i < tensor.bytes; i += 2) {
      content.plain[tensor.offset + i] ^= std::byte{0x80};
    }
  }
  pack(content);
  return content;
}

}  // namespace wanoffload::stress
