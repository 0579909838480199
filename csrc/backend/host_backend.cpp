#include "backend/host_backend.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <thread>

#include "errors.h"
#include "unpacker.h"

namespace wanoffload {
namespace {

using Clock = std::chrono::steady_clock;

std::chrono::nanoseconds microseconds(double us) {
  return std::chrono::nanoseconds(static_cast<std::int64_t>(us * 1e3));
}

}  // namespace

// Counts recordings and completions; a wait is for the recording that was last when it was issued.
class HostEvent {
 public:
  std::uint64_t record() {
    const std::lock_guard lock(mutex_);
    return ++recorded_;
  }
  void complete(std::uint64_t ticket) {
    const std::lock_guard lock(mutex_);
    completed_ = std::max(completed_, ticket);
    // Under the lock: a waiter woken earlier could destroy this event before the call.
    changed_.notify_all();
  }
  std::uint64_t last_recorded() const {
    const std::lock_guard lock(mutex_);
    return recorded_;
  }
  void wait(std::uint64_t ticket) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return completed_ >= ticket; });
  }
  bool is_complete() const {
    const std::lock_guard lock(mutex_);
    return completed_ >= recorded_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t recorded_ = 0;
  std::uint64_t completed_ = 0;
};

// One thread that runs what it is given in order. Its destructor runs what is left first.
class HostStream {
 public:
  HostStream() : thread_([this] { run(); }) {}
  ~HostStream() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    changed_.notify_all();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !work_.empty(); });
      if (work_.empty()) return;
      const auto work = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool stop_ = false;
  std::thread thread_;  // last: it starts when everything above is there
};

namespace {

using EventPtr = std::shared_ptr<HostEvent>;

// A handle owns one reference; work that is still queued owns others.
EventPtr& event_of(EventHandle handle) { return *reinterpret_cast<EventPtr*>(handle); }
HostStream& stream_of(StreamHandle handle) { return *reinterpret_cast<HostStream*>(handle); }

void copy_at_rate(DeviceAddress destination, const void* source, std::size_t bytes,
                  double bytes_per_second, double delay_us) {
  auto due = Clock::now() + microseconds(delay_us);
  if (delay_us > 0) std::this_thread::sleep_until(due);
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  for (std::size_t done = 0; done < bytes; done += kPiece) {
    const std::size_t size = std::min(kPiece, bytes - done);
    std::memcpy(reinterpret_cast<std::byte*>(destination) + done,
                static_cast<const std::byte*>(source) + done, size);
    if (bytes_per_second <= 0) continue;
    due += microseconds(1e6 * static_cast<double>(size) / bytes_per_second);
    std::this_thread::sleep_until(due);
  }
}

void unpack_after(const UnpackJob& job, double delay_us) {
  if (delay_us > 0) std::this_thread::sleep_for(microseconds(delay_us));
  const bool sound = unpack_chunk(reinterpret_cast<const std::byte*>(job.chunk), job.chunk_bytes,
                                  reinterpret_cast<std::byte*>(job.image), job.image_bytes);
  if (!sound && job.spoilt) *job.spoilt = job.fill;
}

}  // namespace

HostBackend::HostBackend(HostOptions options) : options_(options), random_(options.seed) {}
HostBackend::~HostBackend() = default;

void HostBackend::fail_at(std::uint64_t nth_call) {
  fail_at_ = nth_call == 0 ? 0 : calls_.load() + nth_call;
}

void HostBackend::count(const char* call) {
  const std::uint64_t number = ++calls_;
  if (number != fail_at_.load()) return;
  throw BackendError(std::string(call) + " failed: the host backend was told to fail at call " +
                     std::to_string(number));
}

double HostBackend::next_delay_us() {
  if (options_.jitter_us <= 0) return options_.latency_us;
  const std::lock_guard lock(mutex_);
  return options_.latency_us +
         std::uniform_real_distribution<double>(0, options_.jitter_us)(random_);
}

StreamHandle HostBackend::create_stream(StreamPriority) {
  count("create_stream");
  return reinterpret_cast<StreamHandle>(new HostStream());
}

void HostBackend::destroy_stream(StreamHandle stream) noexcept { delete &stream_of(stream); }

EventHandle HostBackend::create_event() {
  count("create_event");
  return reinterpret_cast<EventHandle>(new EventPtr(std::make_shared<HostEvent>()));
}

void HostBackend::destroy_event(EventHandle event) noexcept { delete &event_of(event); }

void HostBackend::record(EventHandle event, StreamHandle stream) {
  count("record");
  const EventPtr target = event_of(event);
  const std::uint64_t ticket = target->record();
  if (stream == 0) {
    target->complete(ticket);
  } else {
    stream_of(stream).push([target, ticket] { target->complete(ticket); });
  }
}

void HostBackend::wait(StreamHandle stream, EventHandle event) {
  count("wait");
  const EventPtr target = event_of(event);
  const std::uint64_t ticket = target->last_recorded();
  if (stream == 0) {
    target->wait(ticket);
  } else {
    stream_of(stream).push([target, ticket] { target->wait(ticket); });
  }
}

bool HostBackend::is_complete(EventHandle event) {
  ++queries_;
  return event_of(event)->is_complete();
}

void HostBackend::copy_to_device(DeviceAddress destination, const void* source, std::size_t bytes,
                                 StreamHandle stream) {
  count("copy_to_device");
  const double delay_us = next_delay_us();
  const double rate = options_.bytes_per_second;
  if (stream == 0) {
    copy_at_rate(destination, source, bytes, rate, delay_us);
  } else {
    stream_of(stream).push([=] { copy_at_rate(destination, source, bytes, rate, delay_us); });
  }
}

void HostBackend::fill_device(DeviceAddress destination, std::uint8_t value, std::size_t bytes,
                              StreamHandle stream) {
  count("fill_device");
  const auto fill = [=] { std::memset(reinterpret_cast<void*>(destination), value, bytes); };
  if (stream == 0) {
    fill();
  } else {
    stream_of(stream).push(fill);
  }
}

void HostBackend::unpack(const UnpackJob& job, StreamHandle stream) {
  count("unpack");
  const double delay_us = next_delay_us();
  if (stream == 0) {
    unpack_after(job, delay_us);
  } else {
    stream_of(stream).push([=] { unpack_after(job, delay_us); });
  }
}

void HostBackend::lock_host(void* memory, std::size_t bytes) {
  count("lock_host");
  const std::lock_guard lock(mutex_);
  if (!locked_.emplace(memory, bytes).second) throw BackendError("lock_host: already locked");
}

void HostBackend::unlock_host(void* memory) noexcept {
  const std::lock_guard lock(mutex_);
  locked_.erase(memory);
}

std::size_t HostBackend::locked_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t sum = 0;
  for (const auto& [memory, bytes] : locked_) sum += bytes;
  return sum;
}

void synchronize(Backend& backend, EventHandle event, Milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  auto pause = std::chrono::microseconds(5);
  while (!backend.is_complete(event)) {
    if (Clock::now() > deadline) {
      throw TransferTimeout("the device did not finish within " + std::to_string(timeout.count()) +
                            " ms");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(500));
  }
}

}  // namespace wanoffload
