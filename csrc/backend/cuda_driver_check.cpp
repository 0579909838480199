// Compiled only where a CUDA toolkit is found: our declarations against the toolkit's header.
#include <cuda.h>

#include <type_traits>

#include "backend/cuda_driver.h"

namespace wanoffload::cuda {
namespace {

// Same calling convention: both pointers, or both integers (or enumerations) of the same size.
template <class Ours, class Theirs>
constexpr bool kSameShape =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;

template <class Ours, class Theirs>
struct Same : std::false_type {};

template <class R1, class... A1, class R2, class... A2>
  requires(sizeof...(A1) == sizeof...(A2))
struct Same<R1 (*)(A1...), R2 (*)(A2...)>
    : std::bool_constant<kSameShape<R1, R2> && (kSameShape<A1, A2> && ...)> {};

#define WANOFFLOAD_CHECK(ours, theirs, ...)                               \
  static_assert(Same<decltype(Driver::ours), decltype(&::theirs)>::value, \
                #theirs " is declared differently in cuda.h");
WANOFFLOAD_CUDA_FUNCTIONS(WANOFFLOAD_CHECK)
#undef WANOFFLOAD_CHECK

static_assert(kSuccess == CUDA_SUCCESS && kNotReady == CUDA_ERROR_NOT_READY &&
              kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(kMaxSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);

}  // namespace
}  // namespace wanoffload::cuda
