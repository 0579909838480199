// The only file that knows Python. Streams, events and device memory cross as integers; every
// call that may wait gives up the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>

#include "backend/cuda_backend.h"
#include "backend/host_backend.h"
#include "errors.h"
#include "file_image.h"
#include "fingerprint.h"
#include "host_store.h"
#include "packed_image.h"
#include "packer.h"
#include "pieces_image.h"
#include "pinned_ring.h"
#include "prefetcher.h"
#include "unpacker.h"
#include "uploader.h"

namespace py = pybind11;
using namespace wanoffload;  // NOLINT: this file is the module
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace {

// A run of an image's bytes where its file is mapped. Keeps both.
struct FileBytes {
  FileImagePtr image;
  const std::byte* data;
  std::size_t bytes;
};

void bind_errors(py::module_& m) {
  const auto& base = py::register_exception<Error>(m, "OffloadError", PyExc_RuntimeError);
  py::register_exception<BackendError>(m, "BackendError", base);
  py::register_exception<TransferError>(m, "TransferError", base);
  py::register_exception<TransferTimeout>(m, "TransferTimeout", base);
  py::register_exception<HostMemoryError>(m, "HostMemoryError", base);
  py::register_exception<ClosedError>(m, "ClosedError", base);
  py::register_exception<UsageError>(m, "UsageError", base);
}

// Streams and events by hand: for benchmarks and tests of the seam.
void bind_backends(py::module_& m) {
  py::class_<Backend, BackendPtr>(m, "Backend")
      .def_property_readonly("name", &Backend::name)
      .def("create_stream",
           [](Backend& self) { return self.create_stream(StreamPriority::kNormal); })
      .def("destroy_stream", &Backend::destroy_stream, py::arg("stream"), NoGil())
      .def("create_event", &Backend::create_event)
      .def("destroy_event", &Backend::destroy_event, py::arg("event"))
      .def("record", &Backend::record, py::arg("event"), py::arg("stream"), NoGil())
      .def("wait", &Backend::wait, py::arg("stream"), py::arg("event"), NoGil())
      .def("is_complete", &Backend::is_complete, py::arg("event"))
      .def(
          "synchronize",
          [](Backend& self, EventHandle event, int timeout_ms) {
            synchronize(self, event, Milliseconds(timeout_ms));
          },
          py::arg("event"), py::arg("timeout_ms") = 60'000, NoGil())
      .def(
          "copy_to_device",
          [](Backend& self, DeviceAddress destination, std::uintptr_t source, std::size_t bytes,
             StreamHandle stream) {
            self.copy_to_device(destination, reinterpret_cast<const void*>(source), bytes, stream);
          },
          py::arg("destination"), py::arg("source"), py::arg("nbytes"), py::arg("stream"), NoGil());

  py::class_<HostBackend, Backend, std::shared_ptr<HostBackend>>(m, "HostBackend")
      .def(py::init([](double bytes_per_second, double latency_us, double jitter_us,
                       std::uint64_t seed) {
             return std::make_shared<HostBackend>(
                 HostOptions{bytes_per_second, latency_us, jitter_us, seed});
           }),
           py::kw_only(), py::arg("bytes_per_second") = 0.0, py::arg("latency_us") = 0.0,
           py::arg("jitter_us") = 0.0, py::arg("seed") = 0)
      .def("fail_at", &HostBackend::fail_at, py::arg("nth_call"))
      .def_property_readonly("calls", &HostBackend::calls)
      .def_property_readonly("queries", &HostBackend::queries)
      .def_property_readonly("locked_bytes", &HostBackend::locked_bytes);

  py::class_<CudaBackend, Backend, std::shared_ptr<CudaBackend>>(m, "CudaBackend")
      .def(py::init<int>(), py::arg("device_index"))
      .def(
          "load_unpack_kernel",
          [](CudaBackend& self, const py::bytes& cubin, const std::string& name, unsigned threads,
             unsigned shared_bytes) {
            const std::string_view bytes = cubin;
            const py::gil_scoped_release released;
            self.load_unpack_kernel(std::as_bytes(std::span(bytes)), name, threads, shared_bytes);
          },
          py::arg("cubin"), py::arg("name"), py::arg("threads"), py::arg("shared_bytes"));
}

// (file, offset in the file, bytes, offset in the image)
using ExtentTuple = std::tuple<SourceFilePtr, std::size_t, std::size_t, std::size_t>;

std::vector<FileExtent> extents_of(const std::vector<ExtentTuple>& tuples) {
  std::vector<FileExtent> extents;
  for (const auto& [file, file_offset, bytes, offset] : tuples) {
    if (!file) throw UsageError("an extent needs a file");
    extents.push_back({file, file_offset, bytes, offset});
  }
  return extents;
}

void bind_files(py::module_& m) {
  py::class_<SourceFile, SourceFilePtr>(m, "SourceFile")
      .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("direct") = true, NoGil())
      .def_property_readonly("path", &SourceFile::path)
      .def_property_readonly("nbytes", &SourceFile::bytes)
      .def_property_readonly("direct", &SourceFile::direct)
      .def_property_readonly("direct_refusal", &SourceFile::direct_refusal)
      .def("fail_at", &SourceFile::fail_at, py::arg("nth_read"), py::arg("error") = EIO)
      .def_property_readonly("reads", &SourceFile::reads);

  py::class_<Image, ImagePtr>(m, "Image")
      .def_property_readonly("nbytes", &Image::bytes)
      .def_property_readonly("locked", &Image::locked)
      .def(
          "read",
          [](const Image& self, std::size_t offset, std::size_t bytes, std::uintptr_t destination) {
            if (offset > self.bytes() || bytes > self.bytes() - offset) {
              throw UsageError(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                               " are not in an image of " + std::to_string(self.bytes()));
            }
            self.read(offset, bytes, reinterpret_cast<std::byte*>(destination));
          },
          py::arg("offset"), py::arg("nbytes"), py::arg("destination"), NoGil());

  py::class_<FileImage, Image, FileImagePtr>(m, "FileImage")
      .def(py::init([](const std::vector<ExtentTuple>& extents, std::size_t bytes,
                       std::uint64_t fingerprint) {
             return std::make_shared<FileImage>(extents_of(extents), bytes, fingerprint);
           }),
           py::arg("extents"), py::arg("nbytes"), py::kw_only(), py::arg("fingerprint") = 0)
      .def_property_readonly("direct", &FileImage::direct)
      .def_property_readonly("proven", &FileImage::proven)
      .def("check", &FileImage::check, NoGil())
      .def(
          "view",
          [](const FileImagePtr& self, std::size_t offset, std::size_t bytes) {
            return FileBytes{self, self->mapped(offset, bytes), bytes};
          },
          py::arg("offset"), py::arg("nbytes"));

  // Said to be writable, so that torch takes it without a warning. It is not: the pages are
  // read-only, and who writes past the tensors' guard is stopped by the machine.
  py::class_<FileBytes>(m, "FileBytes", py::buffer_protocol())
      .def_buffer([](const FileBytes& self) {
        return py::buffer_info(
            const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(self.data)),
            static_cast<py::ssize_t>(self.bytes));
      });
}

// (source address, offset in the image, bytes)
using PieceTuple = std::tuple<std::uintptr_t, std::size_t, std::size_t>;

std::vector<ImagePiece> pieces_of(const std::vector<PieceTuple>& tuples) {
  std::vector<ImagePiece> pieces;
  for (const auto& [source, offset, bytes] : tuples) {
    pieces.push_back({reinterpret_cast<const void*>(source), offset, bytes});
  }
  return pieces;
}

void bind_host_store(py::module_& m) {
  // memoryview(image) keeps the image alive: tensors made over it may outlive every other owner.
  py::class_<HostImage, Image, HostImagePtr>(m, "HostImage", py::buffer_protocol())
      .def_buffer([](HostImage& self) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(self.data()),
                               static_cast<py::ssize_t>(self.bytes()));
      })
      .def_property_readonly(
          "address",
          [](const HostImage& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def(
          "fill",
          [](HostImage& self, const std::vector<PieceTuple>& pieces) {
            self.fill(pieces_of(pieces));
          },
          py::arg("pieces"), NoGil())
      .def(
          "fill_from",
          [](HostImage& self, const std::vector<ExtentTuple>& extents, bool direct) {
            self.fill_from(extents_of(extents), direct ? ReadBy::kDirect : ReadBy::kPageCache);
          },
          py::arg("extents"), py::kw_only(), py::arg("direct") = false, NoGil())
      .def("copy_from", &HostImage::copy_from, py::arg("image"), NoGil())
      .def_property_readonly("shared", &HostImage::shared)
      .def("touch", &HostImage::touch, NoGil())
      .def("drop", &HostImage::drop, py::arg("offset"), py::arg("nbytes"), NoGil())
      .def("lock", &HostImage::lock, NoGil())
      .def("unlock", &HostImage::unlock, NoGil())
      .def("protect", &HostImage::protect, NoGil())
      .def("make_own", &HostImage::make_own, NoGil())
      .def("keep", &HostImage::keep, NoGil());

  py::class_<PiecesImage, Image, std::shared_ptr<PiecesImage>>(m, "PiecesImage")
      .def(py::init([](const std::vector<PieceTuple>& pieces, std::size_t bytes) {
             return std::make_shared<PiecesImage>(pieces_of(pieces), bytes);
           }),
           py::arg("pieces"), py::arg("nbytes"));

  py::class_<Descriptor, std::shared_ptr<Descriptor>>(m, "Descriptor")
      .def(py::init<int>(), py::arg("number"))
      .def_property_readonly("number", &Descriptor::number);

  py::class_<HostStore>(m, "HostStore")
      .def(py::init([](BackendPtr backend, bool huge_pages, unsigned threads) {
             return std::make_unique<HostStore>(std::move(backend),
                                                StoreOptions{huge_pages, threads});
           }),
           py::arg("backend"), py::kw_only(), py::arg("huge_pages") = true, py::arg("threads") = 0U)
      .def("allocate", &HostStore::allocate, py::arg("nbytes"))
      .def(
          "map_shared",
          [](HostStore& self, const std::shared_ptr<Descriptor>& memory, std::size_t offset,
             std::size_t bytes) {
            if (!memory) throw UsageError("shared memory needs a descriptor");
            return self.map_shared({memory, offset}, bytes);
          },
          py::arg("memory"), py::arg("offset"), py::arg("nbytes"))
      .def_property_readonly("mapped_bytes", &HostStore::mapped_bytes)
      .def_property_readonly("locked_bytes", &HostStore::locked_bytes);

  m.def(
      "fingerprint",
      [](std::uintptr_t address, std::size_t bytes, unsigned threads) {
        return fingerprint(reinterpret_cast<const void*>(address), bytes, threads);
      },
      py::arg("address"), py::arg("nbytes"), py::arg("threads") = 8U, NoGil());
}

// (offset, bytes, whether it is bf16)
using TensorTuple = std::tuple<std::size_t, std::size_t, bool>;

std::vector<PackedTensor> packed_tensors(const std::vector<TensorTuple>& tuples) {
  std::vector<PackedTensor> tensors;
  for (const auto& [offset, bytes, bf16] : tuples) tensors.push_back({offset, bytes, bf16});
  return tensors;
}

template <class Number>
bool take_numbers(const py::buffer_info& info, std::vector<std::uint32_t>& numbers) {
  if (!info.item_type_is_equivalent_to<Number>()) return false;
  const auto* at = static_cast<const std::byte*>(info.ptr);
  for (py::ssize_t i = 0; i < info.shape[0]; ++i, at += info.strides[0]) {
    Number number;
    std::memcpy(&number, at, sizeof(number));
    numbers.push_back(static_cast<std::uint32_t>(number));
  }
  return true;
}

std::vector<std::uint32_t> numbers_of(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  std::vector<std::uint32_t> numbers;
  if (info.ndim != 1 ||
      !(take_numbers<std::uint16_t>(info, numbers) || take_numbers<std::uint32_t>(info, numbers) ||
        take_numbers<std::int32_t>(info, numbers))) {
    throw UsageError("escapes are one row of 16-bit or 32-bit numbers");
  }
  return numbers;
}

py::list run_tuples(const PackingPlan& plan) {
  py::list tuples;
  for (const PlannedRun& run : plan.runs()) {
    const bool plain = run.first_tile == PlannedRun::kNoTile;
    tuples.append(py::make_tuple(
        static_cast<std::uint32_t>(run.codec), run.plain_offset, run.plain_bytes, run.sections,
        plain ? -1 : static_cast<py::ssize_t>(run.first_tile), run.escapes));
  }
  return tuples;
}

void bind_packing(py::module_& m) {
  py::class_<PackingPlan>(m, "PackingPlan")
      .def(py::init([](std::size_t plain_bytes, const std::vector<TensorTuple>& tensors,
                       const py::buffer& escapes) {
             return PackingPlan(plain_bytes, packed_tensors(tensors), numbers_of(escapes));
           }),
           py::arg("plain_bytes"), py::arg("tensors"), py::arg("escapes"))
      .def_property_readonly("packed_bytes", &PackingPlan::packed_bytes)
      .def_property_readonly("runs", &run_tuples)
      .def(
          "write_heads",
          [](const PackingPlan& self, std::uintptr_t address,
             const std::vector<std::uint64_t>& checksums) {
            self.write_heads(reinterpret_cast<std::byte*>(address), checksums);
          },
          py::arg("address"), py::arg("checksums"), NoGil());

  py::class_<Packer>(m, "Packer")
      .def(py::init([](std::uintptr_t address, std::size_t plain_bytes,
                       const std::vector<TensorTuple>& tensors, unsigned threads) {
             return std::make_unique<Packer>(reinterpret_cast<const std::byte*>(address),
                                             plain_bytes, packed_tensors(tensors), threads);
           }),
           py::arg("address"), py::arg("plain_bytes"), py::arg("tensors"), py::arg("threads") = 0U,
           NoGil())
      .def_property_readonly("plan", &Packer::plan, py::return_value_policy::reference_internal)
      .def_property_readonly("packed_bytes",
                             [](const Packer& self) { return self.plan().packed_bytes(); })
      .def(
          "write",
          [](const Packer& self, std::uintptr_t address) {
            self.write(reinterpret_cast<std::byte*>(address));
          },
          py::arg("address"), NoGil());

  m.def(
      "unpack_chunk",
      [](std::uintptr_t chunk, std::size_t chunk_bytes, std::uintptr_t image,
         std::size_t image_bytes, unsigned threads) {
        return unpack_chunk(reinterpret_cast<const std::byte*>(chunk), chunk_bytes,
                            reinterpret_cast<std::byte*>(image), image_bytes, threads);
      },
      py::arg("chunk"), py::arg("chunk_bytes"), py::arg("image"), py::arg("image_bytes"),
      py::arg("threads") = 1U, NoGil());

  py::class_<PackedImage, Image, PackedImagePtr>(m, "PackedImage")
      .def(py::init<ImagePtr>(), py::arg("stored").none(false), NoGil())
      .def_property_readonly("stored", &PackedImage::stored)
      .def_property_readonly("plain_bytes", &PackedImage::plain_bytes)
      .def_property_readonly("largest_chunk",
                             [](const PackedImage& self) { return self.packing()->largest_chunk; })
      .def_property_readonly("plain_fingerprint", &PackedImage::plain_fingerprint)
      .def(
          "unpack",
          [](const PackedImage& self, std::size_t offset, std::size_t bytes,
             std::uintptr_t destination, unsigned threads) {
            self.unpack(offset, bytes, reinterpret_cast<std::byte*>(destination), threads);
          },
          py::arg("offset"), py::arg("nbytes"), py::arg("destination"), py::arg("threads") = 0U,
          NoGil());
}

void bind_ring(py::module_& m) {
  py::class_<PinnedRing>(m, "PinnedRing")
      .def(py::init<const BackendPtr&, std::size_t, std::size_t>(), py::arg("backend"),
           py::arg("chunks"), py::arg("chunk_bytes"))
      .def_property_readonly("size", &PinnedRing::size)
      .def_property_readonly("locked_bytes", &PinnedRing::locked_bytes)
      .def_property_readonly("counts",
                             [](const PinnedRing& self) {
                               const auto counts = self.counts();
                               return std::make_tuple(counts.free, counts.checked_out,
                                                      counts.in_flight);
                             })
      .def(
          "check_out",
          [](PinnedRing& self, int timeout_ms) {
            const auto chunk = self.check_out(Milliseconds(timeout_ms));
            return std::make_tuple(chunk.index, reinterpret_cast<std::uintptr_t>(chunk.data));
          },
          py::arg("timeout_ms") = 60'000, NoGil())
      .def(
          "send",
          [](PinnedRing& self, std::size_t index, StreamHandle stream) {
            self.send({nullptr, index}, stream);
          },
          py::arg("index"), py::arg("stream"), NoGil())
      .def(
          "give_back",
          [](PinnedRing& self, std::size_t index) { self.give_back({nullptr, index}); },
          py::arg("index"));
}

void bind_prefetcher(py::module_& m) {
  py::class_<PrefetchStats>(m, "PrefetchStats")
      .def_readonly("acquires", &PrefetchStats::acquires)
      .def_readonly("cold", &PrefetchStats::cold)
      .def_readonly("fetches", &PrefetchStats::fetches)
      .def_readonly("bytes_fetched", &PrefetchStats::bytes_fetched)
      .def_readonly("invalidations", &PrefetchStats::invalidations)
      .def_readonly("failures", &PrefetchStats::failures);

  // Its destructor joins threads that may want the interpreter's lock.
  py::class_<Prefetcher>(m, "Prefetcher", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const BackendPtr& backend, const std::vector<DeviceAddress>& slots,
                       std::size_t slot_bytes, const py::object&, int depth,
                       std::size_t ring_chunks, std::size_t ring_chunk_bytes, unsigned threads,
                       int timeout_ms, const std::vector<DeviceAddress>& staging,
                       std::size_t staging_bytes, std::size_t least_stretch) {
             return std::make_unique<Prefetcher>(backend, slots, slot_bytes,
                                                 PrefetchOptions{depth,
                                                                 least_stretch,
                                                                 {ring_chunks,
                                                                  ring_chunk_bytes,
                                                                  threads,
                                                                  Milliseconds(timeout_ms),
                                                                  {staging, staging_bytes}}});
           }),
           // Its destructor waits for copies into the slots: their owner must live until then,
           // in whatever order a garbage collection takes things apart.
           py::keep_alive<1, 5>(), py::arg("backend"), py::arg("slots"), py::arg("slot_bytes"),
           py::arg("owner"), py::kw_only(), py::arg("depth"),
           py::arg("ring_chunks") = EngineOptions{}.ring_chunks,
           py::arg("ring_chunk_bytes") = EngineOptions{}.ring_chunk_bytes, py::arg("threads") = 0U,
           py::arg("timeout_ms") = 60'000, py::arg("staging") = std::vector<DeviceAddress>{},
           py::arg("staging_bytes") = 0, py::arg("least_stretch") = PrefetchOptions{}.least_stretch)
      .def(
          "add_unit",
          [](Prefetcher& self, ImagePtr image,
             const std::vector<std::pair<DeviceAddress, std::size_t>>& home, bool as_stored,
             bool filled) {
            Home place{{}, as_stored, filled};
            for (const auto& [address, bytes] : home) place.pieces.push_back({address, bytes});
            return self.add_unit(std::move(image), place);
          },
          py::arg("image"), py::kw_only(),
          py::arg("home") = std::vector<std::pair<DeviceAddress, std::size_t>>{},
          py::arg("as_stored") = false, py::arg("filled") = false, NoGil())
      .def("home_filled", &Prefetcher::home_filled, py::arg("unit"), NoGil())
      .def("set_order", &Prefetcher::set_order, py::arg("units"), NoGil())
      .def("order", &Prefetcher::order, NoGil())
      .def("prefetch", &Prefetcher::prefetch, NoGil())
      .def(
          "acquire",
          [](Prefetcher& self, int unit, StreamHandle stream) {
            const Acquired acquired = self.acquire(unit, stream);
            return std::pair(acquired.slot, acquired.generation);
          },
          py::arg("unit"), py::arg("stream"), NoGil())
      .def("release", &Prefetcher::release, py::arg("unit"), py::arg("stream"),
           py::arg("generation"), NoGil())
      .def("abandon", &Prefetcher::abandon, py::arg("stream"), NoGil())
      .def("invalidate", &Prefetcher::invalidate, py::arg("unit"), NoGil())
      .def("replace_unit", &Prefetcher::replace_unit, py::arg("unit"), py::arg("image"), NoGil())
      .def("set_poison", &Prefetcher::set_poison, py::arg("value"))
      .def("close", &Prefetcher::close, NoGil())
      .def("stats", &Prefetcher::stats, NoGil())
      .def("reset_stats", &Prefetcher::reset_stats, NoGil())
      .def("recent_events", &Prefetcher::recent_events, NoGil())
      .def_property_readonly("copy_stream", &Prefetcher::copy_stream)
      .def_property_readonly("unpack_stream", &Prefetcher::unpack_stream)
      .def_property_readonly("ring_bytes", py::cpp_function(&Prefetcher::ring_bytes, NoGil()))
      .def_property_readonly("slot_count", &Prefetcher::slot_count)
      .def_property_readonly("unit_count", py::cpp_function(&Prefetcher::unit_count, NoGil()));
}

void bind_uploader(py::module_& m) {
  py::class_<Uploader>(m, "Uploader", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const BackendPtr& backend, std::size_t ring_chunks,
                       std::size_t ring_chunk_bytes, unsigned threads, int timeout_ms) {
             return std::make_unique<Uploader>(
                 backend,
                 EngineOptions{ring_chunks, ring_chunk_bytes, threads, Milliseconds(timeout_ms)});
           }),
           NoGil(), py::arg("backend"), py::kw_only(),
           py::arg("ring_chunks") = EngineOptions{}.ring_chunks,
           py::arg("ring_chunk_bytes") = EngineOptions{}.ring_chunk_bytes, py::arg("threads") = 0U,
           py::arg("timeout_ms") = 60'000)
      .def("start", &Uploader::start, py::arg("image").none(false), py::arg("address"),
           py::arg("wait_for_stream"), NoGil())
      .def("wait", &Uploader::wait, py::arg("stream"), NoGil())
      .def("close", &Uploader::close, NoGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The streaming engine of wanoffload: host store, pinned ring, copy engine, slots.";
  bind_errors(m);
  bind_backends(m);
  bind_files(m);
  bind_host_store(m);
  bind_packing(m);
  bind_ring(m);
  bind_prefetcher(m);
  bind_uploader(m);
}
