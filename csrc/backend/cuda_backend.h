// One CUDA device behind the seam, through the driver, in the primary context that torch uses too.
#pragma once

#include <string>

#include "backend/backend.h"
#include "backend/cuda_driver.h"

namespace wanoffload {

class CudaBackend final : public Backend {
 public:
  // Keeps the device's primary context alive. Throws BackendError without driver or device.
  explicit CudaBackend(int device_index);
  ~CudaBackend() override;

  [[nodiscard]] std::string name() const override { return "cuda:" + std::to_string(device_); }
  [[nodiscard]] StreamHandle create_stream() override;
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
  void lock_host(void* memory, std::size_t bytes) override;
  void unlock_host(void* memory) noexcept override;

 private:
  const cuda::Driver& driver_;
  const int device_;
  cuda::Context context_ = nullptr;
};

}  // namespace wanoffload
