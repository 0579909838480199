// Any call into the backend and any read of a file may fail, and any stream may stall, anywhere in
// the life of a prefetcher: the error is typed and says what happened, nothing hangs, and what is
// repeated afterwards is right.
#include <cerrno>
#include <functional>

#include "check.h"
#include "errors.h"
#include "world.h"

namespace wanoffload::stress {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Repeats steps that fail, and checks how they fail.
class Attempts {
 public:
  explicit Attempts(int most) : most_(most) {}

  // `Wanted` is the one type that this step may throw. True if the step went through.
  template <class Wanted>
  bool once(const char* what, const std::function<void()>& step) {
    try {
      step();
      return true;
    } catch (const Wanted& error) {
      text_ = error.what();
    } catch (const std::exception& error) {
      fail(std::string(what) + " threw another type: " + error.what());
    }
    check_at_most(++failures_, most_, std::string("failures, the last in ") + what + ": " + text_);
    return false;
  }
  template <class Wanted>
  void repeat(const char* what, const std::function<void()>& step) {
    while (!once<Wanted>(what, step)) {
    }
  }

  [[nodiscard]] int failures() const { return failures_; }
  [[nodiscard]] const std::string& text() const { return text_; }
  void allow_more() { ++most_; }

 private:
  int most_;
  int failures_ = 0;
  std::string text_;  // of the last
};

// A life, every step of which is repeated until it goes through.
class Life {
 public:
  Life(Random& random, World& world, Attempts& attempts)
      : random_(random), world_(world), attempts_(attempts) {}

  void begin() {
    attempts_.repeat<BackendError>("lock", [&] { world_.lock_images(); });
    attempts_.repeat<BackendError>("constructor", [&] { world_.make_prefetcher(); });
    if (random_.chance(0.5)) world_.set_poison(std::uint8_t{0xA5});
    attempts_.repeat<BackendError>("add_unit", [&] { world_.add_units(); });
    if (random_.chance(0.5)) world_.prefetcher().prefetch();  // its failures are for acquire
  }

  void forward(StreamHandle stream) {
    const double end = random_.one_of<double>({0, 0.1});
    for (int unit = 0; unit < world_.shape().units; ++unit) {
      if (random_.chance(end)) return abandon(stream);
      if (random_.chance(0.1)) continue;
      const Acquired acquired = acquire(unit, stream);
      world_.read(unit, acquired, stream);
      // A failed release has released: the fill that comes next makes up for it.
      attempts_.once<BackendError>(
          "release", [&] { world_.prefetcher().release(unit, stream, acquired.generation); });
    }
  }

  void change_some() {
    for (int unit = 0; unit < world_.shape().units; ++unit) {
      if (!random_.chance(0.3)) continue;
      attempts_.repeat<BackendError>("a change", world_.change(unit, random_));
    }
    if (random_.chance(0.3)) world_.prefetcher().prefetch();
  }

  // Another prefetcher over the same memory, perhaps; closed in the middle of things.
  void begin_anew(StreamHandle stream) {
    if (random_.chance(0.5)) return;
    if (random_.chance(0.5)) world_.read(0, acquire(0, stream), stream);
    attempts_.repeat<BackendError>("close", [&] { world_.close_for_another(random_); });
    begin();
  }

  // Closed in the middle of things: prefetches in flight, a unit acquired, kernels running.
  void end(StreamHandle stream) {
    if (random_.chance(0.5)) world_.read(0, acquire(0, stream), stream);
    if (random_.chance(0.5)) {
      attempts_.repeat<BackendError>("close", [&] { world_.close(); });
    } else if (!attempts_.once<BackendError>("close", [&] { world_.close(); })) {
      world_.drop_prefetcher();
    }
  }

 private:
  Acquired acquire(int unit, StreamHandle stream) {
    Acquired acquired{};
    while (!attempts_.once<TransferError>(
        "acquire", [&] { acquired = world_.prefetcher().acquire(unit, stream); })) {
      check(contains(attempts_.text(), "unit " + std::to_string(unit)), "the error names the unit");
      check(contains(attempts_.text(), "told to fail"), "the error names the cause");
      check(contains(attempts_.text(), "last events"), "the error holds the last events");
    }
    return acquired;
  }
  void abandon(StreamHandle stream) {
    const int unit = random_.between(0, world_.shape().units - 1);
    world_.read(unit, acquire(unit, stream), stream);
    attempts_.repeat<BackendError>("abandon", [&] { world_.prefetcher().abandon(stream); });
  }

  Random& random_;
  World& world_;
  Attempts& attempts_;
};

Shape small_shape(Random& random) {
  Shape shape = random_shape(random, 5);
  if (shape.slots > 0) shape.slots = random.between(1, 3);
  if (random.chance(0.8)) shape.copy_jitter_us = shape.kernel_jitter_us = 0;
  return shape;
}

// One life in which the n-th call fails (none with 0); returns how many calls it made.
std::uint64_t live_once(std::uint64_t seed, std::uint64_t nth_call) {
  Random random(seed);
  World world(random, small_shape(random));
  world.backend().fail_at(nth_call);
  Attempts attempts(nth_call == 0 ? 0 : 1);
  Life life(random, world, attempts);
  life.begin();
  for (int turn = 0; turn < 2; ++turn) {
    life.forward(world.stream(turn));
    life.change_some();
    if (turn == 0) life.begin_anew(world.stream(turn));
  }
  life.end(world.stream(0));
  return world.backend().calls();
}

// The same life again and again, each time with the next call failing.
void every_call_fails_once(Random& random) {
  const std::uint64_t seed = random.seed();
  const std::uint64_t calls = std::min<std::uint64_t>(live_once(seed, 0), 250);
  for (std::uint64_t n = 1; n <= calls; ++n) live_once(seed, n);
}

// A longer life in which calls keep failing.
void many_calls_fail(Random& random) {
  World world(random, random_shape(random, 12));
  Attempts attempts(0);
  Life life(random, world, attempts);
  const auto fail_soon = [&] {
    attempts.allow_more();
    world.backend().fail_at(random.between<std::uint64_t>(1, 60));
  };
  fail_soon();
  life.begin();
  for (int turn = random.between(1, 6); turn > 0; --turn) {
    fail_soon();
    life.forward(world.stream(turn));
    if (random.chance(0.5)) fail_soon();
    life.change_some();
    life.begin_anew(world.stream(turn));
  }
  fail_soon();
  life.end(world.stream(0));
}

// One read of a file fails, or comes back short, in each forward; the backend never does.
void reads_fail(Random& random) {
  Shape shape = random_shape(random, 6);
  shape.file_share = 1;
  World world(random, shape);
  Attempts attempts(0);
  Life life(random, world, attempts);
  life.begin();
  for (int turn = random.between(1, 8); turn > 0; --turn) {
    const int unit = random.between(0, shape.units - 1);
    const int error = random.one_of<int>({0, EIO, EINVAL, ENOMEM});
    if (error != 0) attempts.allow_more();
    world.file(unit)->fail_at(random.between<std::uint64_t>(1, 12), error);
    life.forward(world.stream(turn));
    life.change_some();
    life.begin_anew(world.stream(turn));
  }
  life.end(world.stream(0));
}

// Packed bytes that are spoilt in memory, as far as the host backend can tell: on the calling
// thread. Whoever needs them hears of it, nobody else; once they are right again so is the unit.
void spoilt_chunks_are_told(Random& random) {
  Shape shape = random_shape(random, 6);
  set_bytes(random, shape, random.between<std::size_t>(256, 60'000));
  shape.packed_share = 1;
  shape.file_share = 0;
  shape.streams = 0;
  World world(random, shape);
  world.build();
  for (int turn = random.between(1, 4); turn > 0; --turn) {
    const int spoilt = random.between(0, shape.units - 1);
    const auto repair = world.spoil_chunk(spoilt, random);
    if (random.chance(0.5)) world.prefetcher().prefetch();
    for (int unit = 0; unit < shape.units; ++unit) {
      if (unit == spoilt && repair) {
        const std::string text = check_throws<TransferError>(
            [&] { (void)world.prefetcher().acquire(unit, 0); }, "a spoilt chunk");
        check(contains(text, "unit " + std::to_string(unit)), "the error names the unit: " + text);
        check(contains(text, "spoilt"), "the error names the cause: " + text);
        repair();
      }
      const Acquired acquired = world.prefetcher().acquire(unit, 0);
      world.read(unit, acquired, 0);
      world.prefetcher().release(unit, 0, acquired.generation);
    }
  }
  world.close();
}

Shape stalling_shape(Random& random) {
  Shape shape = random_shape(random, 4);
  set_bytes(random, shape, random.between<std::size_t>(1, 4000));
  shape.kernel_jitter_us = 0;
  // Slow enough for a unit of many chunks to be late although none of them is.
  shape.copy_jitter_us = random.one_of<double>({0, 3000});
  shape.prefetch.engine.timeout = Milliseconds(random.between(5, 20));
  return shape;
}

void check_timeout_text(const std::string& text) {
  check(contains(text, "within"), "a timeout says how long it was: " + text);
  check(contains(text, "last events"), "a timeout holds the last events: " + text);
}

constexpr int kStallMs = 60;

// Repeats steps that may time out, far more often than the stalls of one case can make them.
class Patience {
 public:
  void repeat(const char* what, const std::function<void()>& step) {
    while (!once(what, step)) {
    }
  }
  bool once(const char* what, const std::function<void()>& step) {
    if (attempts_.once<TransferTimeout>(what, step)) return true;
    check_timeout_text(attempts_.text());
    return false;
  }

 private:
  Attempts attempts_{2000};
};

void stalling_forward(Random& random, World& world, Patience& patience, StreamHandle stream) {
  Prefetcher& prefetcher = world.prefetcher();
  for (int unit = 0; unit < world.shape().units; ++unit) {
    if (random.chance(0.2)) World::stall(prefetcher.copy_stream(), kStallMs);
    if (random.chance(0.2)) World::stall(prefetcher.unpack_stream(), kStallMs);
    if (random.chance(0.1) && stream != 0) World::stall(stream, kStallMs);
    Acquired acquired{};
    patience.repeat("acquire", [&] { acquired = prefetcher.acquire(unit, stream); });
    world.read(unit, acquired, stream);
    prefetcher.release(unit, stream, acquired.generation);
  }
}

// A change that times out has changed nothing: the unit is brought again and right, whatever is
// still under way.
void stalling_change(Random& random, World& world, Patience& patience, StreamHandle stream) {
  const int unit = random.between(0, world.shape().units - 1);
  const auto change = world.change(unit, random);
  Prefetcher& prefetcher = world.prefetcher();
  if (random.chance(0.5)) World::stall(prefetcher.copy_stream(), kStallMs);
  if (random.chance(0.5)) World::stall(prefetcher.unpack_stream(), kStallMs);
  if (random.chance(0.5)) prefetcher.prefetch();
  while (!patience.once("a change", change)) {
    if (random.chance(0.9)) continue;
    Acquired acquired{};
    patience.repeat("acquire", [&] { acquired = prefetcher.acquire(unit, stream); });
    world.read(unit, acquired, stream);
    prefetcher.release(unit, stream, acquired.generation);
  }
}

// Leaves copies in flight.
void fetch_behind_a_stall(World& world, Patience& patience) {
  World::stall(world.prefetcher().copy_stream(), kStallMs);
  for (int unit = 0; unit < world.shape().units; ++unit) {
    patience.once("acquire", [&] {
      const Acquired acquired = world.prefetcher().acquire(unit, world.stream(0));
      world.read(unit, acquired, world.stream(0));
      world.prefetcher().release(unit, world.stream(0), acquired.generation);
    });
  }
}

// Streams stall at random places; what times out is repeated until it goes through.
void stalls_time_out(Random& random) {
  World world(random, stalling_shape(random));
  world.build();
  if (random.chance(0.7)) world.set_poison(std::uint8_t{0xA5});
  Patience patience;
  for (int turn = 0; turn < 2; ++turn) {
    stalling_forward(random, world, patience, world.stream(turn));
    if (random.chance(0.5)) world.prefetcher().prefetch();
    stalling_change(random, world, patience, world.stream(turn));
  }
  if (random.chance(0.7)) fetch_behind_a_stall(world, patience);
  while (!patience.once("close", [&] { world.close(); })) {
    if (random.chance(0.3)) return world.drop_prefetcher();
  }
}

// One that must time out: several chunks through a ring of one, behind a stall.
void a_stalled_fetch_times_out(Random& random) {
  Shape shape;
  shape.slot_bytes = 300;
  shape.locked_share = 0;
  shape.packed_share = shape.kept_share = random.between(0, 1);
  shape.home_share = random.between(0, 1);
  shape.streams = random.between(0, 1);
  shape.prefetch.engine = {1, 100, random.between(1U, 3U), Milliseconds(10)};
  World world(random, shape);
  world.build();
  if (world.image(0)->bytes() <= 100) return;  // one chunk does not wait for another
  World::stall(world.prefetcher().copy_stream(), kStallMs);
  const auto acquire = [&] { return world.prefetcher().acquire(0, world.stream(0)); };
  check_timeout_text(check_throws<TransferTimeout>([&] { (void)acquire(); }, "a stalled fetch"));
  Patience patience;
  if (random.chance(0.7)) {  // else it is closed with the fetch under way
    std::this_thread::sleep_for(std::chrono::milliseconds(2 * kStallMs));
    patience.repeat("acquire", [&] { world.read(0, acquire(), world.stream(0)); });
  }
  patience.repeat("close", [&] { world.close(); });
}

}  // namespace
}  // namespace wanoffload::stress

int main(int argc, char** argv) {
  using namespace wanoffload::stress;
  const std::vector<void (*)(Random&)> cases = {
      every_call_fails_once,  many_calls_fail, many_calls_fail,          reads_fail,
      spoilt_chunks_are_told, stalls_time_out, a_stalled_fetch_times_out};
  for (Run run(argc, argv); run.next();) run.random().one_of(cases)(run.random());
}
