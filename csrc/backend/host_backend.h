// A device made of threads: a stream is a thread, an event a counter, device memory is RAM.
// Not a mock: the ring, the copy engine and the prefetcher run on it unchanged, under a race
// detector, at a chosen speed, and with a failure at any chosen call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>

#include "backend/backend.h"

namespace wanoffload {

struct HostOptions {
  double bytes_per_second = 0;  // rate of one stream's copies; 0: as fast as memcpy
  double latency_us = 0;        // added to every copy, and to the unpacking of every chunk
  double jitter_us = 0;         // and a random part, up to this much
  std::uint64_t seed = 0;       // of the jitter
};

class HostStream;
class HostEvent;

class HostBackend final : public Backend {
 public:
  explicit HostBackend(HostOptions options = {});
  ~HostBackend() override;

  // The n-th call into this backend from now on (1 is the next) throws BackendError, once; calls
  // that must not fail are not counted. 0 takes that back.
  void fail_at(std::uint64_t nth_call);
  // Calls counted since construction.
  [[nodiscard]] std::uint64_t calls() const { return calls_.load(); }
  // Times that the host asked whether an event is complete: what a waiting host does.
  [[nodiscard]] std::uint64_t queries() const { return queries_.load(); }
  // Bytes that are page-locked in the sense of lock_host.
  [[nodiscard]] std::size_t locked_bytes() const;

  [[nodiscard]] std::string name() const override { return "host"; }
  [[nodiscard]] StreamHandle create_stream(StreamPriority priority) override;
  void destroy_stream(StreamHandle stream) noexcept override;
  [[nodiscard]] EventHandle create_event() override;
  void destroy_event(EventHandle event) noexcept override;
  void record(EventHandle event, StreamHandle stream) override;
  void wait(StreamHandle stream, EventHandle event) override;
  [[nodiscard]] bool is_complete(EventHandle event) override;
  void copy_to_device(DeviceAddress destination, const void* source, std::size_t bytes,
                      StreamHandle stream) override;
  void fill_device(DeviceAddress destination, std::uint8_t value, std::size_t bytes,
                   StreamHandle stream) override;
  void unpack(const UnpackJob& job, StreamHandle stream) override;
  void lock_host(void* memory, std::size_t bytes) override;
  void unlock_host(void* memory) noexcept override;

 private:
  void count(const char* call);
  [[nodiscard]] double next_delay_us();

  const HostOptions options_;
  std::atomic<std::uint64_t> calls_{0};
  std::atomic<std::uint64_t> queries_{0};
  std::atomic<std::uint64_t> fail_at_{0};

  mutable std::mutex mutex_;
  // guarded by mutex_
  std::mt19937_64 random_;
  std::unordered_map<void*, std::size_t> locked_;
};

}  // namespace wanoffload
