// One CUDA device behind the seam, through the driver, in the primary context that torch uses too.
#pragma once

#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda_driver.h"

namespace wanoffload {

class CudaBackend final : public Backend {
 public:
  // Keeps the device's primary context alive. Throws BackendError without driver or device.
  explicit CudaBackend(int device_index);
  ~CudaBackend() override;

  // Takes the kernel that unpacks (kernels/unpack.py), compiled for this device, from here on.
  // `threads` of a block, `shared_bytes` of its dynamic shared memory. Its parameters: chunk,
  // image, chunk bytes, image bytes, 64 bits each; any that follow are given null. Throws
  // BackendError.
  void load_unpack_kernel(std::span<const std::byte> cubin, const std::string& name,
                          unsigned threads, unsigned shared_bytes);

  [[nodiscard]] std::string name() const override { return "cuda:" + std::to_string(device_); }
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
  // Throws BackendError if no kernel was loaded.
  void unpack(const UnpackJob& job, StreamHandle stream) override;
  void lock_host(void* memory, std::size_t bytes) override;
  void unlock_host(void* memory) noexcept override;

 private:
  struct Kernel {
    cuda::Function function = nullptr;
    unsigned threads = 0;
    unsigned shared_bytes = 0;
  };
  [[nodiscard]] Kernel unpack_kernel() const;

  const cuda::Driver& driver_;
  const int device_;
  cuda::Context context_ = nullptr;

  mutable std::mutex mutex_;
  // guarded by mutex_
  Kernel unpack_kernel_;
  std::vector<cuda::Module> modules_;  // all that were loaded: launches of an older may be queued
};

}  // namespace wanoffload
