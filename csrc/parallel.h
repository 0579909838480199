// Splits one large piece of host work over threads that live as long as the call. For set-up
// work only: nothing on the steady path starts a thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
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

// Calls body(0), body(1), ..., body(count - 1), and throws the first error; what is left is then
// not begun.
template <class Body>
void parallel_each(std::size_t count, unsigned threads, const Body& body) {
  std::mutex mutex;
  std::exception_ptr error;
  parallel_for(count, 1, threads, [&](std::size_t i, std::size_t) {
    {
      const std::lock_guard lock(mutex);
      if (error) return;
    }
    try {
      body(i);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// How many threads to use where so many were asked for; 0: as many as there are cores, 16 at most.
inline unsigned thread_count(unsigned asked) {
  return asked != 0 ? asked : std::clamp(std::thread::hardware_concurrency(), 1U, 16U);
}

}  // namespace wanoffload
