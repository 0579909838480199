// Packed images: every bit comes back, and whatever their bytes are turned into, nothing is read or
// written beyond a buffer (all are exactly as large as they must be), and wrong weights are found.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>

#include "check.h"
#include "errors.h"
#include "packed_image.h"
#include "packed_tile.h"
#include "packer.h"
#include "plain_images.h"
#include "scratch_file.h"
#include "spoilt_bytes.h"
#include "unpacker.h"

namespace wanoffload::stress {
namespace {

constexpr std::byte kPoison{0xA5};

// Bytes that check who reads them.
class ExactImage final : public Image {
 public:
  ExactImage(Bytes content, bool in_memory)
      : Image(content.size()), content_(std::move(content)), in_memory_(in_memory) {}
  [[nodiscard]] const std::byte* locked_data() const override { return nullptr; }
  [[nodiscard]] const std::byte* host_data() const override {
    return in_memory_ ? content_.data() : nullptr;
  }
  void read(std::size_t offset, std::size_t bytes, std::byte* destination) const override {
    check_at_most(offset, content_.size(), "where a read begins");
    check_at_most(bytes, content_.size() - offset, "the bytes of a read");
    std::copy_n(content_.begin() + static_cast<std::ptrdiff_t>(offset), bytes, destination);
  }

 private:
  const Bytes content_;
  const bool in_memory_;
};

Bytes packed_bytes(Random& random, const PlainImage& plain) {
  const Packer packer(plain.bytes.data(), plain.bytes.size(), plain.tensors,
                      random.between(1U, 3U));
  Bytes packed(packer.plan().packed_bytes(), kPoison);
  packer.write(packed.data());
  return packed;
}

ImagePtr stored(Random& random, const Bytes& packed) {
  if (random.chance(0.1)) {
    const auto file = scratch_file(packed, random.chance(0.5), true);
    return std::make_shared<FileImage>(std::vector<FileExtent>{{file, 0, packed.size(), 0}},
                                       packed.size());
  }
  return std::make_shared<ExactImage>(packed, random.chance(0.5));
}

Range range_of(Random& random, std::size_t bytes) {
  const auto begin = random.between<std::size_t>(0, bytes);
  return {begin, random.between<std::size_t>(0, bytes - begin)};
}

Bytes unpacked(Random& random, const PackedImage& image, Range range) {
  Bytes got(range.bytes, kPoison);
  image.unpack(range.begin, range.bytes, got.data(), random.between(0U, 3U));
  return got;
}

void every_chunk_comes_back(Random& random, const PlainImage& plain, const Bytes& packed,
                            const Packing& packing) {
  Bytes got(plain.bytes.size(), kPoison);
  for (const PackedChunk& entry : packing.chunks) {
    const Bytes chunk = part(packed, {entry.offset, entry.bytes});
    check(unpack_chunk(chunk.data(), chunk.size(), got.data(), got.size(), random.between(0U, 3U)),
          "a chunk as it was packed is unpacked");
  }
  check_bytes(got, plain.bytes, "chunks unpacked");
}

// All at once, and each by several threads: the runs' table is read by the first of them.
void any_range_comes_back(Random& random, const PlainImage& plain, const PackedImage& image) {
  std::vector<std::jthread> threads;
  for (int i = random.between(1, 4); i > 0; --i) {
    threads.emplace_back([&image, &plain, seed = random.seed()] {
      Random own(seed);
      for (int ranges = own.between(1, 6); ranges > 0; --ranges) {
        const Range range = range_of(own, plain.bytes.size());
        check_bytes(unpacked(own, image, range), part(plain.bytes, range), "a range unpacked");
      }
    });
  }
}

void every_bit_comes_back(Random& random) {
  const PlainImage plain = plain_image(random);
  const Bytes packed = packed_bytes(random, plain);
  const PackedImage image(stored(random, packed));
  check_equal(image.plain_bytes(), plain.bytes.size(), "plain bytes");
  check_bytes(unpacked(random, image, {0, plain.bytes.size()}), plain.bytes, "all unpacked");
  every_chunk_comes_back(random, plain, packed, *image.packing());
  any_range_comes_back(random, plain, PackedImage(stored(random, packed)));
}

void check_right_or_untouched(const Bytes& got, const Bytes& wanted) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i] == kPoison || (i < wanted.size() && got[i] == wanted[i])) continue;
    fail("wrong bytes, the first at " + std::to_string(i) + ", were said to be right");
  }
}

// Of a plain image: exactly its size, or not.
std::size_t room_for(Random& random, std::size_t bytes) {
  if (random.chance(0.6)) return bytes;
  return random.between<std::size_t>(0, bytes + (random.chance(0.7) ? 65'536 : 0));
}

void a_spoilt_chunk_does_no_harm(Random& random) {
  const PlainImage plain = plain_image(random);
  const Bytes packed = packed_bytes(random, plain);
  const PackedImage image(std::make_shared<ExactImage>(packed, true));
  for (const PackedChunk& entry : image.packing()->chunks) {
    const Bytes whole = part(packed, {entry.offset, entry.bytes});
    const auto runs =
        read_chunk_table(whole.data(), whole.size(), whole.size(), plain.bytes.size());
    for (int i = 0; i < 30; ++i) {
      Bytes chunk = spoilt_chunk(random, whole, runs);
      if (random.chance(0.7)) set_size(chunk);
      Bytes got(room_for(random, plain.bytes.size()), kPoison);
      if (unpack_chunk(chunk.data(), chunk.size(), got.data(), got.size(),
                       random.chance(0.1) ? 2 : 1)) {
        check_right_or_untouched(got, plain.bytes);
      }
    }
  }
}

// What PackedImage says of a spoilt image, if it takes it at all.
void look_at_spoilt_image(Random& random, const Bytes& bytes, const Bytes& wanted) {
  const PackedImage image(stored(random, bytes));
  check_at_most(image.packing()->largest_chunk, bytes.size(), "the largest chunk");
  const std::size_t plain = image.plain_bytes();
  if (plain > wanted.size() * 64 + 65'536) return;  // no memory for it, and its blocks allow it
  if (random.chance(0.5)) {
    (void)unpacked(random, image, range_of(random, plain));
  } else {
    check_bytes(unpacked(random, image, {0, plain}), wanted, "said to be right");
  }
}

void a_spoilt_image_does_no_harm(Random& random) {
  const PlainImage plain = plain_image(random);
  const Bytes packed = packed_bytes(random, plain);
  for (int i = 0; i < 20; ++i) {
    const Bytes bytes = spoilt_image(random, packed);
    try {
      look_at_spoilt_image(random, bytes, plain.bytes);
    } catch (const TransferError&) {
      continue;
    }
  }
}

// Exponents over as many values as `spread`, some elsewhere: many windows hold equally many.
Bytes tile_of_weights(Random& random) {
  const auto lowest = random.between(0U, 255U);
  const auto spread = random.one_of<unsigned>({0, 1, 6, 7, 8, 13, 20, 255});
  const double elsewhere = random.one_of<double>({0, 0, 0.002, 0.1, 0.5});
  const auto other = random.one_of<unsigned>({0, 1, 128, 254, 255});
  Bytes tile(packed::kTileBytes);
  for (std::size_t i = 0; i < tile.size(); i += 2) {
    const unsigned near = std::min(lowest + random.between(0U, spread), 255U);
    const unsigned exponent = random.chance(elsewhere) ? other : near;
    const auto weight =
        static_cast<std::uint16_t>((random.between(0U, 0xFFFFU) & 0x807FU) | exponent << 7);
    std::memcpy(&tile[i], &weight, sizeof(weight));
  }
  return tile;
}

// The formula as docs/packing.md has it.
TileBase plainly_the_best_base(const Bytes& tile) {
  std::array<std::uint32_t, 256> counts{};
  for (std::size_t i = 0; i < tile.size(); i += 2) {
    std::uint16_t weight;
    std::memcpy(&weight, &tile[i], sizeof(weight));
    ++counts[weight >> 7 & 0xFF];
  }
  TileBase best{0, packed::kTileWeights + 1};
  for (std::uint32_t base = 0; base <= packed::kMostBase; ++base) {
    std::uint32_t escapes = packed::kTileWeights;
    for (std::uint32_t e = base; e < base + 7; ++e) escapes -= counts[e];
    if (escapes < best.escapes) best = {base, escapes};
  }
  return best;
}

void a_tile_has_the_best_base(Random& random) {
  const Bytes tile = tile_of_weights(random);
  const TileBase found = best_base(tile.data());
  const TileBase wanted = plainly_the_best_base(tile);
  check_equal(found.base, wanted.base, "the base of a tile");
  check_equal(found.escapes, wanted.escapes, "the escapes of a tile");
}

}  // namespace
}  // namespace wanoffload::stress

int main(int argc, char** argv) {
  using namespace wanoffload::stress;
  for (Run run(argc, argv); run.next();) {
    for (int i = 0; i < 20; ++i) a_tile_has_the_best_base(run.random());
    every_bit_comes_back(run.random());
    a_spoilt_chunk_does_no_harm(run.random());
    a_spoilt_image_does_no_harm(run.random());
  }
}
