// isobn_kernels._cuda: the CUDA backend, given addresses (Tensor.data_ptr()), sizes, strides, a device and a stream.
//
// A module of its own, beside _C: where nvcc fails, or the module does not load, the CPU kernels are still there.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cuda.h"

namespace py = pybind11;
using namespace isobn::cuda;

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
float* floats(Address address) { return reinterpret_cast<float*>(address); }

Strided strided(Address data, int dtype, int64_t row_stride, int64_t col_stride) {
  return {pointer(data), DType(dtype), row_stride, col_stride};
}

State state(Address running_cov, Address running_std, Address num_batches_tracked) {
  return {floats(running_cov), floats(running_std), reinterpret_cast<int64_t*>(num_batches_tracked)};
}

Where where(int device, Address stream) { return {device, pointer(stream)}; }

std::map<std::string, std::string> build_info() {
  return {{"nvcc", ISOBN_NVCC}, {"targets", ISOBN_TARGETS}, {"built", ISOBN_BUILT}, {"commit", ISOBN_COMMIT}};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA backend of isobn_kernels; private.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  module.def("workspace_bytes", [](int function, int64_t D) { return workspace_bytes(Function(function), D); });

  module.def(
      "train_forward",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address running_cov,
         Address running_std, Address num_batches_tracked, Address scale, Address saved_scale, Address out,
         double momentum, double eps, double beta, bool bias_correction, int device, Address stream,
         Address workspace) {
        train_forward(strided(x, dtype, row_stride, col_stride), N, D,
                      state(running_cov, running_std, num_batches_tracked), floats(scale), floats(saved_scale),
                      pointer(out), {momentum, eps, beta, bias_correction}, where(device, stream), pointer(workspace));
      },
      nogil);

  module.def(
      "compute_scale",
      [](int, int64_t D, Address running_cov, Address running_std, Address num_batches_tracked, Address scale,
         double momentum, double eps, double beta, bool bias_correction, int device, Address stream,
         Address workspace) {
        compute_scale(D, state(running_cov, running_std, num_batches_tracked), floats(scale),
                      {momentum, eps, beta, bias_correction}, where(device, stream), pointer(workspace));
      },
      nogil);

  module.def(
      "apply_scale",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address scale, Address out,
         int device, Address stream) {
        apply_scale(strided(x, dtype, row_stride, col_stride), N, D, floats(scale), pointer(out),
                    where(device, stream));
      },
      nogil);

  module.def(
      "train_backward",
      [](Address dout, int64_t dout_row_stride, int64_t dout_col_stride, Address x, int dtype, int64_t row_stride,
         int64_t col_stride, int64_t N, int64_t D, Address running_cov, Address running_std,
         Address num_batches_tracked, Address scale, Address dx, double momentum, double eps, double beta,
         bool bias_correction, int device, Address stream, Address workspace) {
        train_backward(strided(dout, dtype, dout_row_stride, dout_col_stride),
                       strided(x, dtype, row_stride, col_stride), N, D,
                       state(running_cov, running_std, num_batches_tracked), floats(scale), pointer(dx),
                       {momentum, eps, beta, bias_correction}, where(device, stream), pointer(workspace));
      },
      nogil);

  module.def(
      "one_launch", [](int dtype, int64_t D, int device) { return one_launch(DType(dtype), D, device); }, nogil);
  module.def("probe", &probe, "What fails when an empty kernel is run on a device, or an empty string.", nogil);
  module.def("driver_version", &driver_version);
  module.def("runtime_version", &runtime_version);
  module.def("build_info", &build_info);
  module.attr("MAX_ROWS") = kMaxRows;
  module.attr("MAX_FEATURES") = kMaxFeatures;
}
