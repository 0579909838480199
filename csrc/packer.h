// Packs a plain image on the CPU, in two steps: looking at every weight tells how large the packed
// image will be, then it is written into memory of that size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packing_plan.h"

namespace wanoffload {

class Packer {
 public:
  // Looks at the image, with this many threads (0: as many as there are cores, 16 at most). The
  // image must stay as it is until write() has returned. Throws what check_tensors throws.
  Packer(const std::byte* image, std::size_t plain_bytes, const std::vector<PackedTensor>& tensors,
         unsigned threads = 0);

  [[nodiscard]] const PackingPlan& plan() const { return plan_; }
  // Writes every byte of the packed image, plan().packed_bytes(). Throws UsageError if it sees that
  // the plain image has changed.
  void write(std::byte* packed) const;

 private:
  struct Tiles {  // of all bf16 tensors, in order
    std::vector<std::uint8_t> bases;
    std::vector<std::uint32_t> escapes;
  };
  static Tiles look(const std::byte* image, std::size_t plain_bytes,
                    const std::vector<PackedTensor>& tensors, unsigned threads);
  std::uint64_t write_run(const PlannedRun& run, std::byte* sections) const;
  std::uint64_t write_coded(const PlannedRun& run, std::byte* sections) const;

  const std::byte* const image_;
  const unsigned threads_;
  const Tiles tiles_;
  const PackingPlan plan_;
};

}  // namespace wanoffload
