// What the processor can do beyond what every one of its kind can, and what it can be told.
#pragma once

#include <cstddef>

namespace wanoffload {

// WANOFFLOAD_WIDE: a function compiled for vectors of 32 bytes, with all that it calls; only to be
// called where wide_vectors() says that there are any.
#if defined(__x86_64__) && defined(__GNUC__)
#define WANOFFLOAD_WIDE __attribute__((target("avx2"), flatten))
inline bool wide_vectors() {
  static const bool found = __builtin_cpu_supports("avx2") != 0;
  return found;
}
#else
#define WANOFFLOAD_WIDE
constexpr bool wide_vectors() { return false; }
#endif

// Bytes that will be read soon: into the cache, while something else is computed.
inline void prefetch(const std::byte* bytes, std::size_t count) {
  constexpr std::size_t kCacheLine = 64;
#if defined(__GNUC__)
  for (std::size_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(bytes + i);
#endif
}

}  // namespace wanoffload
