#include "backend/cuda_backend.h"

#include <array>
#include <cstdio>

#include "errors.h"

namespace wanoffload {
namespace {

// Makes a context current for one call. Stream 0 means the default stream of the current context,
// so a caller whose current device is another one must not be taken at its word.
class Current {
 public:
  Current(const cuda::Driver& driver, cuda::Context context) : driver_(driver) {
    cuda::Context now = nullptr;
    cuda::check(driver.context_get(&now), "cuCtxGetCurrent");
    if (now == context) return;
    cuda::check(driver.context_push(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    cuda::Context popped = nullptr;
    if (pushed_) driver_.context_pop(&popped);
  }

 private:
  const cuda::Driver& driver_;
  bool pushed_ = false;
};

cuda::Stream stream_of(StreamHandle handle) { return reinterpret_cast<cuda::Stream>(handle); }
cuda::Event event_of(EventHandle handle) { return reinterpret_cast<cuda::Event>(handle); }

// For destructors. After the process's CUDA has shut down everything fails; there is nothing to
// do about it and nothing is lost.
void report(cuda::Result result, const char* call) noexcept {
  constexpr cuda::Result kDeinitialized = 4;
  constexpr cuda::Result kContextDestroyed = 709;
  if (result == cuda::kSuccess || result == kDeinitialized || result == kContextDestroyed) return;
  std::fprintf(stderr, "wanoffload: %s answered %d while closing\n", call, result);
}

}  // namespace

CudaBackend::CudaBackend(int device_index) : driver_(cuda::driver()), device_(device_index) {
  cuda::Device device = 0;
  cuda::check(driver_.device_get(&device, device_index), "cuDeviceGet");
  cuda::check(driver_.primary_retain(&context_, device), "cuDevicePrimaryCtxRetain");
}

CudaBackend::~CudaBackend() {
  cuda::Context popped = nullptr;
  if (!modules_.empty() && driver_.context_push(context_) == cuda::kSuccess) {
    for (cuda::Module module : modules_) report(driver_.module_unload(module), "cuModuleUnload");
    driver_.context_pop(&popped);
  }
  report(driver_.primary_release(device_), "cuDevicePrimaryCtxRelease");
}

void CudaBackend::load_unpack_kernel(std::span<const std::byte> cubin, const std::string& name,
                                     unsigned threads, unsigned shared_bytes) {
  const Current current(driver_, context_);
  cuda::Module module = nullptr;
  cuda::check(driver_.module_load(&module, cubin.data()), "cuModuleLoadData");
  const std::lock_guard lock(mutex_);
  modules_.push_back(module);
  Kernel kernel{nullptr, threads, shared_bytes};
  cuda::check(driver_.module_function(&kernel.function, module, name.c_str()),
              "cuModuleGetFunction");
  constexpr unsigned kAlwaysThere = 48U << 10;  // more must be asked for
  if (shared_bytes > kAlwaysThere) {
    cuda::check(driver_.function_set(kernel.function, cuda::kMaxSharedBytes,
                                     static_cast<int>(shared_bytes)),
                "cuFuncSetAttribute");
  }
  unpack_kernel_ = kernel;
}

StreamHandle CudaBackend::create_stream(StreamPriority priority) {
  const Current current(driver_, context_);
  int least = 0;
  int greatest = 0;
  cuda::check(driver_.priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  const int wanted = priority == StreamPriority::kHigh ? greatest : least;
  cuda::Stream stream = nullptr;
  // Non-blocking: torch computes on the legacy stream, which other streams would wait for.
  cuda::check(driver_.stream_create(&stream, cuda::kStreamNonBlocking, wanted),
              "cuStreamCreateWithPriority");
  return reinterpret_cast<StreamHandle>(stream);
}

void CudaBackend::destroy_stream(StreamHandle stream) noexcept {
  report(driver_.stream_destroy(stream_of(stream)), "cuStreamDestroy");
}

EventHandle CudaBackend::create_event() {
  const Current current(driver_, context_);
  cuda::Event event = nullptr;
  cuda::check(driver_.event_create(&event, cuda::kEventDisableTiming), "cuEventCreate");
  return reinterpret_cast<EventHandle>(event);
}

void CudaBackend::destroy_event(EventHandle event) noexcept {
  report(driver_.event_destroy(event_of(event)), "cuEventDestroy");
}

void CudaBackend::record(EventHandle event, StreamHandle stream) {
  const Current current(driver_, context_);
  cuda::check(driver_.event_record(event_of(event), stream_of(stream)), "cuEventRecord");
}

void CudaBackend::wait(StreamHandle stream, EventHandle event) {
  const Current current(driver_, context_);
  cuda::check(driver_.stream_wait_event(stream_of(stream), event_of(event), 0),
              "cuStreamWaitEvent");
}

bool CudaBackend::is_complete(EventHandle event) {
  const Current current(driver_, context_);
  const cuda::Result result = driver_.event_query(event_of(event));
  if (result == cuda::kNotReady) return false;
  cuda::check(result, "cuEventQuery");
  return true;
}

void CudaBackend::copy_to_device(DeviceAddress destination, const void* source, std::size_t bytes,
                                 StreamHandle stream) {
  const Current current(driver_, context_);
  cuda::check(driver_.copy_host_to_device(destination, source, bytes, stream_of(stream)),
              "cuMemcpyHtoDAsync");
}

void CudaBackend::fill_device(DeviceAddress destination, std::uint8_t value, std::size_t bytes,
                              StreamHandle stream) {
  const Current current(driver_, context_);
  cuda::check(driver_.fill_bytes(destination, value, bytes, stream_of(stream)), "cuMemsetD8Async");
}

CudaBackend::Kernel CudaBackend::unpack_kernel() const {
  const std::lock_guard lock(mutex_);
  if (unpack_kernel_.function == nullptr) {
    throw BackendError("a packed image can't be unpacked on " + name() +
                       ": load_unpack_kernel() comes first");
  }
  return unpack_kernel_;
}

void CudaBackend::unpack(const UnpackJob& job, StreamHandle stream) {
  const Kernel kernel = unpack_kernel();
  const Current current(driver_, context_);
  std::uint64_t chunk = job.chunk;
  std::uint64_t image = job.image;
  std::uint64_t chunk_bytes = job.chunk_bytes;
  std::uint64_t image_bytes = job.image_bytes;
  // A compiler may append pointers to scratch memory, which this kernel does not use. Of the
  // entries here no more are read than the kernel has parameters.
  std::uint64_t none = 0;
  std::array<void*, 10> parameters;
  parameters.fill(&none);
  parameters[0] = &chunk;
  parameters[1] = &image;
  parameters[2] = &chunk_bytes;
  parameters[3] = &image_bytes;
  cuda::check(driver_.launch(kernel.function, job.blocks, 1, 1, kernel.threads, 1, 1,
                             kernel.shared_bytes, stream_of(stream), parameters.data(), nullptr),
              "cuLaunchKernel");
}

void CudaBackend::lock_host(void* memory, std::size_t bytes) {
  const Current current(driver_, context_);
  const cuda::Result result = driver_.host_register(memory, bytes, cuda::kRegisterPortable);
  if (result == cuda::kOutOfMemory) {
    throw HostMemoryError("the driver could not page-lock " + std::to_string(bytes) +
                          " bytes of host memory; free host memory, or use host=\"pageable\"");
  }
  cuda::check(result, "cuMemHostRegister");
}

void CudaBackend::unlock_host(void* memory) noexcept {
  cuda::Context popped = nullptr;
  if (driver_.context_push(context_) != cuda::kSuccess) return;
  report(driver_.host_unregister(memory), "cuMemHostUnregister");
  driver_.context_pop(&popped);
}

}  // namespace wanoffload
