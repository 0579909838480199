// The seam between the engine and a platform. Everything above this line of the tree is the same
// code on every platform; everything that knows one stands in this folder.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace wanoffload {

// A stream or an event, as the platform's own handle. Stream 0 is the platform's default stream:
// CUDA's legacy stream, or the calling thread on the host backend.
using StreamHandle = std::uintptr_t;
using EventHandle = std::uintptr_t;
using DeviceAddress = std::uintptr_t;
using Milliseconds = std::chrono::milliseconds;

// Which stream's work goes first where there is room for one of two.
enum class StreamPriority : std::uint8_t { kNormal, kHigh };

// One chunk of a packed image, which stands on the device, and where its plain image is to be.
struct UnpackJob {
  DeviceAddress chunk;
  std::size_t chunk_bytes;
  DeviceAddress image;
  std::size_t image_bytes;
  std::uint32_t blocks;
  // A backend that finds the chunk spoilt notes `fill` here, before anything recorded behind the
  // job is complete. The host can tell; a GPU can't. May be null.
  std::shared_ptr<std::atomic<std::uint64_t>> spoilt;
  std::uint64_t fill = 0;
};

// Streams, events, copies and page-locking of one device. Every method may be called from any
// thread, and throws BackendError unless it says otherwise. Semantics are CUDA's: work in one
// stream runs in order; waiting on an event waits for what was recorded last before the wait was
// issued; waiting on an event that was never recorded succeeds at once.
class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual std::string name() const = 0;

  [[nodiscard]] virtual StreamHandle create_stream(StreamPriority priority) = 0;
  virtual void destroy_stream(StreamHandle stream) noexcept = 0;
  [[nodiscard]] virtual EventHandle create_event() = 0;
  virtual void destroy_event(EventHandle event) noexcept = 0;

  virtual void record(EventHandle event, StreamHandle stream) = 0;
  // Makes the stream wait, not the host (on the host backend stream 0 is the host).
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  [[nodiscard]] virtual bool is_complete(EventHandle event) = 0;

  // The host memory must stay as it is until an event recorded afterwards is complete.
  virtual void copy_to_device(DeviceAddress destination, const void* source, std::size_t bytes,
                              StreamHandle stream) = 0;
  virtual void fill_device(DeviceAddress destination, std::uint8_t value, std::size_t bytes,
                           StreamHandle stream) = 0;

  // Writes the ranges of the plain image that the chunk covers. Never reads beyond the chunk or
  // writes beyond the image, whatever the chunk's bytes are.
  virtual void unpack(const UnpackJob& job, StreamHandle stream) = 0;

  // Page-locks memory, so that copies from it run at the link's rate and beside the host.
  virtual void lock_host(void* memory, std::size_t bytes) = 0;
  virtual void unlock_host(void* memory) noexcept = 0;
};

using BackendPtr = std::shared_ptr<Backend>;

// The host waits until the event is complete. Throws TransferTimeout after `timeout`.
// Never called in the steady state.
void synchronize(Backend& backend, EventHandle event, Milliseconds timeout);

// Owns a stream.
class Stream {
 public:
  explicit Stream(BackendPtr backend, StreamPriority priority = StreamPriority::kNormal)
      : backend_(std::move(backend)), handle_(backend_->create_stream(priority)) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { backend_->destroy_stream(handle_); }
  [[nodiscard]] StreamHandle handle() const { return handle_; }

 private:
  BackendPtr backend_;
  StreamHandle handle_;
};

// Owns an event.
class Event {
 public:
  explicit Event(BackendPtr backend)
      : backend_(std::move(backend)), handle_(backend_->create_event()) {}
  Event(Event&& other) noexcept
      : backend_(std::move(other.backend_)), handle_(std::exchange(other.handle_, 0)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Event() {
    if (handle_ != 0) backend_->destroy_event(handle_);
  }
  [[nodiscard]] EventHandle handle() const { return handle_; }

 private:
  BackendPtr backend_;
  EventHandle handle_;
};

}  // namespace wanoffload
