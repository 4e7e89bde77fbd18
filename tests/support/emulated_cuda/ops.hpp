// torch's operators on the device: the processor's, on the same bytes.
//
// [Note: order] An operator begins when its stream has come so far, and what it computed is there after the lag, in the
// stream's order. Who uses it on another stream, or on the host, without waiting finds the old bytes. What it read has to
// be there still when it ends: a change by another stream counts as a race.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "guard.hpp"

namespace emulated {

constexpr auto kDevice = c10::DispatchKey::CUDA;

inline bool is_ours(const at::Tensor& t) { return t.defined() && t.device().is_cuda(); }

// The processor's view of a device tensor's bytes, now.
inline at::Tensor on_host(const at::Tensor& t) {
  const auto& storage = t.storage();
  c10::Storage bytes(
      c10::Storage::use_byte_size_t(), storage.nbytes(), c10::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU)), nullptr,
      false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  if (t.is_conj()) made._set_conj(true);
  if (t.is_neg()) made._set_neg(true);
  return made;
}

inline void publish(const at::Tensor& target, const at::Tensor& value, int lag_us) {
  current_queue().submit(
      [to = on_host(target), value] {
        const at::AutoDispatchBelowADInplaceOrView below;
        to.copy_(value);
      },
      lag_us);
}

inline at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &Memory::the(), c10::DispatchKeySet(kDevice), c10::dtype_or_default(dtype));
}

inline at::Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &Memory::the(), c10::DispatchKeySet(kDevice), c10::dtype_or_default(dtype), format);
}

inline at::Tensor to_device(const at::Tensor& value) {
  at::Tensor made = empty_strided(value.sizes(), value.strides(), value.scalar_type(), {}, {}, {});
  publish(made, value, 0);
  return made;
}

inline std::atomic<std::size_t> races{0};

// Once the stream gets there the tensor's bytes are what they are now, or somebody did not wait for its reader.
inline void watch(const at::Tensor& read, int lag_us) {
  const at::Tensor now = on_host(read);
  current_queue().submit(
      [now, before = now.clone(at::MemoryFormat::Contiguous)] {
        const at::AutoDispatchBelowADInplaceOrView below;
        if (std::memcmp(now.contiguous().const_data_ptr(), before.const_data_ptr(), before.nbytes()) != 0) ++races;
      },
      lag_us);
}

inline bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  return a.dtype() == b.dtype() && a.is_contiguous() && b.is_contiguous() && a.sizes() == b.sizes();
}

// As cudaMemcpyAsync: of memory that the driver knows the bytes are taken, or written, when the stream gets there.
inline void copy_bytes(void* to, const void* from, std::size_t nbytes) {
  current_queue().submit([to, from, nbytes] { std::memcpy(to, from, nbytes); }, lag(copy_lag_us));
}

inline at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (self.numel() == 0) return self;
  const bool plain = same_bytes(self, src) && self.is_cuda() != src.is_cuda();
  const at::Tensor& host = self.is_cuda() ? src : self;
  const bool known = plain && Registered::all().has(host.const_data_ptr(), host.nbytes());
  if (known) {
    copy_bytes(self.mutable_data_ptr(), src.const_data_ptr(), self.nbytes());
    if (!non_blocking) current_queue().drain();
    return self;
  }
  current_queue().drain();
  const at::Tensor value = src.is_cuda() ? on_host(src) : src;
  if (!self.is_cuda()) {
    self.copy_(value);
  } else {
    at::Tensor taken = at::empty(self.sizes(), self.options().device(c10::kCPU));
    taken.copy_(value);
    publish(self, taken, lag(copy_lag_us));
  }
  return self;
}

inline const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  current_queue().drain();
  return at::native::resize_(self, size, format);
}

inline at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, std::int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

inline void record_stream(at::Tensor& self, c10::Stream of) {
  if (self.storage().data()) Memory::the().used_on(self.storage().mutable_data(), of.id());
}

// One operator's arguments on the processor's side: what it reads in place, what it writes on a copy.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {
    const auto& arguments = op.schema().arguments();
    first_ = stack.size() - arguments.size();
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      const auto* written = arguments[i].alias_info();
      inputs_.push_back(stack[first_ + i]);
      stack[first_ + i] = take(stack[first_ + i], written != nullptr && written->isWrite());
    }
  }

  void run() {
    op_.callBoxed(stack_);
    int lag_us = lag(compute_lag_us);
    for (const at::Tensor& read : read_) watch(read, std::exchange(lag_us, 0));
    for (auto& [ours, theirs] : written_) {
      if (ours.sizes() != theirs.sizes()) resize_(ours, theirs.sizes(), {});
      publish(ours, theirs, 0);
    }
    const auto& returns = op_.schema().returns();
    const std::size_t at = stack_.size() - returns.size();
    for (std::size_t i = 0; i < returns.size(); ++i) stack_[at + i] = give(stack_[at + i]);
  }

 private:
  c10::IValue take(const c10::IValue& value, bool write) {
    if (value.isTensor()) return taken(value.toTensor(), write);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(taken(t, write));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(taken(*t, write)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
    return value;
  }

  at::Tensor taken(const at::Tensor& t, bool write) {
    if (!t.defined()) return t;
    if (!is_ours(t)) {
      TORCH_CHECK(
          t.dim() == 0 || takes_the_hosts(), "Expected all tensors to be on the same device, but found at least two devices, ",
          "cuda:0 and cpu! (emulated: ", op_.schema().operator_name().name, ")");
      return t;
    }
    if (!write) {
      read_.push_back(t);
      return on_host(t);
    }
    at::Tensor copy = at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kCPU));
    copy.copy_(on_host(t));
    written_.emplace_back(t, copy);
    return copy;
  }

  bool takes_the_hosts() const {  // indices may lie there
    return op_.schema().operator_name().name.find("index") != std::string::npos && first_is_ours();
  }

  bool first_is_ours() const { return inputs_.front().isTensor() && is_ours(inputs_.front().toTensor()); }

  c10::IValue give(const c10::IValue& value) {
    if (value.isTensor()) return given(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(given(t));
      return list;
    }
    return value;
  }

  at::Tensor given(const at::Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [ours, theirs] : written_)
      if (theirs.is_same(t)) return ours;
    for (const c10::IValue& input : inputs_)
      if (input.isTensor() && input.toTensor().is_same(t)) return t;  // a tensor of the processor's that it was given
    return to_device(t);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::size_t first_;
  std::vector<c10::IValue> inputs_;
  std::vector<at::Tensor> read_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

// On CUDA torch has softmax turn 16 bits into fp32 by itself, which the processor's kernels cannot do: before, or behind.
inline std::optional<c10::ScalarType> widen_softmax(const std::string& name, torch::jit::Stack& stack) {
  const std::size_t end = stack.size();
  if ((name == "aten::_softmax" || name == "aten::_log_softmax") && stack[end - 1].toBool()) {
    stack[end - 3] = stack[end - 3].toTensor().to(c10::kFloat);
    stack[end - 1] = false;
  } else if (name == "aten::_softmax_backward_data" || name == "aten::_log_softmax_backward_data") {
    const auto wanted = stack[end - 1].toScalarType(), given = stack[end - 4].toTensor().scalar_type();
    stack[end - 1] = given;
    if (wanted != given) return wanted;
  }
  return std::nullopt;
}

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto narrow = widen_softmax(op.schema().name(), *stack);
  current_queue().drain();
  Call(op, *stack).run();
  if (narrow) stack->back() = stack->back().toTensor().to(*narrow);
}

}  // namespace emulated
