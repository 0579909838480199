#include "unpacker.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>

#include "errors.h"
#include "fingerprint.h"
#include "packed_tile.h"
#include "parallel.h"

namespace wanoffload {

using namespace packed;  // NOLINT: the format's words, all over this file

namespace {

void check(bool right, const char* wrong) {
  if (!right) throw TransferError(std::string("a chunk of a packed image is spoilt: ") + wrong);
}

// A run alone; the sums use 64 bits, and none of their parts can be near that.
void check_run(const RunEntry& run, std::size_t table_end, std::size_t chunk_bytes,
               std::size_t plain_bytes) {
  const bool coded = run.codec == Codec::kExponentCodes;
  check(coded || run.codec == Codec::kPlain, "it has a run of a codec that is not known");
  check(run.plain_bytes > 0 && run.plain_bytes <= kMostRunBytes &&
            run.plain_bytes % (coded ? kTileBytes : kAlignment) == 0,
        "it has a run of an impossible size");
  check(run.plain_offset % kAlignment == 0 && run.plain_offset <= plain_bytes &&
            run.plain_bytes <= plain_bytes - run.plain_offset,
        "it has a run outside of the plain image");
  check(run.escapes <= (coded ? run.plain_bytes / 2 : 0),
        "it has a run of more escapes than weights");
  check(run.zero == 0 && run.zero_too == 0, "it has a run of a later version");
  check(run.sections % kSectionAlignment == 0 && run.sections >= table_end &&
            run.sections + section_bytes(run.codec, run.plain_bytes, run.escapes) <= chunk_bytes,
        "it has a run whose sections lie outside of it");
}

}  // namespace

std::vector<RunEntry> read_chunk_table(const std::byte* start, std::size_t start_bytes,
                                       std::size_t chunk_bytes, std::size_t plain_bytes) {
  ChunkHeader header;
  check(start_bytes >= sizeof(header) && start_bytes <= chunk_bytes, "it has no header");
  std::memcpy(&header, start, sizeof(header));
  check(header.runs > 0 && header.runs <= kMostRuns, "its number of runs is not 1 to 64");
  check(header.bytes == chunk_bytes, "its size is not what it should be");
  check(header.zero == 0, "its header is of a later version");
  const std::size_t table_end = table_bytes(header.runs);
  check(table_end <= start_bytes, "its table is cut off");

  std::vector<RunEntry> runs(header.runs);
  std::memcpy(runs.data(), start + sizeof(header), table_end - sizeof(header));
  std::uint32_t blocks = 0;
  std::uint64_t next = runs[0].plain_offset;
  for (const RunEntry& run : runs) {
    check_run(run, table_end, chunk_bytes, plain_bytes);
    check(run.first_block == blocks, "its blocks are miscounted");
    check(run.plain_offset == next, "its runs do not follow each other");
    blocks += blocks_of(run.plain_bytes);
    next += run.plain_bytes;
  }
  check(header.blocks == blocks, "its blocks are miscounted");
  return runs;
}

namespace {

// Base and range of escapes of a tile.
struct TileEntry {
  std::uint32_t base;
  std::uint32_t first;
  std::uint32_t end;
};

// False if its escapes end behind the run's. That they begin before they end shows where they are
// compared with the codes.
bool read_tile_entry(const RunEntry& run, const std::byte* sections, std::size_t tile,
                     TileEntry& entry) {
  std::array<std::uint32_t, 2> words;
  std::memcpy(words.data(), sections + 4 * tile, sizeof(words));
  entry = {words[0] >> 24, words[0] & 0xFFFFFFU, words[1] & 0xFFFFFFU};
  return entry.end <= run.escapes;
}

bool unpack_one(const RunEntry& run, const std::byte* sections, std::size_t tile,
                std::byte* weights) {
  const CodedSections at = coded_sections(run.plain_bytes / kTileBytes, run.escapes);
  TileEntry entry;
  return read_tile_entry(run, sections, tile, entry) &&
         unpack_tile(sections + at.signs + kSignBytes * tile,
                     sections + at.codes + kCodeBytes * tile, entry.base,
                     sections + at.escapes + entry.first, entry.end - entry.first, weights);
}

// The bytes [begin, end) of one tile, not all of them.
bool unpack_part(const RunEntry& run, const std::byte* sections, std::size_t tile,
                 std::size_t begin, std::size_t end, std::byte* destination) {
  std::array<std::byte, kTileBytes> weights;
  if (!unpack_one(run, sections, tile, weights.data())) return false;
  std::memcpy(destination, weights.data() + begin, end - begin);
  return true;
}

}  // namespace

bool unpack_run(const RunEntry& run, const std::byte* sections, std::size_t begin, std::size_t end,
                std::byte* destination) {
  if (run.codec == Codec::kPlain) {
    std::memcpy(destination, sections + begin, end - begin);
    return true;
  }
  bool right = true;
  for (std::size_t at = begin; at < end;) {
    const std::size_t tile = at / kTileBytes;
    const std::size_t start = tile * kTileBytes;
    const std::size_t stop = std::min(end, start + kTileBytes);
    std::byte* const place = destination + (at - begin);
    const bool whole = stop - at == kTileBytes;
    right &= whole ? unpack_one(run, sections, tile, place)
                   : unpack_part(run, sections, tile, at - start, stop - start, place);
    at = stop;
  }
  return right;
}

// A block at a time: it is summed while it is near.
bool unpack_whole_run(const RunEntry& run, const std::byte* sections, std::byte* destination) {
  bool right = true;
  std::uint64_t checksum = 0;
  for (std::size_t at = 0; at < run.plain_bytes; at += kBlockBytes) {
    const std::size_t end = std::min<std::size_t>(at + kBlockBytes, run.plain_bytes);
    right &= unpack_run(run, sections, at, end, destination + at);
    checksum += fingerprint_part(destination + at, run.plain_offset + at, end - at);
  }
  return right && checksum == run.checksum;
}

bool unpack_chunk(const std::byte* chunk, std::size_t chunk_bytes, std::byte* image,
                  std::size_t image_bytes, unsigned threads) {
  std::vector<RunEntry> runs;
  try {
    runs = read_chunk_table(chunk, chunk_bytes, chunk_bytes, image_bytes);
  } catch (const TransferError&) {
    return false;
  }
  std::atomic<bool> right{true};
  parallel_for(runs.size(), 1, thread_count(threads), [&](std::size_t i, std::size_t) {
    const RunEntry& run = runs[i];
    if (!unpack_whole_run(run, chunk + run.sections, image + run.plain_offset)) right = false;
  });
  return right;
}

}  // namespace wanoffload
