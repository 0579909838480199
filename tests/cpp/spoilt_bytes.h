// Packed bytes with changes that a decoder may fall for: absurd counts, places beyond the end,
// tables that are cut off.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "check.h"
#include "packed_format.h"

namespace wanoffload::stress {

using Bytes = std::vector<std::byte>;

struct Range {
  std::size_t begin;
  std::size_t bytes;
};

inline Bytes part(const Bytes& bytes, Range range) {
  const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(range.begin);
  return {begin, begin + static_cast<std::ptrdiff_t>(range.bytes)};
}

inline std::uint32_t odd_number(Random& random, std::uint32_t was) {
  const auto off = random.one_of<std::uint32_t>({1, 2, 4, 16, 256, 2048, 16'384, 1U << 24});
  return random.one_of<std::uint32_t>({0, 1, 64, 65, 255, 256, 0x7FFF'FFFF, 0x8000'0000,
                                       0xFFFF'FFFF, 0xFFFF'FF00, was + off, was - off, was ^ off,
                                       random.between<std::uint32_t>(0, ~0U)});
}

inline void change_word(Random& random, Bytes& bytes, std::size_t at) {
  std::uint32_t word;
  std::memcpy(&word, &bytes[at], sizeof(word));
  word = random.chance(0.5) ? word ^ 1U << random.between(0, 31) : odd_number(random, word);
  std::memcpy(&bytes[at], &word, sizeof(word));
}

// Any word; one of the first `tables` bytes more often than others.
inline void change_any(Random& random, Bytes& bytes, std::size_t tables) {
  const std::size_t most = random.chance(0.5) ? std::min(tables, bytes.size()) : bytes.size();
  change_word(random, bytes, random.between<std::size_t>(0, most / 4 - 1) * 4);
}

// A field of one run, most often the last: what follows it then contradicts it the least.
inline void change_run(Random& random, Bytes& chunk, const std::vector<packed::RunEntry>& runs) {
  const std::size_t run =
      random.chance(0.6) ? runs.size() - 1 : random.between<std::size_t>(0, runs.size() - 1);
  change_word(random, chunk, packed::table_bytes(run) + 4 * random.between<std::size_t>(0, 11));
}

// Where the escapes of some tiles in a row begin.
inline void move_escapes(Random& random, Bytes& chunk, const std::vector<packed::RunEntry>& runs) {
  const packed::RunEntry& run = random.one_of(runs);
  if (run.codec != packed::Codec::kExponentCodes) return;
  const std::size_t tiles = run.plain_bytes / packed::kTileBytes;
  const std::size_t first = random.between<std::size_t>(0, tiles);
  const std::size_t last = random.between<std::size_t>(first, tiles);
  const auto by = random.one_of<std::uint32_t>({1, 16, 1000, 0xFF0000, 0U - 1});
  for (std::size_t tile = first; tile <= last; ++tile) {
    std::uint32_t entry;
    std::memcpy(&entry, &chunk[run.sections + 4 * tile], sizeof(entry));
    entry += by;
    std::memcpy(&chunk[run.sections + 4 * tile], &entry, sizeof(entry));
  }
}

// The start of the bytes, often of a table alone.
inline Bytes cut(Random& random, const Bytes& bytes) {
  const std::size_t most =
      random.chance(0.5) ? std::min<std::size_t>(bytes.size(), 400) : bytes.size();
  return part(bytes, {0, random.between<std::size_t>(0, most)});
}

inline Bytes spoilt_image(Random& random, Bytes bytes) {
  for (int i = random.chance(0.7) ? 1 : random.between(2, 5); i > 0; --i) {
    change_any(random, bytes, random.one_of<std::size_t>({64, 320, 4096}));
  }
  return random.chance(0.1) ? cut(random, bytes) : bytes;
}

inline Bytes spoilt_chunk(Random& random, Bytes chunk, const std::vector<packed::RunEntry>& runs) {
  for (int i = random.chance(0.7) ? 1 : random.between(2, 5); i > 0; --i) {
    switch (random.between(0, 3)) {
      case 0:
        change_any(random, chunk, 64);
        break;
      case 1:
        move_escapes(random, chunk, runs);
        break;
      default:
        change_run(random, chunk, runs);
    }
  }
  return random.chance(0.15) ? cut(random, chunk) : chunk;
}

// A table that was cut off is more often looked at if the header has the new size.
inline void set_size(Bytes& chunk) {
  if (chunk.size() < sizeof(packed::ChunkHeader)) return;
  const auto size = static_cast<std::uint32_t>(chunk.size());
  std::memcpy(&chunk[offsetof(packed::ChunkHeader, bytes)], &size, sizeof(size));
}

}  // namespace wanoffload::stress
