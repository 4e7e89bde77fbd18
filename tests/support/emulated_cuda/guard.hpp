// What torch asks of a device: current device and stream, streams, events.
#pragma once

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.hpp"
#include "streams.hpp"

namespace emulated {

inline c10::Device device() { return {c10::DeviceType::CUDA, 0}; }
inline c10::Stream stream(std::int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Event = std::shared_ptr<Moment>;

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device wanted) const override { TORCH_CHECK(wanted.index() <= 0, "there is one emulated device"); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(Streams::all().make()); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(Streams::all().make()); }
  c10::Stream exchangeStream(c10::Stream wanted) const override {
    const auto before = stream(current());
    current() = wanted.id();
    return before;
  }
  bool queryStream(const c10::Stream& of) const override { return Streams::all().queue(of.id()).idle(); }
  void synchronizeStream(const c10::Stream& of) const override { Streams::all().queue(of.id()).drain(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { Streams::all().drain(); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& of) const override {
    Memory::the().used_on(data.get(), of.id());
  }

  void record(void** event, const c10::Stream& of, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = Streams::all().queue(of.id()).mark();
  }
  void block(void* event, const c10::Stream& of) const override {
    if (event == nullptr) return;
    Streams::all().queue(of.id()).submit([moment = *static_cast<Event*>(event)] { moment->wait(); });
  }
  bool queryEvent(void* event) const override { return event == nullptr || (*static_cast<Event*>(event))->has_come(); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) (*static_cast<Event*>(event))->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(queryEvent(begin) && queryEvent(end), "CUDA error: device not ready");
    const auto span = (*static_cast<Event*>(end))->at() - (*static_cast<Event*>(begin))->at();
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return device(); }
  void deviceSynchronize(c10::DeviceIndex) const override { Streams::all().drain(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &Memory::the(); }
};

}  // namespace emulated
