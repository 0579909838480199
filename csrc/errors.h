// The typed errors of the engine. Python sees each as a subclass of wanoffload.OffloadError.
#pragma once

#include <stdexcept>
#include <string>

namespace wanoffload {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call into the driver (or the host backend) failed; the message names the call and its answer.
struct BackendError : Error {
  using Error::Error;
};

// A fetch failed; raised by the acquire that needed its bytes.
struct TransferError : Error {
  using Error::Error;
};

// A fetch did not finish in time; the message holds the engine's last events.
struct TransferTimeout : Error {
  using Error::Error;
};

// The host refused memory, or refused to lock it.
struct HostMemoryError : Error {
  using Error::Error;
};

// The engine was closed.
struct ClosedError : Error {
  using Error::Error;
};

// The caller broke a contract of this header's classes.
struct UsageError : Error {
  using Error::Error;
};

}  // namespace wanoffload
