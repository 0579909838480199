#include <algorithm>
#include <optional>

#include "backend/processor.h"
#include "packed_tile.h"
#include "tile_codes.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

constexpr std::size_t kExponents = 256;
constexpr std::size_t kWindow = 7;  // exponents with a code of their own

using Counts = std::array<std::uint16_t, kExponents>;

// A count of its own for each of eight weights in a row, because one that was just written is slow
// to be read again; 128 is the most that one can come to.
Counts exponent_counts(const std::byte* weights) {
  std::array<std::array<std::uint8_t, kExponents>, 8> parts{};
  for (std::size_t i = 0; i < kTileWeights; i += 8) {
    const auto low = load<std::uint64_t>(weights + 2 * i);
    const auto high = load<std::uint64_t>(weights + 2 * i + 8);
    for (std::size_t p = 0; p < 4; ++p) {
      ++parts[p][low >> (16 * p + 7) & 0xFF];
      ++parts[4 + p][high >> (16 * p + 7) & 0xFF];
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

// For any weights.
TileBase base_by_histogram(const std::byte* weights) {
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

std::uint8_t highest_of(const Bytes& exponents) {
  std::uint8_t highest = 0;
  for (const std::uint8_t each : exponents) highest = std::max(highest, each);
  return highest;
}

unsigned count_of(std::uint8_t exponent, const Bytes& exponents) {
  std::array<std::uint8_t, 32> parts{};  // 32 is the most that one can come to
  for (std::size_t i = 0; i < kTileWeights; i += parts.size()) {
    for (std::size_t p = 0; p < parts.size(); ++p) {
      parts[p] = static_cast<std::uint8_t>(parts[p] + (exponents[i + p] == exponent));
    }
  }
  unsigned sum = 0;
  for (const std::uint8_t part : parts) sum += part;
  return sum;
}

// Moves down over the exponents, and knows how many weights are in base..base+6 and how many below.
class Window {
 public:
  // `base`: the tile's highest exponent.
  Window(const Bytes& exponents, std::uint8_t base) : exponents_(exponents), base_(base) {
    enter();
  }

  [[nodiscard]] std::uint32_t base() const { return base_; }
  [[nodiscard]] unsigned inside() const { return inside_; }
  // No window further down holds more.
  [[nodiscard]] unsigned most_further_down() const { return inside_ - counts_[highest()] + below_; }

  void move_down() {
    inside_ -= counts_[highest()];
    --base_;
    enter();
  }

 private:
  [[nodiscard]] std::size_t highest() const { return (base_ + kWindow - 1) % kWindow; }
  void enter() {
    const unsigned count = count_of(base_, exponents_);
    counts_[base_ % kWindow] = count;
    inside_ += count;
    below_ -= count;
  }

  const Bytes& exponents_;
  std::uint8_t base_;
  std::array<unsigned, kWindow> counts_{};  // of exponent e at e % 7
  unsigned inside_ = 0;
  unsigned below_ = kTileWeights;
};

// Weights as they are trained have nearly all exponents close below the highest one. So few windows
// are looked at, about ten, until no lower one can hold as many weights as the best so far.
std::optional<TileBase> base_near_the_top(const Bytes& exponents) {
  constexpr int kMostWindows = 16;
  Window window(exponents, highest_of(exponents));
  TileBase best{0, kTileWeights};
  for (int i = 0; i < kMostWindows; ++i, window.move_down()) {
    const auto outside = static_cast<std::uint32_t>(kTileWeights) - window.inside();
    if (outside <= best.escapes && window.base() <= kMostBase) best = {window.base(), outside};
    if (window.base() == 0 || window.most_further_down() < kTileWeights - best.escapes) return best;
  }
  return std::nullopt;
}

TileBase base_of(const std::byte* weights) {
  const auto base = base_near_the_top(exponents_of(weights));
  return base ? *base : base_by_histogram(weights);
}

WANOFFLOAD_WIDE TileBase base_of_wide(const std::byte* weights) { return base_of(weights); }

}  // namespace

TileBase best_base(const std::byte* weights) {
  return wide_vectors() ? base_of_wide(weights) : base_of(weights);
}

}  // namespace wanoffload
