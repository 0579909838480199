// Which slot has which bytes of the device, where slots share memory: the last that was filled
// there. Not synchronised: the prefetcher's lock guards it.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace wanoffload {

inline constexpr int kNoSlot = -1;

class Occupancy {
 public:
  // Cells end wherever a slot begins or ends, so that each is a slot's as a whole.
  struct Cell {
    DeviceAddress begin;
    DeviceAddress end;
    int holder;  // kNoSlot: nobody has written there yet
  };

  // A slot has these bytes, among others. They may be another's too, or a part of them.
  void add(DeviceAddress address, std::size_t bytes);
  // The cells of bytes that were added, in order.
  [[nodiscard]] std::span<Cell> cells(DeviceAddress address, std::size_t bytes);

 private:
  void end_cell_at(DeviceAddress address);

  std::vector<Cell> cells_;  // in order; what no slot has lies between them
};

}  // namespace wanoffload
