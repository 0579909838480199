#include "occupancy.h"

#include <algorithm>

namespace wanoffload {

void Occupancy::add(DeviceAddress address, std::size_t bytes) {
  const DeviceAddress end = address + bytes;
  end_cell_at(address);
  end_cell_at(end);
  auto cell = std::lower_bound(cells_.begin(), cells_.end(), address,
                               [](const Cell& c, DeviceAddress at) { return c.begin < at; });
  for (DeviceAddress at = address; at < end; at = cell->end, ++cell) {
    const DeviceAddress next = cell == cells_.end() ? end : std::min(end, cell->begin);
    if (at < next) cell = cells_.insert(cell, {at, next, kNoSlot});
  }
}

// The cell that goes on behind this address becomes two.
void Occupancy::end_cell_at(DeviceAddress address) {
  const auto cell = std::upper_bound(cells_.begin(), cells_.end(), address,
                                     [](DeviceAddress at, const Cell& c) { return at < c.end; });
  if (cell == cells_.end() || cell->begin >= address) return;
  const Cell before{cell->begin, address, cell->holder};
  cell->begin = address;
  cells_.insert(cell, before);
}

std::span<Occupancy::Cell> Occupancy::cells(DeviceAddress address, std::size_t bytes) {
  const auto from = [](const Cell& c, DeviceAddress at) { return c.begin < at; };
  const auto first = std::lower_bound(cells_.begin(), cells_.end(), address, from);
  const auto last = std::lower_bound(first, cells_.end(), address + bytes, from);
  return {first, last};
}

}  // namespace wanoffload
