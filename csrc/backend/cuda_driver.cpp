#include "backend/cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "errors.h"

namespace wanoffload::cuda {
namespace {

void* open_library() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  const char* reason = dlerror();
  throw BackendError(std::string("no CUDA driver on this machine: ") +
                     (reason != nullptr ? reason : "libcuda.so.1 could not be opened"));
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw BackendError(std::string("the CUDA driver has no ") + name + ": it is too old");
  }
}

Driver load() {
  void* library = open_library();  // stays open: the process uses it until its end
  Driver table;
#define WANOFFLOAD_FIND(ours, theirs, ...) find(library, #theirs, table.ours);
  WANOFFLOAD_CUDA_FUNCTIONS(WANOFFLOAD_FIND)
#undef WANOFFLOAD_FIND
  if (const Result result = table.init(0); result != kSuccess) {
    throw BackendError("cuInit failed with error " + std::to_string(result));
  }
  return table;
}

}  // namespace

const Driver& driver() {
  static const Driver table = load();
  return table;
}

void check(Result result, const char* call) {
  if (result == kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  driver().get_error_name(result, &name);
  driver().get_error_string(result, &text);
  throw BackendError(std::string(call) +
                     " failed: " + (name != nullptr ? name : std::to_string(result).c_str()) +
                     (text != nullptr ? std::string(" (") + text + ")" : std::string()));
}

}  // namespace wanoffload::cuda
