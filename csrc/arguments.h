// How Python hands the structures of types.h over: addresses (Tensor.data_ptr()), sizes and strides. No torch header is
// included, so that the extensions build without torch and one build serves every version of it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "types.h"

namespace isobn {

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline Strided strided(Address data, int dtype, int64_t row_stride, int64_t col_stride) {
  return {pointer(data), DType(dtype), row_stride, col_stride};
}

inline State state(Address running_cov, Address running_std, Address num_batches_tracked) {
  return {pointer(running_cov), pointer(running_std), static_cast<int64_t*>(pointer(num_batches_tracked))};
}

// The numbers of the enumerations, by name.
inline void export_numbers(pybind11::module_& module) {
  module.attr("DTYPES") = std::map<std::string, int>{{"float32", int(DType::float32)},
                                                     {"float64", int(DType::float64)},
                                                     {"float16", int(DType::float16)},
                                                     {"bfloat16", int(DType::bfloat16)}};
  module.attr("TRAIN_FORWARD") = int(Function::train_forward);
  module.attr("COMPUTE_SCALE") = int(Function::compute_scale);
  module.attr("TRAIN_BACKWARD") = int(Function::train_backward);
}

}  // namespace isobn
