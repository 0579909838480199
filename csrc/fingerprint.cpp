#include "fingerprint.h"

#include <atomic>
#include <cstddef>
#include <cstring>

#include "backend/processor.h"
#include "errors.h"
#include "parallel.h"

namespace wanoffload {
namespace {

constexpr std::uint32_t kPlace = 0x9E3779B1U;

// The word, its place (times kPlace) mixed in, through an integer hash in which each bit reaches
// all others.
std::uint32_t mix(std::uint32_t word, std::uint32_t place) {
  std::uint32_t x = word ^ place;
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  return x ^ (x >> 16);
}

std::uint64_t sum_of_words(const std::byte* start, std::uint32_t first, std::size_t count) {
  std::uint64_t sum = 0;
  std::uint32_t place = first * kPlace;
  for (std::size_t i = 0; i < count; ++i, place += kPlace) {
    std::uint32_t word;
    std::memcpy(&word, start + i * 4, 4);
    sum += mix(word, place);
  }
  return sum;
}

// The same in less than half of the time.
WANOFFLOAD_WIDE std::uint64_t sum_of_words_wide(const std::byte* start, std::uint32_t first,
                                                std::size_t count) {
  return sum_of_words(start, first, count);
}

}  // namespace

std::uint64_t fingerprint(const void* data, std::size_t bytes, unsigned threads) {
  if (bytes % 4 != 0) throw UsageError("fingerprint: the size must be a multiple of 4 bytes");
  const auto* start = static_cast<const std::byte*>(data);
  std::atomic<std::uint64_t> sum{0};
  parallel_for(bytes, std::size_t{4} << 20, threads, [&](std::size_t begin, std::size_t end) {
    sum += fingerprint_part(start + begin, begin, end - begin);
  });
  return sum;
}

std::uint64_t fingerprint_part(const void* data, std::size_t offset, std::size_t bytes) {
  const auto* start = static_cast<const std::byte*>(data);
  const auto first = static_cast<std::uint32_t>(offset / 4);
  return wide_vectors() ? sum_of_words_wide(start, first, bytes / 4)
                        : sum_of_words(start, first, bytes / 4);
}

}  // namespace wanoffload
