// The scheduler behind cuda_runtime.h, and the device that it pretends to be.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {
constexpr size_t kSharedBytes = 256 << 10;
}
alignas(16) unsigned char isobn_shared[kSharedBytes];

namespace {

// The device; tests change it through the functions at the end of this file.
int processors = 132, cooperative_launch = 1, blocks_per_processor = 1, fail_after = -1;
size_t most_shared = 232448, default_shared = 48 << 10;
bool descending = false;
std::map<std::pair<const void*, int>, size_t> allowed_shared;  // by kernel and device
int current_device = 0, devices_set = 0, launches = 0;

// ---- Fibers ----

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 64 << 10;
#else
constexpr size_t kStack = 16 << 10;
#endif
constexpr uint64_t kGuard = 0x9e3779b97f4a7c15;

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; registers that a call preserves are on the stack
extern "C" void isobn_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl isobn_emulation_switch
.type isobn_emulation_switch,@function
isobn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size isobn_emulation_switch,.-isobn_emulation_switch
)");
void swap(Context& from, Context& to) { isobn_emulation_switch(&from, to); }
void start(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack - 8);
  *top = nullptr;  // where a return address would be: aligns the stack as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void swap(Context& from, Context& to) { swapcontext(&from, &to); }
void start(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class Is : uint8_t { ready, at_warp, at_block, at_grid, done };

struct Fiber {
  Context context;
  char* stack = nullptr;
  Is is;
  uint8_t exchanges;  // so far, modulo 2
  unsigned char given[2][8];
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Pool {  // of stacks and fibers, kept from launch to launch
  std::vector<Fiber> fibers;
  void reserve(size_t count) {
    const size_t before = fibers.size();
    if (count <= before) return;
    fibers.resize(count);
    const size_t bytes = (count - before) * kStack;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = before; i < count; ++i) {
      fibers[i].stack = static_cast<char*>(memory) + (i - before) * kStack;
      std::memcpy(fibers[i].stack, &kGuard, sizeof kGuard);
    }
  }
} pool;

Context scheduler;
Fiber* running = nullptr;
Fiber* warp_of_running = nullptr;
emulation::Kernel kernel;
const void* kernel_call;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

void leave(Is state) {
  Fiber* const self = running;
  self->is = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == Is::done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  swap(self->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  kernel(kernel_call);
  leave(Is::done);
  std::abort();
}

void resume(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  swap(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

[[noreturn]] void deadlock(const char* barrier) {
  throw std::runtime_error(std::string("emulation: some threads wait at a barrier of the ") + barrier +
                           " that others do not reach");
}

// Whether all of [begin, begin + count) wait there; none must, or all.
bool all_at(Fiber* begin, size_t count, Is barrier, const char* name) {
  const size_t waiting = std::count_if(begin, begin + count, [&](const Fiber& f) { return f.is == barrier; });
  if (waiting != 0 && waiting != count) deadlock(name);
  return waiting == count;
}

void release(Fiber* begin, size_t count) {
  for (size_t i = 0; i < count; ++i) begin[i].is = Is::ready;
}

template <class F>
void in_order(unsigned count, F f) {
  for (unsigned k = 0; k < count; ++k) f(descending ? count - 1 - k : k);
}

void run_warp(Fiber* warp, unsigned first, unsigned lanes) {
  do {
    in_order(lanes, [&](unsigned lane) {
      if (warp[lane].is != Is::ready) return;
      threadIdx.x = first + lane;
      warp_of_running = warp;
      resume(warp[lane]);
    });
    if (!all_at(warp, lanes, Is::at_warp, "warp")) return;
    release(warp, lanes);
  } while (true);
}

// Runs a block to its end or to the grid's barrier.
void run_block(Fiber* block, unsigned threads) {
  const unsigned warps = (threads + 31) / 32;
  do {
    in_order(warps, [&](unsigned w) { run_warp(block + 32 * w, 32 * w, std::min(32u, threads - 32 * w)); });
    if (!all_at(block, threads, Is::at_block, "block")) return;
    release(block, threads);
  } while (true);
}

struct Device {
  std::mutex mutex;
} device;

}  // namespace

namespace emulation {

void wait(Barrier barrier) {
  leave(barrier == Barrier::warp ? Is::at_warp : barrier == Barrier::block ? Is::at_block : Is::at_grid);
}

void* exchange(const void* value, size_t bytes, unsigned source_lane) {
  Fiber* const self = running;
  Fiber* const warp = warp_of_running;
  const int turn = self->exchanges++ % 2;  // two places: a lane is at most one exchange ahead of another
  std::memcpy(self->given[turn], value, bytes);
  wait(Barrier::warp);
  return warp[source_lane].given[turn];
}

cudaError_t launch(Kernel run, const void* call, const void* which, dim3 grid, dim3 block, size_t shared,
                   bool cooperative) {
  const std::lock_guard<std::mutex> lock(device.mutex);
  if (fail_after == 0) return cudaErrorInvalidValue;
  if (fail_after > 0) --fail_after;
  ++launches;
  const size_t threads = block.x, blocks = size_t(grid.x) * grid.y;
  if (threads == 0 || threads > 1024 || blocks == 0) return cudaErrorInvalidValue;
  if (shared > std::max(std::min(default_shared, most_shared), allowed_shared[{which, current_device}])) return cudaErrorInvalidValue;
  if (cooperative && blocks > size_t(processors) * blocks_per_processor) return cudaErrorCooperativeLaunchTooLarge;
  pool.reserve(cooperative ? blocks * threads : threads);
  kernel = run;
  kernel_call = call;
  gridDim = grid;
  blockDim = block;
  threadIdx = dim3(0, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(isobn_shared + (shared + 7) / 8 * 8, kSharedBytes - (shared + 7) / 8 * 8);
#endif
  std::vector<unsigned char> saved;  // the shared memory of blocks that wait for the grid
  std::vector<char> waits(blocks, 0);
  bool any_waits = false;
  do {
    const bool first = !any_waits;
    any_waits = false;
    size_t number_waiting = 0;
    in_order(unsigned(blocks), [&](unsigned b) {
      Fiber* const fibers = pool.fibers.data() + (cooperative ? b * threads : 0);
      blockIdx = dim3(b % grid.x, b / grid.x, 0);
      if (first) {
        std::memset(isobn_shared, 0xff, shared);
        for (size_t t = 0; t < threads; ++t) {
          start(fibers[t].context, fibers[t].stack, &fiber_main);
          fibers[t].is = Is::ready;
          fibers[t].exchanges = 0;
        }
      } else {
        std::memcpy(isobn_shared, saved.data() + b * shared, shared);
        release(fibers, threads);
      }
      run_block(fibers, unsigned(threads));
      for (size_t t = 0; t < threads; ++t)
        if (std::memcmp(fibers[t].stack, &kGuard, sizeof kGuard) != 0) throw std::runtime_error("emulation: stack overflow");
      if (all_at(fibers, threads, Is::at_grid, "grid")) {
        if (!cooperative) throw std::runtime_error("emulation: a grid's barrier in an ordinary launch");
        saved.resize(blocks * shared);
        std::memcpy(saved.data() + b * shared, isobn_shared, shared);
        any_waits = true;
        ++number_waiting;
      }
    });
    if (any_waits && number_waiting != blocks) deadlock("grid");
  } while (any_waits);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(isobn_shared, kSharedBytes);
#endif
  return cudaSuccess;
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes > most_shared) return cudaErrorInvalidValue;
  allowed_shared[{kernel, current_device}] = bytes;
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void* kernel, int, size_t shared) {
  *blocks = shared <= std::max(default_shared, allowed_shared[{kernel, current_device}]) ? blocks_per_processor : 0;
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorEmulated";
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid argument" : "?"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, ++devices_set, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? processors
           : which == cudaDevAttrCooperativeLaunch ? cooperative_launch
                                                   : int(most_shared);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

// ---- For tests, by ctypes ----

extern "C" {
__attribute__((visibility("default"))) void isobn_emulation_order(int is_descending) { descending = is_descending != 0; }
__attribute__((visibility("default"))) void isobn_emulation_device(int number, int cooperative, int per_processor, size_t shared, size_t without_permission) {
  processors = number;
  cooperative_launch = cooperative;
  blocks_per_processor = per_processor;
  most_shared = shared;
  default_shared = without_permission;
}
__attribute__((visibility("default"))) void isobn_emulation_fail_after(int calls) { fail_after = calls; }
__attribute__((visibility("default"))) int isobn_emulation_launches() { return launches; }
__attribute__((visibility("default"))) int isobn_emulation_current_device() { return current_device; }
}
