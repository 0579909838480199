// Random models through random slots, on streams that are threads: every kernel sees the bytes of
// its unit as they were when the kernel was issued, and the engine fetches no more than it must.
// Then perhaps another prefetcher over the same memory, which takes over what stays there.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "errors.h"
#include "world.h"

namespace wanoffload::stress {
namespace {

// Calls what any thread may call at any time.
class Onlooker {
 public:
  explicit Onlooker(Prefetcher& prefetcher)
      : thread_([&prefetcher](const std::stop_token& stop) {
          while (!stop.stop_requested()) {
            const auto stats = prefetcher.stats();
            check_at_most(stats.cold, stats.fetches, "cold fetches");
            (void)prefetcher.recent_events();
            (void)prefetcher.order();
            (void)prefetcher.ring_bytes();
            check_at_most(prefetcher.slot_count(), 5, "slots");
            check_at_most(prefetcher.unit_count(), 41, "units");
            std::this_thread::sleep_for(std::chrono::microseconds(200));
          }
        }) {}

 private:
  std::jthread thread_;
};

// Forwards of one world, from the plain to the broken.
class Forwards {
 public:
  Forwards(Random& random, World& world) : random_(random), world_(world) {
    order_.resize(static_cast<std::size_t>(world.shape().units));
    std::iota(order_.begin(), order_.end(), 0);
  }

  // Every unit once, in order, one at a time.
  void plain(StreamHandle stream) {
    for (const int unit : order_) {
      check(acquire(unit, stream), "a unit is acquired while none is held");
      release_one();
    }
  }

  // Some units skipped, some out of order, several held at once, perhaps an early end.
  void random(StreamHandle stream, StreamHandle other) {
    auto units = order_;
    if (random_.chance(0.1)) random_.shuffle(units);
    const double skip = random_.one_of<double>({0, 0, 0.1, 0.6});
    const double end = random_.one_of<double>({0, 0, 0.05, 0.3});
    const int most_held = random_.between(1, std::max(1, world_.shape().slots));
    const std::size_t most_at_home = random_.between<std::size_t>(0, 4);
    moved_ = false;
    for (const int unit : units) {
      if (random_.chance(end)) break;
      if (random_.chance(skip)) continue;
      if (!acquire(unit, stream)) {
        if (random_.chance(0.5)) release_one();
        continue;
      }
      if (random_.chance(0.1)) acquire(unit, other);  // a second user, perhaps on another stream
      if (random_.chance(0.1)) use_elsewhere(other);
      if (random_.chance(0.05)) expect_refusals(stream);
      while (slots_held() >= most_held ||
             held_.size() > static_cast<std::size_t>(most_held) + most_at_home)
        release_one();
    }
    if (random_.chance(0.3)) {
      if (!held_.empty() && random_.chance(0.5)) use_elsewhere(other);
      const StreamHandle last = random_.chance(0.5) ? stream : other;
      // The engine knows where a unit was acquired, and hears now where it was used last.
      if (moved_ && last == stream) world_.join(other, stream);
      abandon(last);
    } else {
      while (!held_.empty()) release_one();
    }
  }

  // What happens between forwards. The kernels of the last one may still be running.
  void between(StreamHandle stream) {
    if (random_.chance(0.3)) reorder();
    if (random_.chance(0.3)) world_.prefetcher().prefetch();
    const double share = random_.one_of<double>({0, 0.1, 0.5});
    for (const int unit : order_) {
      if (!random_.chance(share)) continue;
      world_.change(unit, random_)();
    }
    if (random_.chance(0.3)) world_.prefetcher().prefetch();
    if (random_.chance(0.3)) world_.check_bytes_read();
    if (random_.chance(0.2)) world_.prefetcher().abandon(stream);  // nothing is acquired
  }

  // Acquires a few and keeps them.
  void keep_some(StreamHandle stream) {
    for (int i = random_.between(0, std::max(1, world_.shape().slots)); i > 0; --i) {
      const int unit = random_.one_of(order_);
      if (!world_.lives_at_home(unit) && slots_held() == world_.shape().slots) return;
      acquire(unit, stream);
    }
  }

  [[nodiscard]] std::uint64_t acquires() const { return acquires_; }

 private:
  struct Held {
    int unit;
    StreamHandle stream;
    Acquired acquired;
  };

  // False if another one's use of a part of its memory keeps it out, which changes nothing.
  bool acquire(int unit, StreamHandle stream) {
    if (has_held_rival(unit)) {
      expect_refusal(unit, stream);
      return false;
    }
    const Acquired acquired = world_.prefetcher().acquire(unit, stream);
    ++acquires_;
    for (const Held& held : held_) {
      if (held.unit != unit) check(held.acquired.slot != acquired.slot, "two units, two slots");
    }
    world_.read(unit, acquired, stream);
    if (random_.chance(0.1)) world_.read(unit, acquired, stream);
    held_.push_back({unit, stream, acquired});
    return true;
  }

  void expect_refusal(int unit, StreamHandle stream) {
    Prefetcher& prefetcher = world_.prefetcher();
    const std::uint64_t fetches = prefetcher.stats().fetches;
    const std::string text = check_throws<UsageError>(
        [&] { (void)prefetcher.acquire(unit, stream); }, "acquire what has no room");
    const std::string begin = "unit " + std::to_string(unit) + " was acquired while unit ";
    check(text.starts_with(begin), "the error names the unit: " + text);
    const int rival = std::stoi(text.substr(begin.size()));
    check(is_held(rival), "the error names one in use: " + text);
    check_equal(prefetcher.stats().fetches, fetches, "fetches for a unit that is refused");
  }

  void release_one() {
    const std::size_t i = random_.between<std::size_t>(0, held_.size() - 1);
    const Held held = held_[i];
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(i));
    world_.prefetcher().release(held.unit, held.stream, held.acquired.generation);
  }

  // The unit's last kernel runs on another stream than it was acquired for, behind it.
  void use_elsewhere(StreamHandle other) {
    Held& held = held_.back();
    world_.join(held.stream, other);
    world_.read(held.unit, held.acquired, other);
    held.stream = other;
    moved_ = true;
  }

  // None of these may change anything.
  void expect_refusals(StreamHandle stream) {
    Prefetcher& prefetcher = world_.prefetcher();
    const int unit = held_.back().unit;
    check_throws<UsageError>([&] { prefetcher.invalidate(unit); }, "invalidate a unit in use");
    check_throws<UsageError>([&] { prefetcher.replace_unit(unit, world_.image(unit)); },
                             "replace a unit in use");
    check_throws<UsageError>([&] { (void)prefetcher.acquire(-1, stream); }, "acquire unit -1");
    check_throws<UsageError>([&] { (void)prefetcher.acquire(world_.shape().units, stream); },
                             "acquire a unit that is not there");
    check_throws<UsageError>([&] { prefetcher.set_order({unit, unit}); }, "an order with a twin");
    check_throws<Error>(
        [&] { prefetcher.release(unit, stream, held_.back().acquired.generation + 1); },
        "release another generation");
    if (slots_held() < world_.shape().slots) return;
    for (const int more : order_) {
      if (is_held(more) || world_.lives_at_home(more)) continue;
      check_throws<UsageError>([&] { (void)prefetcher.acquire(more, stream); }, "no slot is left");
      return;
    }
  }

  void abandon(StreamHandle stream) {
    world_.prefetcher().abandon(stream);
    held_.clear();
  }

  void reorder() {
    random_.shuffle(order_);
    world_.prefetcher().set_order(order_);
    check(world_.prefetcher().order() == order_, "the order is the one that was set");
  }

  [[nodiscard]] bool has_held_rival(int unit) const {
    return std::ranges::any_of(world_.rivals(unit), [&](int rival) { return is_held(rival); });
  }
  [[nodiscard]] bool is_held(int unit) const {
    return std::any_of(held_.begin(), held_.end(), [&](const Held& h) { return h.unit == unit; });
  }
  // Of those through which units pass.
  [[nodiscard]] int slots_held() const {
    std::vector<int> slots;
    for (const Held& held : held_) {
      if (!world_.lives_at_home(held.unit)) slots.push_back(held.acquired.slot);
    }
    std::sort(slots.begin(), slots.end());
    return static_cast<int>(std::unique(slots.begin(), slots.end()) - slots.begin());
  }

  Random& random_;
  World& world_;
  std::vector<int> order_;
  std::vector<Held> held_;
  bool moved_ = false;  // in this forward, a unit was used on a stream it was not acquired for
  std::uint64_t acquires_ = 0;
};

// What a page-locked unit costs: acquire waits, release records; if it does not live at home, wait
// for its reader, (poison,) copy, record. A packed one, for each chunk: wait for the staging slot,
// (poison,) copy, record; wait for that, unpack, record. One whose packed bytes stay at home: wait
// for the home, unpack each chunk, record that it was read. One that shares its home's memory, at
// most: each stretch waits for a reader (, is poisoned) and has a copy.
std::uint64_t calls_of(const World& world, int unit) {
  const Image& image = *world.image(unit);
  const std::uint64_t poison = world.poison() ? 1 : 0;
  const std::uint64_t chunks =
      image.packing() == nullptr ? 0 : image.packing()->chunks.size() * (6 + poison);
  if (world.shares(unit)) return 3 + chunks + world.most_stretches(unit) * (2 + poison);
  if (world.lives_at_home(unit)) return 2;
  const std::uint64_t room = world.shape().slot_bytes > 0 ? 1 : 0;
  if (world.kept(unit)) return 5 + room * (1 + poison) + image.packing()->chunks.size();
  const std::uint64_t copy = image.packing() == nullptr && image.bytes() > 0 ? 1 : 0;
  return 3 + room * (1 + poison) + copy + chunks;
}

// Whether what comes over the link at each use comes without the engine's threads.
bool only_locked_ones_cross(const World& world) {
  for (int unit = 0; unit < world.shape().units; ++unit) {
    const Image& image = *world.image(unit);
    if (world.crosses(unit) && !image.locked() && image.bytes() > 0) return false;
  }
  return true;
}

// Fetched are those that share memory and, unless the slots keep them, those that pass.
void check_steady_calls(World& world, std::uint64_t calls, int forwards, bool slots_keep) {
  if (!only_locked_ones_cross(world)) return;
  std::uint64_t forward = 0;
  std::uint64_t chunks = 0;
  for (int unit = 0; unit < world.shape().units; ++unit) {
    const Image& image = *world.image(unit);
    const bool fetched = world.shares(unit) || !slots_keep;
    forward += fetched ? calls_of(world, unit) : 2;
    if (fetched && world.crosses(unit) && image.packing() != nullptr) {
      chunks += image.packing()->chunks.size();
    }
  }
  // The first chunk in a staging slot waits for none before it.
  const bool enough = chunks == 0 || chunks >= static_cast<std::uint64_t>(world.shape().staging);
  const std::uint64_t wanted = static_cast<std::uint64_t>(forwards) * forward;
  if (enough && world.sharing_units() == 0) {
    check_equal(calls, wanted, "steady: calls");
  } else {
    check_at_most(calls, wanted, "steady: calls");
  }
}

bool some_are_kept(const World& world) {
  for (int unit = 0; unit < world.shape().units; ++unit) {
    if (world.kept(unit)) return true;
  }
  return false;
}

// Rule 3 and the bytes: in the steady state each unit that does not live at home is fetched once a
// forward when the slots cannot keep it, never when they can, and nothing is called that the data
// does not need. Each that shares its home's memory is fetched once. Over the link comes only what
// has no home to itself. Where some are kept packed, which need a slot just for their use, others
// may find theirs unneeded and stay; so they may where some share memory, as these count among
// those that are fetched ahead.
void check_steady(World& world, const PrefetchStats& stats, std::uint64_t calls, int forwards) {
  const Shape& shape = world.shape();
  const auto acquires = static_cast<std::uint64_t>(forwards * shape.units);
  const auto passing = static_cast<std::uint64_t>(forwards * world.passing_units());
  const auto sharing = static_cast<std::uint64_t>(forwards * world.sharing_units());
  const std::uint64_t bytes =
      static_cast<std::uint64_t>(forwards) * world.bytes_of_crossing_images();
  check_equal(stats.acquires, acquires, "steady: acquires");
  check_equal(stats.failures, 0U, "steady: failures");
  check_equal(stats.invalidations, 0U, "steady: invalidations");
  if (shape.slots >= world.passing_units()) {
    check_equal(stats.fetches, sharing, "steady: fetches, of units that do not stay");
    check_equal(stats.cold, shape.prefetch.depth == 0 ? sharing : 0U, "steady: cold fetches");
    check_steady_calls(world, calls, forwards, true);
  } else if (shape.slots <= shape.prefetch.depth + 1 && !some_are_kept(world) && sharing == 0) {
    check_equal(stats.fetches, passing, "steady: fetches");
    check_equal(stats.bytes_fetched, bytes, "steady: bytes");
    check_equal(stats.cold, shape.prefetch.depth == 0 ? passing : 0U, "steady: cold fetches");
    check_steady_calls(world, calls, forwards, false);
  } else {
    // Some units stay from one forward to the next.
    check_at_most(sharing, stats.fetches, "steady: fetches of units that share memory");
    check_at_most(stats.fetches, passing + sharing, "steady: fetches");
    check_at_most(stats.bytes_fetched, bytes, "steady: bytes");
    if (shape.prefetch.depth > 0 && sharing == 0) {
      check_equal(stats.cold, 0U, "steady: cold fetches");
    }
  }
}

void steady(Random& random, World& world, Forwards& forwards, StreamHandle stream) {
  for (int i = 0; i < 2; ++i) forwards.plain(stream);
  world.reset_stats();
  const std::uint64_t calls = world.backend().calls();
  const std::uint64_t queries = world.backend().queries();
  const int count = random.between(1, 3);
  for (int i = 0; i < count; ++i) forwards.plain(stream);
  check_steady(world, world.prefetcher().stats(), world.backend().calls() - calls, count);
  if (only_locked_ones_cross(world)) {
    check_equal(world.backend().queries(), queries, "steady: the host waits for no event");
  }
}

void rough(Random& random, World& world, Forwards& forwards) {
  const std::uint64_t before = forwards.acquires();
  world.reset_stats();
  for (int turn = random.between(0, 6); turn > 0; --turn) {
    forwards.random(world.stream(turn), world.stream(turn + random.between(0, 1)));
    forwards.between(world.stream(turn));
  }
  const PrefetchStats stats = world.prefetcher().stats();
  check_equal(stats.acquires, forwards.acquires() - before, "acquires");
  check_equal(stats.failures, 0U, "failures");
}

void check_closed(World& world) {
  Prefetcher& prefetcher = world.prefetcher();
  const auto image = HostStore(std::make_shared<HostBackend>(), {false, 1}).allocate(0);
  check_throws<ClosedError>([&] { (void)prefetcher.acquire(0, 0); }, "acquire when closed");
  check_throws<ClosedError>([&] { prefetcher.release(0, 0, 1); }, "release when closed");
  check_throws<ClosedError>([&] { prefetcher.invalidate(0); }, "invalidate when closed");
  check_throws<ClosedError>([&] { prefetcher.replace_unit(0, image); }, "replace when closed");
  check_throws<ClosedError>([&] { prefetcher.prefetch(); }, "prefetch when closed");
  check_throws<ClosedError>([&] { (void)prefetcher.add_unit(image); }, "add_unit when closed");
  check_throws<ClosedError>([&] { prefetcher.set_order({}); }, "set_order when closed");
  for (const int unit : {-1, world.shape().units}) {
    check_throws<UsageError>([&] { (void)prefetcher.home_filled(unit); }, "home of no unit");
  }
  prefetcher.abandon(0);
  prefetcher.close();
}

void live(Random& random, World& world, Forwards& forwards) {
  if (random.chance(0.5)) world.prefetcher().prefetch();
  if (random.chance(0.5)) steady(random, world, forwards, world.stream(0));
  rough(random, world, forwards);
  if (random.chance(0.5)) steady(random, world, forwards, world.stream(1));
  if (random.chance(0.3)) forwards.keep_some(world.stream(0));
}

// The kernels of the last one may still be running.
void live_once_more(Random& random, World& world) {
  world.close_for_another(random);
  world.build();
  Forwards forwards(random, world);
  live(random, world, forwards);
}

void one_world(Random& random) {
  World world(random, random_shape(random, random.one_of<int>({3, 8, 41})));
  world.lock_images();
  world.make_prefetcher();
  std::optional<Onlooker> onlooker;
  if (random.chance(0.3)) onlooker.emplace(world.prefetcher());
  world.add_units();
  if (random.chance(0.7)) world.set_poison(std::uint8_t{0xA5});

  Forwards forwards(random, world);
  live(random, world, forwards);
  onlooker.reset();
  for (int lives = random.one_of<int>({0, 0, 1, 2}); lives > 0; --lives) {
    live_once_more(random, world);
  }
  world.close();
  world.check_homes();
  world.check_link_bytes();
  check_closed(world);
}

}  // namespace
}  // namespace wanoffload::stress

int main(int argc, char** argv) {
  using namespace wanoffload::stress;
  for (Run run(argc, argv); run.next();) one_world(run.random());
}
