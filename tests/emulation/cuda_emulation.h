// Runs CUDA kernels on a host, for tests: the real source of csrc/cuda/*.cuh compiled by a host
// compiler, one fiber per thread, blocks one after the other.
//
// What it finds beside wrong results:
//   - barriers and shuffles that not every thread reaches (reported as a deadlock, thread by
//   thread)
//   - reads of shared memory that nobody wrote, accesses out of bounds
//   - two accesses of different threads to one element of shared memory, one of them a write, with
//     no __syncthreads between them
//   - dependence on the order of threads and blocks: both are shuffled by the seed of a launch
//   - with -fsanitize=address,undefined: bad global accesses, misaligned vectors, bad shifts
// What it cannot find: the hardware's memory model, occupancy, speed, errors of the
// special-function units beyond the model below.
#pragma once

#define PERTURBED_EMULATION
// Far below CUDA's 65535, so that small problems run the loops of grids that hit the limit.
#define PERTURBED_MAX_GRID_YZ 5

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#else
#define EMULATION_ASAN 0
#endif

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Waiting { kNo, kBarrier, kShuffle };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread;
  Waiting waiting = Waiting::kNo;
  bool done = false;
  size_t shared_declared = 0;  // PT_SHARED declarations passed so far
  void* asan_stack = nullptr;
};

// One element of shared memory: who touched it since when. Epochs count barriers of the block.
struct Cell {
  static constexpr int kNobody = -1, kSeveral = -2;
  int writer = kNobody, reader = kNobody;
  uint64_t write_epoch = 0, read_epoch = 0;
};

struct Shared {
  std::string name;
  size_t count, element_bytes;
  std::vector<unsigned char> bytes;
  std::vector<Cell> cells;
};

// 32 lanes of shuffle. Two buffers are enough: a lane deposits for shuffle n + 2 only after all
// have arrived at n + 1, hence have read n.
struct Warp {
  static constexpr size_t kBytes = 8;
  unsigned char slots[2][kWarp][kBytes];
  unsigned arrived = 0;
  uint64_t round = 0;
  size_t bytes = 0;
  const char* kind = nullptr;
};

class Block {
 public:
  Block(Index index, Index grid, unsigned threads, uint64_t seed, const std::function<void()>& body)
      : index(index), grid(grid), threads_(threads), random_(seed), body_(body) {}

  void run();

  // Called by kernels, through the names below.
  void barrier();
  template <class T>
  T shuffle(const char* kind, unsigned mask, T value, unsigned source);
  unsigned ballot(unsigned mask, bool vote);
  Shared& declare_shared(const char* name, size_t count, size_t element_bytes);
  void note_read(Shared& shared, size_t i);
  void note_write(Shared& shared, size_t i);

  const Index index, grid;
  unsigned threads() const { return threads_; }
  const Index& thread() const { return fibers()[current_].thread; }

 private:
  // Stacks are kept between blocks: making them costs more than a small kernel.
  static std::vector<Fiber>& fibers() {
    static std::vector<Fiber> all;
    return all;
  }
  static void enter();
  void switch_to_fiber(size_t i);
  void switch_to_scheduler(bool last);
  void wait(Waiting reason);
  // Deposits a value and returns those of the warp's 32 lanes.
  template <class T>
  auto exchange(const char* kind, unsigned mask, T value) -> const unsigned char (*)[Warp::kBytes];
  void release(Waiting reason, size_t first, size_t end);
  std::string who(size_t i) const { return "thread " + std::to_string(i); }
  std::string where() const {
    return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
  }
  [[noreturn]] void fail(const std::string& what) const { throw Failure(where() + ": " + what); }
  [[noreturn]] void report_deadlock() const;
  uint64_t next_random() {  // xorshift64*
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return random_ * 0x2545F4914F6CDD1Dull;
  }

  unsigned threads_;
  uint64_t random_;
  const std::function<void()>& body_;
  ucontext_t scheduler_;
  std::vector<size_t> runnable_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Shared>> shared_;
  std::exception_ptr error_;
  size_t current_ = 0;
  unsigned at_barrier_ = 0;
  uint64_t epoch_ = 1;
#if EMULATION_ASAN
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void* scheduler_fake_ = nullptr;
#endif
};

inline Block*& current_block() {
  static Block* block = nullptr;
  return block;
}

// ---- scheduling ---------------------------------------------------------------------------------

inline void Block::enter() {
  Block& block = *current_block();
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
#endif
  try {
    block.body_();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  fibers()[block.current_].done = true;
  block.switch_to_scheduler(true);
}

inline void Block::switch_to_fiber(size_t i) {
  Fiber& fiber = fibers()[i];
  current_ = i;
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_, fiber.stack.data(), fiber.stack.size());
#endif
  swapcontext(&scheduler_, &fiber.context);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
}

inline void Block::switch_to_scheduler(bool last) {
  Fiber& fiber = fibers()[current_];
  (void)last;
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.asan_stack, scheduler_stack_,
                                 scheduler_stack_bytes_);
#endif
  swapcontext(&fiber.context, &scheduler_);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

inline void Block::run() {
  std::vector<Fiber>& all = fibers();
  if (all.size() < threads_) all.resize(threads_);
  warps_.assign(threads_ / kWarp, Warp());
  current_block() = this;
  for (size_t i = 0; i < threads_; ++i) {
    Fiber& fiber = all[i];
    if (fiber.stack.empty()) fiber.stack.resize(kStackBytes);
#if EMULATION_ASAN
    // A fiber's last frames never return, so nobody else clears their red zones.
    __asan_unpoison_memory_region(fiber.stack.data(), fiber.stack.size());
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    fiber.thread = {static_cast<unsigned>(i), 0, 0};
    fiber.waiting = Waiting::kNo;
    fiber.done = false;
    fiber.shared_declared = 0;
    runnable_.push_back(i);
  }
  while (!runnable_.empty()) {
    std::swap(runnable_[next_random() % runnable_.size()], runnable_.back());
    const size_t next = runnable_.back();
    runnable_.pop_back();
    switch_to_fiber(next);
    if (error_) std::rethrow_exception(error_);
  }
  for (size_t i = 0; i < threads_; ++i) {
    if (!all[i].done) report_deadlock();
  }
}

inline void Block::report_deadlock() const {
  std::string text = "deadlock:";
  const char* words[] = {" finished", " waits at __syncthreads", " waits at a shuffle"};
  int last = -1;
  for (size_t i = 0; i < threads_; ++i) {
    const int state = static_cast<int>(fibers()[i].waiting);
    if (state != last) text += (last < 0 ? " from " : ", from ") + who(i) + words[state];
    last = state;
  }
  fail(text);
}

inline void Block::wait(Waiting reason) {
  fibers()[current_].waiting = reason;
  switch_to_scheduler(false);
}

// Makes the other waiting threads of first .. end - 1 runnable again.
inline void Block::release(Waiting reason, size_t first, size_t end) {
  for (size_t i = first; i < end; ++i) {
    Fiber& fiber = fibers()[i];
    if (i == current_ || fiber.waiting != reason) continue;
    fiber.waiting = Waiting::kNo;
    runnable_.push_back(i);
  }
}

// ---- what kernels call --------------------------------------------------------------------------

inline void Block::barrier() {
  if (++at_barrier_ < threads_) return wait(Waiting::kBarrier);
  at_barrier_ = 0;
  ++epoch_;
  release(Waiting::kBarrier, 0, threads_);
}

template <class T>
auto Block::exchange(const char* kind, unsigned mask, T value) -> const
    unsigned char (*)[Warp::kBytes] {
  static_assert(sizeof(T) <= Warp::kBytes, "CUDA shuffles 4 or 8 bytes");
  if (mask != 0xffffffffu) fail("shuffle with a mask that is not the full warp");
  Warp& warp = warps_[current_ / kWarp];
  const size_t lane = current_ % kWarp;
  if (warp.arrived > 0 && (warp.kind != kind || warp.bytes != sizeof(T))) {
    fail(who(current_) + " is at a " + kind + " of " + std::to_string(sizeof(T)) +
         " bytes, other lanes at a " + warp.kind + " of " + std::to_string(warp.bytes));
  }
  warp.kind = kind;
  warp.bytes = sizeof(T);
  auto& slots = warp.slots[warp.round % 2];
  std::memcpy(slots[lane], &value, sizeof(T));
  if (++warp.arrived < kWarp) {
    wait(Waiting::kShuffle);
  } else {
    warp.arrived = 0;
    ++warp.round;
    const size_t first = current_ - lane;
    release(Waiting::kShuffle, first, first + kWarp);
  }
  return slots;
}

template <class T>
T Block::shuffle(const char* kind, unsigned mask, T value, unsigned source) {
  T result;
  std::memcpy(&result, exchange(kind, mask, value)[source], sizeof(T));
  return result;
}

inline unsigned Block::ballot(unsigned mask, bool vote) {
  const auto* votes = exchange("__ballot_sync", mask, static_cast<unsigned>(vote));
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    result |= static_cast<unsigned>(votes[lane][0]) << lane;
  }
  return result;
}

inline Shared& Block::declare_shared(const char* name, size_t count, size_t element_bytes) {
  const size_t at = fibers()[current_].shared_declared++;
  if (at == shared_.size()) {
    auto shared = std::make_unique<Shared>();
    shared->name = name;
    shared->count = count;
    shared->element_bytes = element_bytes;
    shared->bytes.assign(count * element_bytes, 0xFF);  // NaN, -1: nothing that looks right
    shared->cells.assign(count, Cell());
    shared_.push_back(std::move(shared));
  }
  Shared& shared = *shared_[at];
  if (shared.count != count || shared.element_bytes != element_bytes || shared.name != name) {
    fail(who(current_) + " declares shared " + name + " where others declare " + shared.name);
  }
  return shared;
}

inline void Block::note_read(Shared& shared, size_t i) {
  const auto element = [&] { return shared.name + "[" + std::to_string(i) + "]"; };
  if (i >= shared.count) fail(who(current_) + " reads " + element() + " out of bounds");
  Cell& cell = shared.cells[i];
  const int me = static_cast<int>(current_);
  if (cell.writer == Cell::kNobody) fail(who(current_) + " reads " + element() + ", never written");
  if (cell.writer != me && cell.write_epoch == epoch_) {
    fail(who(current_) + " reads " + element() + ", written by " + who(cell.writer) +
         " with no barrier between");
  }
  if (cell.read_epoch != epoch_) cell.reader = Cell::kNobody;
  cell.read_epoch = epoch_;
  cell.reader = cell.reader == Cell::kNobody || cell.reader == me ? me : Cell::kSeveral;
}

inline void Block::note_write(Shared& shared, size_t i) {
  const auto element = [&] { return shared.name + "[" + std::to_string(i) + "]"; };
  if (i >= shared.count) fail(who(current_) + " writes " + element() + " out of bounds");
  Cell& cell = shared.cells[i];
  const int me = static_cast<int>(current_);
  if (cell.writer != Cell::kNobody && cell.writer != me && cell.write_epoch == epoch_) {
    fail(who(current_) + " writes " + element() + ", also written by " + who(cell.writer) +
         " with no barrier between");
  }
  if (cell.reader != Cell::kNobody && cell.reader != me && cell.read_epoch == epoch_) {
    fail(who(current_) + " writes " + element() +
         ", read by another thread with no barrier between");
  }
  cell.writer = me;
  cell.write_epoch = epoch_;
}

// An array in shared memory. Elements are read and written whole, which is what the checks see.
template <class T>
class SharedArray {
 public:
  SharedArray(const char* name, size_t count)
      : shared_(current_block()->declare_shared(name, count, sizeof(T))) {}

  class Element {
   public:
    Element(Shared& shared, size_t i) : shared_(shared), i_(i) {}
    operator T() const {
      current_block()->note_read(shared_, i_);
      T value;
      std::memcpy(&value, shared_.bytes.data() + i_ * sizeof(T), sizeof(T));
      return value;
    }
    Element& operator=(const T& value) {
      current_block()->note_write(shared_, i_);
      std::memcpy(shared_.bytes.data() + i_ * sizeof(T), &value, sizeof(T));
      return *this;
    }

   private:
    Shared& shared_;
    size_t i_;
  };

  template <class I>
  Element operator[](I i) const {
    return Element(shared_, static_cast<size_t>(i));
  }

 private:
  Shared& shared_;
};

// Runs `body` for every thread of every block. Limits are CUDA's.
inline void launch(Index grid, unsigned threads, uint64_t seed, const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535u ||
      grid.z > 65535u) {
    throw Failure("grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                  std::to_string(grid.z) + ") is outside CUDA's limits");
  }
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) {
    throw Failure("a block of " + std::to_string(threads) +
                  " threads is not whole warps up to 1024");
  }
  // A stride coprime to the number of blocks visits them all in an order that depends on the seed.
  const uint64_t blocks = uint64_t{1} * grid.x * grid.y * grid.z;
  uint64_t stride = seed % blocks | 1;
  const auto gcd = [](uint64_t a, uint64_t b) {
    while (b != 0) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  };
  while (gcd(stride, blocks) != 1) stride += 2;
  uint64_t at = seed / 7 % blocks;
  for (uint64_t i = 0; i < blocks; ++i, at = (at + stride) % blocks) {
    const Index index{static_cast<unsigned>(at % grid.x),
                      static_cast<unsigned>(at / grid.x % grid.y),
                      static_cast<unsigned>(at / grid.x / grid.y)};
    Block(index, grid, threads, seed * 0x9E3779B97F4A7C15ull + at + 1, body).run();
  }
  current_block() = nullptr;
}

constexpr double kSineError = 0x1p-20 * 0.70710678;  // 2^-20.5 for arguments in [-pi, pi]

// A number in [-1, 1] that is a function of a float's bits, for modelled errors.
inline double error_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
  bits = (bits ^ bits >> 12) * 0x297a2d39u;
  bits ^= bits >> 15;
  return static_cast<double>(bits) / 2147483647.5 - 1.0;
}

}  // namespace emulation

// ---- CUDA's names -------------------------------------------------------------------------------

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx (::emulation::current_block()->thread())
#define blockIdx (::emulation::current_block()->index)
#define gridDim (::emulation::current_block()->grid)
#define PT_SHARED(type, name, count) ::emulation::SharedArray<type> name(#name, count)

inline void __syncthreads() { emulation::current_block()->barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const unsigned lane = emulation::current_block()->thread().x % emulation::kWarp;
  return emulation::current_block()->shuffle("__shfl_xor_sync", mask, value,
                                             (lane ^ static_cast<unsigned>(lane_mask)) % 32u);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::current_block()->shuffle("__shfl_sync", mask, value,
                                             static_cast<unsigned>(source) % 32u);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::current_block()->ballot(mask, vote);
}
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

namespace perturbed {

// Special-function units: exact results with an error of the size that the PTX manual allows
// (lg2.approx, sqrt.approx, sin.approx, cos.approx), drawn from the argument's bits.
inline float mufu_lg2(float x) {
  const double exact = std::log2(static_cast<double>(x));
  const double bound = x > 0.5f && x < 2.0f ? 0x1p-22 : 0x1p-22 * std::fabs(exact);
  // The worst for the last numbers below 1, where the error may turn the sign.
  const double error = x < 1.0f && x > 1.0f - 0x1p-22f ? 1.0 : emulation::error_of(x);
  return static_cast<float>(exact + error * bound);
}
inline float mufu_sqrt(float x) {
  const double exact = std::sqrt(static_cast<double>(x));
  return static_cast<float>(exact * (1.0 + emulation::error_of(x) * 0x1p-23));
}
inline float mufu_sin(float x) {
  return static_cast<float>(std::sin(static_cast<double>(x)) +
                            emulation::error_of(x) * emulation::kSineError);
}
inline float mufu_cos(float x) {
  return static_cast<float>(std::cos(static_cast<double>(x)) -
                            emulation::error_of(x) * emulation::kSineError);
}

}  // namespace perturbed
