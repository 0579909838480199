// A 64-bit fingerprint of a run of bytes, the same on host and device: see kernels/fingerprint.py
// for the formula. Depends on every word and its place; not meant against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wanoffload {

// `bytes` must be a multiple of 4, `data` aligned to 4. Reads with up to `threads` threads.
[[nodiscard]] std::uint64_t fingerprint(const void* data, std::size_t bytes, unsigned threads);

// What a part of the run, which begins `offset` bytes (a multiple of 4) into it, adds to the
// whole's fingerprint: parts that cover the run sum up to it, modulo 2^64. `data` need not be
// aligned.
[[nodiscard]] std::uint64_t fingerprint_part(const void* data, std::size_t offset,
                                             std::size_t bytes);

}  // namespace wanoffload
