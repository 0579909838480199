#include "uploader.h"

#include <utility>

#include "errors.h"

namespace wanoffload {

Uploader::Uploader(const BackendPtr& backend, EngineOptions options)
    : backend_(backend), engine_(backend, std::move(options)) {
  engine_.prepare_ring();
}

void Uploader::start(ImagePtr image, DeviceAddress destination,
                     std::optional<StreamHandle> behind) {
  auto upload = std::make_unique<Upload>(backend_);
  Transfer& transfer = upload->transfer;
  transfer.image = std::move(image);
  transfer.ready = upload->ready.handle();
  transfer.generation = 1;
  if (behind) {
    backend_->record(upload->before.handle(), *behind);
    transfer.wait_for.push_back(upload->before.handle());
  }
  transfer.go_to(destination, transfer.bytes_there());
  try {
    engine_.submit(transfer);
  } catch (...) {
    give_up(std::move(upload));
    throw;
  }
  uploads_.push_back(std::move(upload));
}

void Uploader::wait(StreamHandle stream) {
  if (uploads_.empty()) throw UsageError("there is nothing to wait for: start() comes first");
  Upload& oldest = *uploads_.front();
  try {
    engine_.wait_settled(oldest.transfer);
    backend_->wait(stream, oldest.ready.handle());
  } catch (...) {
    if (!engine_.settled(oldest.transfer)) throw;
    UploadPtr failed = std::move(uploads_.front());
    uploads_.pop_front();
    give_up(std::move(failed));
    throw;
  }
  uploads_.pop_front();
}

// Copies of it may be running: its image must not be let go before they have ended.
void Uploader::give_up(UploadPtr upload) {
  failed_.push_back(std::move(upload));
  engine_.drain();
  failed_.clear();
}

void Uploader::close() {
  engine_.close();
  failed_.clear();
  for (const UploadPtr& upload : uploads_) upload->transfer.image = nullptr;
}

}  // namespace wanoffload
