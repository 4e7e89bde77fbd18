// Puts host memory and threads behind torch's device type "cuda", in a build of torch without CUDA.
#include <pybind11/pybind11.h>

#include "ops.hpp"

namespace py = pybind11;
using namespace emulated;

namespace at {
using EmulatedHooks = ::emulated::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatedHooks)
}  // namespace at

namespace {

c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
const bool allocator_is_set = (c10::SetAllocator(c10::DeviceType::CUDA, &Memory::the()), true);

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &emulated::empty_strided);
  m.impl("copy_", &emulated::copy_);
  m.impl("resize_", &emulated::resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("record_stream", &emulated::record_stream);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
}

bool gives_views(const c10::FunctionSchema& schema) {
  for (const auto& value : schema.returns())
    if (value.alias_info() != nullptr && !value.alias_info()->isWrite()) return true;
  return false;
}

// The processor's own kernels also where torch has a composite beside them, which gives other bits.
void take_kernels() {
  static auto* const library = new torch::Library(torch::Library::IMPL, "aten", kDevice, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op || name.getNamespace() != "aten" || gives_views(op->schema())) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(kDevice)) continue;
    const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

py::dict stats() {
  const MemoryStats now = Memory::the().stats();
  py::dict found;
  found["allocated"] = now.allocated;
  found["reserved"] = now.reserved;
  found["peak_allocated"] = now.peak_allocated;
  found["peak_reserved"] = now.peak_reserved;
  found["device_allocs"] = now.device_allocs;
  return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  take_kernels();
  m.def("current_stream", [] { return current(); });
  m.def("set_current_stream", [](std::int64_t id) { current() = id; });
  m.def("synchronize", [] { Streams::all().drain(); }, Free());
  m.def("empty_cache", [] { Memory::the().empty_cache(); }, Free());
  m.def("reset_peaks", [] { Memory::the().reset_peaks(); });
  m.def("limit", [](std::size_t nbytes) { Memory::the().limit(nbytes); });
  m.def("stats", &stats);
  m.def("register_host", [](std::uintptr_t at, std::size_t nbytes) { return Registered::all().add(at, nbytes); });
  m.def("unregister_host", [](std::uintptr_t at) { return Registered::all().remove(at); });
  m.def("races", [] { return races.exchange(0); });
}
