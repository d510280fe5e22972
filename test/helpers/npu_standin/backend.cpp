// SPDX-License-Identifier: BSD-3-Clause
// The device "npu" of torch_npu.py, over this machine's memory. Every operator that has no function here is computed by
// the CPU's, on copies.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current_device = 0;

// --- which operators were called, and how often ---

std::mutex calls_mutex;
std::map<std::string, int64_t> calls;
thread_local bool in_fallback = false;  // whose copies are no calls

void count(const std::string& name, const Tensor& tensor) {
  if (in_fallback) return;
  std::lock_guard<std::mutex> lock(calls_mutex);
  ++calls[name + " " + c10::toString(tensor.scalar_type())];
}

c10::List<std::string> take_calls() {
  std::lock_guard<std::mutex> lock(calls_mutex);
  c10::List<std::string> lines;
  for (const auto& call : calls) lines.push_back(call.first + " " + std::to_string(call.second));
  calls.clear();
  return lines;
}

// --- memory ---

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, Device(c10::DeviceType::PrivateUse1, current_device)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory)

// --- devices and streams: every operator is done when it returns, so streams and events have nothing to do ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  Device getDevice() const override { return Device(type(), current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "npu ", int(device.index()), " does not exist");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Random numbers are the CPU's, so that a training on it draws the same masks.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { current_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::GetAllocator(at::kCPU); }
};

// --- operators ---

// The tensor's memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

// A copy in the device's memory of what the CPU has computed.
Tensor to_npu(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  Tensor result = at::empty(tensor.sizes(), tensor.options().device(Guard().getDevice()));
  on_cpu(result).copy_(tensor);
  return result;
}

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using MaybeDevice = std::optional<Device>;
using Format = std::optional<at::MemoryFormat>;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, MaybeDevice device, std::optional<bool>, Format format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, MaybeDevice device,
                     std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.device() != to.device()) count(from.is_cpu() ? "copy to the npu" : "copy from the npu", from);
  else count("aten::copy_", from);
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, Format format) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(size);
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), tensor->storage_offset());
  if (self.storage().nbytes() < bytes) {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(data));
    self.storage().set_nbytes(bytes);
  }
  if (format) tensor->empty_tensor_restride(*format);
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Scalar read(const Tensor& self) {
  count("read by the host (_local_scalar_dense)", self);
  return on_cpu(self).item();
}

Tensor as_strided(const Tensor& self, at::SymIntArrayRef size, at::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

Tensor view(const Tensor& self, at::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::set_(self, storage, offset, size, stride);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

// torch gives a device of this kind convolutions of its own.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::SymIntArrayRef stride,
                   at::SymIntArrayRef padding, at::SymIntArrayRef dilation, bool transposed,
                   at::SymIntArrayRef output_padding, c10::SymInt groups) {
  count("aten::convolution_overrideable", input);
  std::optional<Tensor> cpu_bias = bias.has_value() ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return to_npu(at::convolution_symint(on_cpu(input), on_cpu(weight), cpu_bias, stride, padding, dilation, transposed,
                                       output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, at::SymIntArrayRef stride,
    at::SymIntArrayRef padding, at::SymIntArrayRef dilation, bool transposed, at::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  count("aten::convolution_backward_overrideable", input);
  std::vector<c10::SymInt> bias_size{weight.sym_size(0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), at::SymIntArrayRef(bias_size), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {to_npu(of_input), to_npu(of_weight), to_npu(of_bias)};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (const auto& argument : arguments) {
    if (argument.isTensor() && argument.toTensor().defined()) {
      count(c10::toString(op.schema().operator_name()), argument.toTensor());
      break;
    }
    if (argument.isTensorList() && !argument.toTensorList().empty()) {
      count(c10::toString(op.schema().operator_name()), argument.toTensorList().get(0));
      break;
    }
  }
  const bool nested = std::exchange(in_fallback, true);
  at::native::cpu_fallback(op, stack);
  in_fallback = nested;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("resize_", resize);
  library.impl("_local_scalar_dense", read);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macro's name for it
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
}

TORCH_LIBRARY(npu_standin, library) {
  library.def("take_calls() -> str[]", take_calls);
}

struct Registration {
  Registration() { at::RegisterPrivateUse1HooksInterface(new Hooks); }
} registration;

}  // namespace
