// The host side of the CUDA backend: which launches make up each function, and on what grid.

#include "cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "apply.cuh"
#include "gradient.cuh"
#include "step.cuh"

namespace isobn::cuda {

// Nothing: whether a kernel of this module can run at all.
struct Probe {};
__global__ void probe_kernel(const Probe) {}

namespace {

// ---- Errors and devices ----

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been reported: the next call starts clean
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}
#define CHECK(call) check(call, #call)

// Inside, the device is the current one; afterwards the one before it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    CHECK(cudaGetDevice(&before_));
    if (before_ != device_) CHECK(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// Inside, this thread may load kernels during a stream capture: loading is no part of what is captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int64_t blocks_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// ---- The launches of a step: one where all blocks fit on the device at once, else two ----

using StepKernel = void (*)(const Step);

template <class X>
StepKernel train_kernel(bool wide) {
  return wide ? &step<X, true, true> : &step<X, false, true>;
}
StepKernel step_kernel(Function function, DType dtype, bool wide) {
  if (function == Function::compute_scale) return wide ? &step<float, true, false> : &step<float, false, false>;
  if (dtype == DType::float16) return train_kernel<__half>(wide);
  if (dtype == DType::bfloat16) return train_kernel<__nv_bfloat16>(wide);
  return train_kernel<float>(wide);
}

struct Plan {
  bool whole;   // one cooperative launch
  int groups;   // of kRows rows of C for a block
  int blocks, threads;
  size_t shared;
};

// Without permission a launch may ask for 48 KiB; with it, for 99 KiB or more on every GPU from sm_80 on.
static_assert(sizeof(GradientShared) <= 48 << 10 && sizeof(StepShared) <= 48 << 10);
static_assert(sizeof(StepShared) + kRows * (2 + kMaxFeatures) * sizeof(float) <= 99 << 10);

int step_threads(int64_t D) { return int(blocks_of(D, kColumns * kWarp)) * kWarp; }

Plan two_launches(int64_t D) { return {false, 1, int(blocks_of(D, kRows)), step_threads(D), sizeof(StepShared)}; }

Plan make_plan(StepKernel kernel, int64_t D, int device) {
  Plan plan{};
  plan.threads = step_threads(D);
  const int most_shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  plan.whole = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  if (plan.whole) {
    const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
    // All there is, as the permission is the kernel's and not this plan's.
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared));
    // As few rows a block as let all blocks be there at once: the launch takes as long as one of them.
    for (plan.groups = 1;; ++plan.groups) {
      plan.blocks = int(blocks_of(D, kRows * plan.groups));
      plan.shared = sizeof(StepShared) + kept_floats(plan.groups, D) * sizeof(float);
      if (plan.shared > size_t(most_shared)) break;
      int per_processor = 0;
      CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, plan.threads, plan.shared));
      if (int64_t(per_processor) * processors >= plan.blocks) return plan;
    }
  }
  return two_launches(D);
}

// Asked of the device once, and then remembered.
Plan plan_for(StepKernel kernel, int64_t D, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<StepKernel, int64_t, int>, Plan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, D, device);
  auto found = plans.find(key);
  if (found == plans.end()) {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    found = plans.emplace(key, make_plan(kernel, D, device)).first;
  }
  return found->second;
}

template <class Params>
void launch(void (*kernel)(const Params), dim3 grid, int threads, size_t shared, Params params, const Where& on) {
  void* arguments[] = {&params};
  CHECK(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, static_cast<cudaStream_t>(on.stream)));
}

void run_step(StepKernel kernel, Step step, int64_t D, const Where& on, void* workspace) {
  Plan plan = plan_for(kernel, D, on.device);
  const DeviceGuard guard(on.device);
  step.energies = static_cast<double*>(workspace);
  if (plan.whole) {
    step.phase = Phase::whole;
    step.groups = plan.groups;
    void* arguments[] = {&step};
    const cudaError_t error = cudaLaunchCooperativeKernel(kernel, dim3(plan.blocks), dim3(plan.threads), arguments,
                                                          plan.shared, static_cast<cudaStream_t>(on.stream));
    if (error != cudaErrorCooperativeLaunchTooLarge) return check(error, "cudaLaunchCooperativeKernel");
    cudaGetLastError();
    plan = two_launches(D);  // the stream has a part of the device, as in a green context
  }
  step.groups = plan.groups;
  step.kept = reinterpret_cast<float*>(step.energies + 2 * plan.blocks);
  for (Phase phase : {Phase::before_barrier, Phase::after_barrier}) {
    step.phase = phase;
    launch(kernel, dim3(plan.blocks), plan.threads, plan.shared, step, on);
  }
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Whether a row's columns can be accessed four at a time.
bool wide_rows(const Strided& x, int64_t D) {
  return D % 4 == 0 && x.col_stride == 1 && x.row_stride % 4 == 0 && aligned(x.data, 4 * item_size(x.dtype));
}

Step make_step(int64_t D, const State& state, float* scale, const Options& options) {
  Step step{};
  step.D = D;
  step.C = static_cast<float*>(state.running_cov);
  step.running_std = static_cast<float*>(state.running_std);
  step.count = state.num_batches_tracked;
  step.scale = scale;
  step.beta = float(options.beta);
  step.momentum = options.momentum;
  step.eps = options.eps;
  step.bias_correction = options.bias_correction;
  return step;
}

bool wide_state(int64_t D, const State& state) {
  return D % 4 == 0 && aligned(state.running_cov, 16) && aligned(state.running_std, 16);
}

// ---- apply_scale and train_backward, for one dtype ----

template <class X>
void apply_as(const Apply& params, bool wide, const Where& on) {
  const int64_t items = wide ? params.D / 4 : params.D;
  const int threads = int(std::min<int64_t>(256, blocks_of(items, kWarp) * kWarp));
  const dim3 grid(unsigned(params.N), unsigned(blocks_of(items, threads)));
  launch(wide ? &apply<X, true> : &apply<X, false>, grid, threads, 0, params, on);
}

template <class X>
void backward_as(const Gradient& params, const Where& on) {
  const unsigned blocks = unsigned(params.blocks), features = unsigned(blocks_of(params.D, kGradientThreads));
  launch(&backward_rows<X>, dim3(blocks), kGradientThreads, sizeof(GradientShared), params, on);
  launch(&backward_features, dim3(features), kGradientThreads, sizeof(GradientShared), params, on);
  launch(&gradient<X>, dim3(blocks), kGradientThreads, sizeof(GradientShared), params, on);
}

}  // namespace

size_t workspace_bytes(Function function, int64_t D) {
  const size_t blocks = size_t(blocks_of(D, kRows));
  if (function == Function::train_backward)
    return 3 * blocks * sizeof(double) + size_t(gradient_vectors() * D) * sizeof(float);
  // The rows that two launches leave to each other included: that one is not possible may show only when launching.
  return 2 * blocks * sizeof(double) + blocks * kept_floats(1, D) * sizeof(float);
}

void train_forward(const Strided& x, int64_t N, int64_t D, const State& state, float* scale, float* saved_scale,
                   void* out, const Options& options, const Where& on, void* workspace) {
  Step step = make_step(D, state, scale, options);
  step.N = int(N);
  step.x = x.data;
  step.row_stride = x.row_stride;
  step.col_stride = x.col_stride;
  step.saved_scale = saved_scale;
  step.out = out;
  step.keep = float(1 - options.momentum);
  step.m = float(options.momentum);
  step.gain = float(options.momentum / double(N));
  const bool wide = wide_rows(x, D) && wide_state(D, state) && aligned(out, 4 * item_size(x.dtype));
  run_step(step_kernel(Function::train_forward, x.dtype, wide), step, D, on, workspace);
}

void compute_scale(int64_t D, const State& state, float* scale, const Options& options, const Where& on,
                   void* workspace) {
  run_step(step_kernel(Function::compute_scale, DType::float32, wide_state(D, state)),
           make_step(D, state, scale, options), D, on, workspace);
}

void apply_scale(const Strided& x, int64_t N, int64_t D, const float* scale, void* out, const Where& on) {
  const DeviceGuard guard(on.device);
  const Apply params{N, D, x.data, x.row_stride, x.col_stride, scale, out};
  const bool wide = wide_rows(x, D) && aligned(scale, 16) && aligned(out, 4 * item_size(x.dtype));
  if (x.dtype == DType::float16)
    apply_as<__half>(params, wide, on);
  else if (x.dtype == DType::bfloat16)
    apply_as<__nv_bfloat16>(params, wide, on);
  else
    apply_as<float>(params, wide, on);
}

void train_backward(const Strided& dout, const Strided& x, int64_t N, int64_t D, const State& state, const float* scale,
                    void* dx, const Options& options, const Where& on, void* workspace) {
  const DeviceGuard guard(on.device);
  Gradient params{};
  params.N = int(N);
  params.D = D;
  params.x = x.data;
  params.row_stride = x.row_stride;
  params.col_stride = x.col_stride;
  params.dout = dout.data;
  params.dout_row_stride = dout.row_stride;
  params.dout_col_stride = dout.col_stride;
  params.C = static_cast<const float*>(state.running_cov);
  params.running_std = static_cast<const float*>(state.running_std);
  params.count = state.num_batches_tracked;
  params.scale = scale;
  params.dx = dx;
  params.gain = float(options.momentum / double(N));
  params.beta = float(options.beta);
  params.momentum = options.momentum;
  params.eps = options.eps;
  params.bias_correction = options.bias_correction;
  params.blocks = int(blocks_of(D, kRows));
  params.energies = static_cast<double*>(workspace);
  float* next = reinterpret_cast<float*>(params.energies + 3 * params.blocks);
  for (float** vector : {&params.mean, &params.s, &params.gamma, &params.t, &params.g, &params.inv, &params.dgamma,
                         &params.du_gamma, &params.diagonal}) {
    *vector = next;
    next += D;
  }
  if (x.dtype == DType::float16)
    backward_as<__half>(params, on);
  else if (x.dtype == DType::bfloat16)
    backward_as<__nv_bfloat16>(params, on);
  else
    backward_as<float>(params, on);
}

int driver_version() {
  int version = 0;
  CHECK(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

std::string probe(int device) {
  try {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    cudaStream_t stream = nullptr;
    std::string failure;
    try {
      CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      launch(&probe_kernel, dim3(1), 1, 0, Probe{}, {device, stream});
      CHECK(cudaStreamSynchronize(stream));
    } catch (const std::runtime_error& error) {
      failure = error.what();
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
    return failure;
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

bool one_launch(DType dtype, int64_t D, int device) {
  return plan_for(step_kernel(Function::train_forward, dtype, true), D, device).whole;
}

}  // namespace isobn::cuda
