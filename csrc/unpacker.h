// Unpacks on the CPU. Nothing here trusts the bytes it reads: whatever they are, nothing is read
// beyond the chunk or written beyond the plain image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed_format.h"

namespace wanoffload {

// The table of a chunk of `chunk_bytes`, of which `start` holds the first `start_bytes`. Each run
// that comes back has its sections within the chunk and lies within a plain image of `plain_bytes`;
// each begins where the one before it ends. Throws TransferError, which says what is wrong.
[[nodiscard]] std::vector<packed::RunEntry> read_chunk_table(const std::byte* start,
                                                             std::size_t start_bytes,
                                                             std::size_t chunk_bytes,
                                                             std::size_t plain_bytes);

// Unpacks the bytes [begin, end) of what a run covers. `run`: of read_chunk_table; `sections`: all
// of the run's. Returns false if they contradict themselves; what could not be unpacked is left.
[[nodiscard]] bool unpack_run(const packed::RunEntry& run, const std::byte* sections,
                              std::size_t begin, std::size_t end, std::byte* destination);

// Unpacks all that a run covers, and compares its checksum. Returns false if the run is spoilt.
[[nodiscard]] bool unpack_whole_run(const packed::RunEntry& run, const std::byte* sections,
                                    std::byte* destination);

// Unpacks a chunk into a plain image and compares the checksums of its runs. Never reads beyond the
// chunk or writes beyond the image, whatever the bytes are. Returns false if it found the chunk to
// be spoilt; what could not be unpacked is left. `threads`: 0: as many as there are cores.
[[nodiscard]] bool unpack_chunk(const std::byte* chunk, std::size_t chunk_bytes, std::byte* image,
                                std::size_t image_bytes, unsigned threads = 1);

}  // namespace wanoffload
