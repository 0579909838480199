// Brings images to the device once, one after the other: what packing there needs while a model is
// wrapped. It has a pinned ring and a copy stream of its own.
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "backend/backend.h"
#include "copy_engine.h"
#include "image.h"

namespace wanoffload {

// One thread at a time. A destination is written to from start() on, until what `wait` was given
// has waited, or wait() or close() has thrown or returned without that.
class Uploader {
 public:
  // Allocates the ring and starts its threads.
  Uploader(const BackendPtr& backend, EngineOptions options);

  // Queues a plain image for an address on the device. Its copy waits for what is enqueued on
  // `behind` now, if that is given: kernels that read what stands there. Throws UsageError for a
  // packed image, ClosedError, BackendError; it is not queued then.
  void start(ImagePtr image, DeviceAddress destination, std::optional<StreamHandle> behind);
  // The oldest image that was not waited for: the host waits until all of it is enqueued, `stream`
  // waits for its last byte. If its transfer failed, waits for the copies in flight and throws why;
  // the next call is for the next image. Throws UsageError if none is left; TransferTimeout, behind
  // which only close() is of use.
  void wait(StreamHandle stream);
  // Waits for the copies in flight, then gives everything back. What was not enqueued does not
  // arrive: waiting for it throws ClosedError. Idempotent; the destructor does it too.
  void close();

 private:
  struct Upload {
    explicit Upload(const BackendPtr& backend) : before(backend), ready(backend) {}
    Event before;  // behind which its copy comes
    Event ready;
    Transfer transfer;
  };
  using UploadPtr = std::unique_ptr<Upload>;
  void give_up(UploadPtr upload);

  const BackendPtr backend_;
  std::deque<UploadPtr> uploads_;  // oldest first
  std::deque<UploadPtr> failed_;   // whose copies may be running
  CopyEngine engine_;              // last: its destructor waits for the copies
};

}  // namespace wanoffload
