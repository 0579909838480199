// Plain images that are hard to pack: weights of every kind, sizes around every edge.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "check.h"
#include "packed_format.h"
#include "packing_plan.h"

namespace wanoffload::stress {

struct PlainImage {
  std::vector<std::byte> bytes;
  std::vector<PackedTensor> tensors;
};

// Gives weights of one kind.
class Weights {
 public:
  explicit Weights(Random& random) : random_(random) {}

  [[nodiscard]] std::uint16_t next() {
    const auto bits = random_.between<std::uint16_t>(0, 0xFFFF);
    ++count_;
    switch (kind_) {
      case 0:  // as trained: exponents get rarer downwards
        return with_exponent(bits, top_ - std::countl_zero(random_.between<std::uint32_t>(1, ~0U)));
      case 1:
        return 0;
      case 2:  // every pattern
        return bits;
      case 3:  // two windows of equally many, far apart
        return with_exponent(bits, (count_ % 2 != 0 ? 3 : 200) + count_ % 7);
      case 4:  // at an end of the exponents
        return with_exponent(bits, (top_ < 128 ? 0 : 247) + count_ % 9);
      case 5:  // no number at all
        return static_cast<std::uint16_t>(0x7F80 | bits);
      default:  // all the same but a few
        return count_ % 700 == 0 ? bits : 0x3C00;
    }
  }

 private:
  static std::uint16_t with_exponent(unsigned bits, int exponent) {
    return static_cast<std::uint16_t>((bits & 0x807FU) | (static_cast<unsigned>(exponent) & 0xFFU)
                                                             << 7);
  }

  Random& random_;
  const int kind_ = random_.chance(0.5) ? 0 : random_.between(1, 6);
  const int top_ = random_.between(40, 254);
  int count_ = 0;
};

inline std::size_t tensor_bytes(Random& random, bool bf16) {
  using packed::kTileBytes;
  const std::size_t tiles = random.between<std::size_t>(0, random.chance(0.1) ? 60 : 12);
  const std::size_t bytes = tiles * kTileBytes + random.one_of<std::size_t>({0, 0, 2, 256, 2046});
  return bf16 || bytes < 2 ? bytes : bytes - random.between<std::size_t>(0, 1);
}

inline void add_tensor(Random& random, PlainImage& image, std::size_t bytes, bool bf16) {
  image.tensors.push_back({image.bytes.size(), bytes, bf16});
  const std::size_t begin = image.bytes.size();
  const std::size_t gap = random.chance(0.1) ? 256 * random.between<std::size_t>(0, 20) : 0;
  image.bytes.resize(begin + packed::align(bytes, packed::kAlignment) + gap);
  Weights weights(random);
  for (std::size_t at = 0; at + 2 <= bytes; at += 2) {
    const std::uint16_t weight = weights.next();
    std::memcpy(&image.bytes[begin + at], &weight, sizeof(weight));
  }
}

// Now and then more tensors than fit a chunk, or one that takes two runs.
inline PlainImage plain_image(Random& random) {
  PlainImage image;
  const bool many = random.chance(0.1);
  const int tensors = many ? random.between(60, 140) : random.between(0, 5);
  for (int i = 0; i < tensors; ++i) {
    const bool bf16 = random.chance(0.8);
    add_tensor(random, image, many ? 2 * random.between(0, 200) : tensor_bytes(random, bf16), bf16);
  }
  if (random.chance(0.02)) {
    add_tensor(random, image, packed::kMostRunBytes + tensor_bytes(random, true), true);
  }
  image.bytes.shrink_to_fit();  // so that a sanitizer sees whoever reads behind them
  return image;
}

}  // namespace wanoffload::stress
