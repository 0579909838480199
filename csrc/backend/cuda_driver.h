// The few functions of the CUDA driver that the engine calls, found in libcuda.so.1 at run time.
// So one build serves machines without a GPU and every driver that has these names (CUDA 12, 13).
#pragma once

#include <cstddef>
#include <cstdint>

namespace wanoffload::cuda {

// The driver's types, by their shape: all handles are pointers, all enumerations are int.
using Result = int;
using Device = int;
using Context = void*;
using Stream = void*;
using Event = void*;
using Module = void*;
using Function = void*;
using Address = unsigned long long;

// X(name here, name in the driver, parameters...)
#define WANOFFLOAD_CUDA_FUNCTIONS(X)                                                              \
  X(init, cuInit, unsigned)                                                                       \
  X(get_error_name, cuGetErrorName, Result, const char**)                                         \
  X(get_error_string, cuGetErrorString, Result, const char**)                                     \
  X(device_get, cuDeviceGet, Device*, int)                                                        \
  X(primary_retain, cuDevicePrimaryCtxRetain, Context*, Device)                                   \
  X(primary_release, cuDevicePrimaryCtxRelease_v2, Device)                                        \
  X(context_get, cuCtxGetCurrent, Context*)                                                       \
  X(context_push, cuCtxPushCurrent_v2, Context)                                                   \
  X(context_pop, cuCtxPopCurrent_v2, Context*)                                                    \
  X(priority_range, cuCtxGetStreamPriorityRange, int*, int*)                                      \
  X(stream_create, cuStreamCreateWithPriority, Stream*, unsigned, int)                            \
  X(stream_destroy, cuStreamDestroy_v2, Stream)                                                   \
  X(stream_wait_event, cuStreamWaitEvent, Stream, Event, unsigned)                                \
  X(event_create, cuEventCreate, Event*, unsigned)                                                \
  X(event_destroy, cuEventDestroy_v2, Event)                                                      \
  X(event_record, cuEventRecord, Event, Stream)                                                   \
  X(event_query, cuEventQuery, Event)                                                             \
  X(copy_host_to_device, cuMemcpyHtoDAsync_v2, Address, const void*, std::size_t, Stream)         \
  X(fill_bytes, cuMemsetD8Async, Address, unsigned char, std::size_t, Stream)                     \
  X(host_register, cuMemHostRegister_v2, void*, std::size_t, unsigned)                            \
  X(host_unregister, cuMemHostUnregister, void*)                                                  \
  X(module_load, cuModuleLoadData, Module*, const void*)                                          \
  X(module_unload, cuModuleUnload, Module)                                                        \
  X(module_function, cuModuleGetFunction, Function*, Module, const char*)                         \
  X(function_set, cuFuncSetAttribute, Function, int, int)                                         \
  X(launch, cuLaunchKernel, Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
    unsigned, Stream, void**, void**)

// One table of function pointers. Immutable once loaded.
struct Driver {
#define WANOFFLOAD_DECLARE(ours, theirs, ...) Result (*ours)(__VA_ARGS__) = nullptr;
  WANOFFLOAD_CUDA_FUNCTIONS(WANOFFLOAD_DECLARE)
#undef WANOFFLOAD_DECLARE
};

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;
inline constexpr Result kOutOfMemory = 2;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kRegisterPortable = 1;
inline constexpr int kMaxSharedBytes = 8;  // an attribute of a function

// Opens the driver at the first call. Throws BackendError where there is none, or one too old.
[[nodiscard]] const Driver& driver();

// Throws BackendError with the driver's own words unless `result` is success.
void check(Result result, const char* call);

}  // namespace wanoffload::cuda
