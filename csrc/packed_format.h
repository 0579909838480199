// The format of a packed image, as docs/packing.md has it: what stands where, and nothing else.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace wanoffload::packed {

static_assert(std::endian::native == std::endian::little, "structs below are read as they stand");

constexpr std::size_t kAlignment = 256;  // of tensors, head and chunks
constexpr std::size_t kSectionAlignment = 16;
constexpr char kMagic[8] = {'W', 'O', 'P', 'A', 'C', 'K', 'E', 'D'};
constexpr std::uint32_t kVersion = 1;

constexpr std::size_t kMostChunks = 65'536;
constexpr std::size_t kMostRuns = 64;                           // of a chunk
constexpr std::size_t kMostChunkBytes = std::size_t{48} << 20;  // an encoder's choice
constexpr std::size_t kMostRunBytes = std::size_t{4} << 20;     // of the plain image
constexpr std::size_t kBlockBytes = 16'384;  // of a run: what one group of threads unpacks

// Weight i of a tile is i = 256 group + 8 lane + place.
constexpr std::size_t kTileWeights = 1024;
constexpr std::size_t kTileBytes = 2 * kTileWeights;
constexpr std::size_t kGroups = 4;
constexpr std::size_t kLanes = 32;
constexpr std::size_t kPlaces = 8;
constexpr std::size_t kSignBytes = 1024;  // of a tile: signs and mantissas
constexpr std::size_t kCodeBytes = 384;
constexpr std::uint32_t kMostBase = 248;
constexpr std::uint32_t kEscape = 7;  // the code of an exponent that stands among the escapes

enum class Codec : std::uint32_t { kPlain = 0, kExponentCodes = 1 };

struct Head {
  char magic[8];
  std::uint32_t version;
  std::uint32_t chunks;
  std::uint64_t plain_bytes;
  std::uint64_t packed_bytes;  // head included
  std::uint64_t fingerprint;   // of the plain image
};
static_assert(sizeof(Head) == 40);

struct ChunkEntry {
  std::uint64_t offset;  // in the packed image
  std::uint32_t bytes;
  std::uint32_t blocks;
};
static_assert(sizeof(ChunkEntry) == 16);

struct ChunkHeader {
  std::uint32_t runs;
  std::uint32_t blocks;
  std::uint32_t bytes;
  std::uint32_t zero;
};
static_assert(sizeof(ChunkHeader) == 16);

struct RunEntry {
  Codec codec;
  std::uint32_t first_block;   // in the chunk
  std::uint64_t plain_offset;  // in the plain image
  std::uint32_t plain_bytes;
  std::uint32_t sections;  // where they begin in the chunk
  std::uint32_t escapes;
  std::uint32_t zero;
  std::uint64_t checksum;  // what the run adds to the fingerprint of the plain image
  std::uint64_t zero_too;
};
static_assert(sizeof(RunEntry) == 48);

constexpr std::size_t align(std::size_t bytes, std::size_t to) {
  return (bytes + to - 1) / to * to;
}

constexpr std::size_t head_bytes(std::size_t chunks) {
  return align(sizeof(Head) + sizeof(ChunkEntry) * chunks, kAlignment);
}
constexpr std::size_t table_bytes(std::size_t runs) {
  return sizeof(ChunkHeader) + sizeof(RunEntry) * runs;
}
constexpr std::uint32_t blocks_of(std::size_t plain_bytes) {
  return static_cast<std::uint32_t>(align(plain_bytes, kBlockBytes) / kBlockBytes);
}

// Where the sections of a run with exponent codes stand, from where the first of them begins.
struct CodedSections {
  std::size_t signs;
  std::size_t codes;
  std::size_t escapes;
  std::size_t bytes;
};
constexpr CodedSections coded_sections(std::size_t tiles, std::size_t escapes) {
  const std::size_t signs = align(4 * (tiles + 1), kSectionAlignment);
  const std::size_t codes = signs + kSignBytes * tiles;
  const std::size_t raw = codes + kCodeBytes * tiles;
  return {signs, codes, raw, raw + align(escapes, kSectionAlignment)};
}

constexpr std::size_t section_bytes(Codec codec, std::size_t plain_bytes, std::size_t escapes) {
  return codec == Codec::kPlain ? align(plain_bytes, kSectionAlignment)
                                : coded_sections(plain_bytes / kTileBytes, escapes).bytes;
}

}  // namespace wanoffload::packed
