// isobn_kernels._cuda: the CUDA backend. A module of its own, beside _C: where nvcc fails, or the module does not load,
// the CPU kernels are still there.

#include "../arguments.h"
#include "cuda.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace isobn;

namespace {

float* floats(Address address) { return reinterpret_cast<float*>(address); }

cuda::Where where(int device, Address stream) { return {device, pointer(stream)}; }

std::map<std::string, std::string> build_info() {
  return {{"nvcc", ISOBN_NVCC}, {"targets", ISOBN_TARGETS}, {"built", ISOBN_BUILT}, {"commit", ISOBN_COMMIT}};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA backend of isobn_kernels; private.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  export_numbers(module);

  module.def(
      "workspace_bytes", [](int function, int64_t D) { return cuda::workspace_bytes(Function(function), D); },
      "function"_a, "D"_a);

  module.def(
      "train_forward",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address running_cov,
         Address running_std, Address num_batches_tracked, Address scale, Address saved_scale, Address out,
         double momentum, double eps, double beta, bool bias_correction, int device, Address stream,
         Address workspace) {
        cuda::train_forward(strided(x, dtype, row_stride, col_stride), N, D,
                            state(running_cov, running_std, num_batches_tracked), floats(scale), floats(saved_scale),
                            pointer(out), {momentum, eps, beta, bias_correction}, where(device, stream),
                            pointer(workspace));
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "running_cov"_a, "running_std"_a,
      "num_batches_tracked"_a, "scale"_a, "saved_scale"_a, "out"_a, "momentum"_a, "eps"_a, "beta"_a,
      "bias_correction"_a, "device"_a, "stream"_a, "workspace"_a);

  module.def(
      "compute_scale",
      [](int /* the state is float32 */, int64_t D, Address running_cov, Address running_std,
         Address num_batches_tracked, Address scale, double momentum, double eps, double beta, bool bias_correction,
         int device, Address stream, Address workspace) {
        cuda::compute_scale(D, state(running_cov, running_std, num_batches_tracked), floats(scale),
                            {momentum, eps, beta, bias_correction}, where(device, stream), pointer(workspace));
      },
      nogil, "dtype"_a, "D"_a, "running_cov"_a, "running_std"_a, "num_batches_tracked"_a, "scale"_a, "momentum"_a,
      "eps"_a, "beta"_a, "bias_correction"_a, "device"_a, "stream"_a, "workspace"_a);

  module.def(
      "apply_scale",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address scale, Address out,
         int device, Address stream) {
        cuda::apply_scale(strided(x, dtype, row_stride, col_stride), N, D, floats(scale), pointer(out),
                          where(device, stream));
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "scale"_a, "out"_a, "device"_a,
      "stream"_a);

  module.def(
      "train_backward",
      [](Address dout, int64_t dout_row_stride, int64_t dout_col_stride, Address x, int dtype, int64_t row_stride,
         int64_t col_stride, int64_t N, int64_t D, Address running_cov, Address running_std,
         Address num_batches_tracked, Address scale, Address dx, double momentum, double eps, double beta,
         bool bias_correction, int device, Address stream, Address workspace) {
        cuda::train_backward(strided(dout, dtype, dout_row_stride, dout_col_stride),
                             strided(x, dtype, row_stride, col_stride), N, D,
                             state(running_cov, running_std, num_batches_tracked), floats(scale), pointer(dx),
                             {momentum, eps, beta, bias_correction}, where(device, stream), pointer(workspace));
      },
      nogil, "dout"_a, "dout_row_stride"_a, "dout_col_stride"_a, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a,
      "N"_a, "D"_a, "running_cov"_a, "running_std"_a, "num_batches_tracked"_a, "scale"_a, "dx"_a, "momentum"_a,
      "eps"_a, "beta"_a, "bias_correction"_a, "device"_a, "stream"_a, "workspace"_a);

  module.def(
      "one_launch", [](int dtype, int64_t D, int device) { return cuda::one_launch(DType(dtype), D, device); }, nogil,
      "dtype"_a, "D"_a, "device"_a);
  module.def("probe", &cuda::probe, "What fails when an empty kernel is run on a device, or an empty string.", nogil,
             "device"_a);
  module.def("driver_version", &cuda::driver_version);
  module.def("runtime_version", &cuda::runtime_version);
  module.def("build_info", &build_info);
  module.attr("MAX_ROWS") = cuda::kMaxRows;
  module.attr("MAX_FEATURES") = cuda::kMaxFeatures;
}
