// What torch without CUDA lacks to hold CUDA tensors: a device guard, which here guards nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::Stream;

const Device FIRST(DeviceType::CUDA, 0);

struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return FIRST; }
  Device getDevice() const override { return FIRST; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  // the autograd engine would start a thread for each, and no test could fork
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
