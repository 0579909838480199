#include "fingerprint.h"

#include <atomic>

#include "errors.h"
#include "parallel.h"

namespace wanoffload {
namespace {

// The word, its place mixed in, through an integer hash in which each bit reaches all others.
std::uint32_t mix(std::uint32_t word, std::uint32_t place) {
  std::uint32_t x = word ^ (place * 0x9E3779B1U);
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  return x ^ (x >> 16);
}

}  // namespace

std::uint64_t fingerprint(const void* data, std::size_t bytes, unsigned threads) {
  if (bytes % 4 != 0) throw UsageError("fingerprint: the size must be a multiple of 4 bytes");
  const auto* words = static_cast<const std::uint32_t*>(data);
  std::atomic<std::uint64_t> sum{0};
  parallel_for(bytes / 4, std::size_t{1} << 20, threads, [&](std::size_t begin, std::size_t end) {
    std::uint64_t part = 0;
    for (std::size_t i = begin; i < end; ++i) part += mix(words[i], static_cast<std::uint32_t>(i));
    sum += part;
  });
  return sum;
}

}  // namespace wanoffload
