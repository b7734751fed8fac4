// Stands in for torch's parallel loop under ThreadSanitizer: the kernels' only way to threads.
//
// torch runs it on OpenMP, whose barriers the sanitizer does not know: every loop would look like a
// race. Threads that are started and joined it does know. Preloaded by tests/check_races.sh;
// the signature is that of torch/csrc/stable/c/shim.h.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;

}  // namespace

// RACE (defined for the check of the check): neighbouring threads share one step of the loop.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t count = std::max<int64_t>(end - begin, 0);
  const int64_t least = std::max<int64_t>(grain, 1);
  const int64_t parts = std::min(kThreads, (count + least - 1) / least);
  if (parts == 0) return 0;
  const int64_t each = (count + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += each) {
    const int64_t last = std::min(first + each, end);
#ifdef RACE
    const int64_t from = std::max(begin, first - 1);
#else
    const int64_t from = first;
#endif
    threads.emplace_back([=] { body(from, last, context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
