// bindings/cuda.cpp for CPU tensors: torch then takes the GPU's path on a machine without one.
#define USE_CUDA 1
#include "../../bindings/common.h"

namespace {
int current_device = 0;  // of every tensor
}

// Stand-ins for what a CUDA torch does; this library binds to its own (-Bsymbolic).
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int);  // the real one allocates too
  return 0;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  delete reinterpret_cast<int*>(guard);
  return 0;
}
extern "C" AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* device) {
  *device = current_device;
  return 0;
}
extern "C" __attribute__((visibility("default"))) void fake_set_device(int device) { current_device = device; }

#define CUDA CPU  // the dispatch key that the ops are registered for
#include "../../bindings/cuda.cpp"
