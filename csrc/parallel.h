// Splits one large piece of host work over threads that live as long as the call. For set-up
// work only: nothing on the steady path starts a thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace wanoffload {

// Calls body(begin, end) for consecutive ranges that cover [0, size), in grains of `grain`.
// body must not throw.
template <class Body>
void parallel_for(std::size_t size, std::size_t grain, unsigned threads, const Body& body) {
  const std::size_t grains = (size + grain - 1) / grain;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < grains; i = next++) {
      body(i * grain, std::min(size, (i + 1) * grain));
    }
  };
  const std::size_t helpers = std::min<std::size_t>(threads, grains);
  std::vector<std::jthread> pool;
  for (std::size_t i = 1; i < helpers; ++i) pool.emplace_back(work);
  work();
}

}  // namespace wanoffload
