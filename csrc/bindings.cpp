// isobn_kernels._C: the CPU backend.

#include "arguments.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace isobn;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", "g++-compatible " __VERSION__},
      {"openmp", std::to_string(_OPENMP)},
      {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)},
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The CPU backend of isobn_kernels; private.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  export_numbers(module);

  module.def(
      "workspace_bytes",
      [](int function, int dtype, int64_t N, int64_t D, int threads) {
        return cpu::workspace_bytes(Function(function), DType(dtype), N, D, threads);
      },
      "function"_a, "dtype"_a, "N"_a, "D"_a, "threads"_a);

  module.def(
      "train_forward",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address running_cov,
         Address running_std, Address num_batches_tracked, Address scale, Address saved_scale, Address out,
         double momentum, double eps, double beta, bool bias_correction, int threads, Address workspace) {
        cpu::train_forward(strided(x, dtype, row_stride, col_stride), N, D,
                           state(running_cov, running_std, num_batches_tracked), pointer(scale), pointer(saved_scale),
                           pointer(out), {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "running_cov"_a, "running_std"_a,
      "num_batches_tracked"_a, "scale"_a, "saved_scale"_a, "out"_a, "momentum"_a, "eps"_a, "beta"_a,
      "bias_correction"_a, "threads"_a, "workspace"_a);

  module.def(
      "compute_scale",
      [](int dtype, int64_t D, Address running_cov, Address running_std, Address num_batches_tracked, Address scale,
         double momentum, double eps, double beta, bool bias_correction, int threads, Address workspace) {
        cpu::compute_scale(DType(dtype), D, state(running_cov, running_std, num_batches_tracked), pointer(scale),
                           {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil, "dtype"_a, "D"_a, "running_cov"_a, "running_std"_a, "num_batches_tracked"_a, "scale"_a, "momentum"_a,
      "eps"_a, "beta"_a, "bias_correction"_a, "threads"_a, "workspace"_a);

  module.def(
      "apply_scale",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address scale, Address out,
         int threads) {
        cpu::apply_scale(strided(x, dtype, row_stride, col_stride), N, D, pointer(scale), pointer(out), threads);
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "scale"_a, "out"_a, "threads"_a);

  module.def(
      "train_backward",
      [](Address dout, int64_t dout_row_stride, int64_t dout_col_stride, Address x, int dtype, int64_t row_stride,
         int64_t col_stride, int64_t N, int64_t D, Address running_cov, Address running_std,
         Address num_batches_tracked, Address scale, Address dx, double momentum, double eps, double beta,
         bool bias_correction, int threads, Address workspace) {
        cpu::train_backward(strided(dout, dtype, dout_row_stride, dout_col_stride),
                            strided(x, dtype, row_stride, col_stride), N, D,
                            state(running_cov, running_std, num_batches_tracked), pointer(scale), pointer(dx),
                            {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil, "dout"_a, "dout_row_stride"_a, "dout_col_stride"_a, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a,
      "N"_a, "D"_a, "running_cov"_a, "running_std"_a, "num_batches_tracked"_a, "scale"_a, "dx"_a, "momentum"_a,
      "eps"_a, "beta"_a, "bias_correction"_a, "threads"_a, "workspace"_a);

  module.def(
      "column_sums",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address sums,
         int threads) {
        cpu::column_sums(strided(x, dtype, row_stride, col_stride), N, D, static_cast<double*>(pointer(sums)),
                         threads);
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "sums"_a, "threads"_a);

  module.def(
      "centred_gram",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address sums, Address gram,
         int threads, Address workspace) {
        cpu::centred_gram(strided(x, dtype, row_stride, col_stride), N, D, static_cast<const double*>(pointer(sums)),
                          pointer(gram), threads, pointer(workspace));
      },
      nogil, "x"_a, "dtype"_a, "row_stride"_a, "col_stride"_a, "N"_a, "D"_a, "sums"_a, "gram"_a, "threads"_a,
      "workspace"_a);

  module.def(
      "next_state",
      [](int dtype, int64_t D, Address sums, Address running_cov, Address running_std, Address num_batches_tracked,
         Address scale, Address gram, Address scale_and_std, double momentum, double eps, double beta,
         bool bias_correction, int threads, Address workspace) {
        cpu::next_state(DType(dtype), D, static_cast<const double*>(pointer(sums)),
                        state(running_cov, running_std, num_batches_tracked), pointer(scale), pointer(gram),
                        pointer(scale_and_std), {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil, "dtype"_a, "D"_a, "sums"_a, "running_cov"_a, "running_std"_a, "num_batches_tracked"_a, "scale"_a, "gram"_a,
      "scale_and_std"_a, "momentum"_a, "eps"_a, "beta"_a, "bias_correction"_a, "threads"_a, "workspace"_a);

  module.def(
      "write_state",
      [](int dtype, int64_t D, Address sums, Address triangle, Address scale_and_std, Address running_cov,
         Address running_std, Address num_batches_tracked, Address scale, int threads) {
        cpu::write_state(DType(dtype), D, static_cast<const double*>(pointer(sums)), pointer(triangle),
                         pointer(scale_and_std), state(running_cov, running_std, num_batches_tracked), pointer(scale),
                         threads);
      },
      nogil, "dtype"_a, "D"_a, "sums"_a, "triangle"_a, "scale_and_std"_a, "running_cov"_a, "running_std"_a,
      "num_batches_tracked"_a, "scale"_a, "threads"_a);

  module.def("instruction_sets", &cpu::instruction_sets, "Instruction sets that this processor can run.");
  module.def("instruction_set", &cpu::instruction_set, "The instruction set in use.");
  module.def("set_instruction_set", &cpu::set_instruction_set, "name"_a);
  module.def("build_info", &build_info);
}
