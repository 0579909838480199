// A 64-bit fingerprint of a run of bytes, the same on host and device: see kernels/fingerprint.py
// for the formula. Depends on every word and its place; not meant against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wanoffload {

// `bytes` must be a multiple of 4, `data` aligned to 4. Reads with up to `threads` threads.
[[nodiscard]] std::uint64_t fingerprint(const void* data, std::size_t bytes, unsigned threads);

}  // namespace wanoffload
