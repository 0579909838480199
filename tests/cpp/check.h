// What the stress tests share: checks that say where and with which values, a seeded run of
// limited length that notices a hang, and bytes that tell whose they are.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <random>
#include <source_location>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

// A sanitizer's, if one is there: called before it ends the process.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));
// The first race ends a run, so that its case is the one that is named.
extern "C" __attribute__((used, visibility("default"))) inline const char*
__tsan_default_options() {
  return "halt_on_error=1";
}

namespace wanoffload::stress {

using Where = std::source_location;

// The seed of the case that is running; a failure names it.
inline std::atomic<std::uint64_t> case_seed{0};

inline void name_case() {
  std::fprintf(stderr, "this was the case of seed %llu\n",
               static_cast<unsigned long long>(case_seed.load()));
  std::fflush(stderr);
}

// Ends the process at once: other threads may be anywhere.
[[noreturn]] inline void fail(const std::string& text, Where where = Where::current()) {
  std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()),
               text.c_str());
  name_case();
  std::_Exit(1);
}

// For exceptions that nobody expects, on whatever thread.
[[noreturn]] inline void fail_on_terminate() {
  try {
    std::rethrow_exception(std::current_exception());
  } catch (const std::exception& error) {
    fail(std::string("an exception that nobody expects: ") + error.what());
  }
}

inline void check(bool ok, const std::string& what, Where where = Where::current()) {
  if (!ok) fail("not so: " + what, where);
}

template <class Got, class Wanted>
void check_equal(const Got& got, const Wanted& wanted, const std::string& what,
                 Where where = Where::current()) {
  if (got == wanted) return;
  std::ostringstream text;
  text << what << ": " << got << " instead of " << wanted;
  fail(text.str(), where);
}

template <class Got, class Bound>
void check_at_most(const Got& got, const Bound& bound, const std::string& what,
                   Where where = Where::current()) {
  if (got <= bound) return;
  std::ostringstream text;
  text << what << ": " << got << ", more than " << bound;
  fail(text.str(), where);
}

// The call must throw exactly this type; returns its text.
template <class Wanted, class Call>
std::string check_throws(const Call& call, const std::string& what,
                         Where where = Where::current()) {
  try {
    call();
  } catch (const Wanted& error) {
    return error.what();
  } catch (const std::exception& error) {
    fail(what + ": threw another type: " + error.what(), where);
  }
  fail(what + ": threw nothing", where);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  [[nodiscard]] std::uint64_t seed() { return engine_(); }
  // Both ends are included.
  template <class Number>
  [[nodiscard]] Number between(Number low, Number high) {
    return std::uniform_int_distribution<Number>(low, high)(engine_);
  }
  [[nodiscard]] bool chance(double share) { return std::bernoulli_distribution(share)(engine_); }
  template <class Item>
  [[nodiscard]] Item one_of(const std::vector<Item>& items) {
    return items[between<std::size_t>(0, items.size() - 1)];
  }
  template <class Item>
  void shuffle(std::vector<Item>& items) {
    std::shuffle(items.begin(), items.end(), engine_);
  }
  void pause(int most_us) {
    std::this_thread::sleep_for(std::chrono::microseconds(between(0, most_us)));
  }

 private:
  std::mt19937_64 engine_;
};

// Bytes that only this key has.
inline std::vector<std::byte> pattern(std::uint64_t key, std::size_t bytes) {
  std::mt19937_64 random(key);
  std::vector<std::byte> result(bytes);
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < bytes; ++i) {
    if (i % 8 == 0) word = random();
    result[i] = static_cast<std::byte>(word >> (i % 8 * 8));
  }
  return result;
}

// Says how many bytes differ, and the first.
inline void check_bytes(const std::vector<std::byte>& got, const std::vector<std::byte>& wanted,
                        const std::string& what, Where where = Where::current()) {
  check_equal(got.size(), wanted.size(), what + ", bytes", where);
  if (got == wanted) return;
  std::size_t wrong = 0;
  std::size_t first = got.size();
  for (std::size_t i = got.size(); i-- > 0;) {
    if (got[i] == wanted[i]) continue;
    ++wrong;
    first = i;
  }
  std::ostringstream text;
  text << what << ": " << wrong << " of " << got.size() << " bytes differ, the first at " << first
       << ": " << std::to_integer<int>(got[first]) << " instead of "
       << std::to_integer<int>(wanted[first]);
  fail(text.str(), where);
}

// Cases until the time is over, at least one. Case n has the seed `seed + n`, so that a failing
// case can be run first. argv[1]: the seed (else from the machine), argv[2]: seconds.
class Run {
 public:
  Run(int argc, char** argv)
      : seed_(argc > 1 ? std::stoull(argv[1]) : std::random_device{}()),
        end_(Clock::now() +
             std::chrono::duration_cast<Clock::duration>(
                 std::chrono::duration<double>(argc > 2 ? std::stod(argv[2]) : kSeconds))) {
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed_));
    std::fflush(stdout);
    std::set_terminate(fail_on_terminate);
    if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(name_case);
  }
  ~Run() { std::printf("%llu cases\n", static_cast<unsigned long long>(cases_.load())); }

  // Moves on to the next case; false when the time is over.
  [[nodiscard]] bool next() {
    if (cases_ > 0 && Clock::now() > end_) return false;
    case_seed = seed_ + cases_;
    random_ = Random(case_seed);
    ++cases_;
    return true;
  }
  [[nodiscard]] Random& random() { return random_; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr double kSeconds = 10;
  static constexpr auto kHang = std::chrono::seconds(90);  // far more than any case takes

  void watch(const std::stop_token& stop) {
    std::mutex mutex;
    std::condition_variable_any changed;
    std::unique_lock lock(mutex);
    std::uint64_t seen = cases_;
    while (!stop.stop_requested()) {
      changed.wait_for(lock, stop, kHang, [] { return false; });
      if (!stop.stop_requested() && seen == cases_) fail("the case hangs");
      seen = cases_;
    }
  }

  const std::uint64_t seed_;
  const Clock::time_point end_;
  std::atomic<std::uint64_t> cases_{0};
  Random random_{0};
  std::jthread watch_{[this](const std::stop_token& stop) { watch(stop); }};  // last: uses the rest
};

}  // namespace wanoffload::stress
