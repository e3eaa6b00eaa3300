// What this machine can do: reading memory, and multiplying in registers. Compiled with -march=native by roof.py.
// Prints one JSON object: read_gb_s, fp32_tflops, and bf16_tflops and int8_tops where there are instructions for them.
// Matrix tiles (AMX, SME) are not measured.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRounds = 7, kAccumulators = 12;
constexpr size_t kBytes = size_t{1} << 30;

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
typedef float Floats __attribute__((vector_size(kWidth)));
typedef int64_t Longs __attribute__((vector_size(kWidth)));

template <class T>
void keep(T& value) {  // no instruction, but the compiler must have the value in a register
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

// The best of some rounds in which every thread runs work(thread), in seconds.
template <class Work>
double best(int threads, Work work) {
  double least = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<std::thread> running;
    const auto began = std::chrono::steady_clock::now();
    for (int t = 1; t < threads; ++t) running.emplace_back(work, t);
    work(0);
    for (auto& thread : running) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    if (took.count() < least) least = took.count();
  }
  return least;
}

double read_bandwidth(int threads) {
  char* data = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (data == MAP_FAILED) std::abort();
#if defined(MADV_HUGEPAGE)
  madvise(data, kBytes, MADV_HUGEPAGE);
#endif
  for (size_t i = 0; i < kBytes; i += 4096) data[i] = 1;
  const size_t part = kBytes / static_cast<size_t>(threads) / (8 * kWidth) * (8 * kWidth);
  // Asked for by instructions or by the processor alone: which is more depends on the processor.
  const auto seconds = [=](auto ahead) {
    return best(threads, [=](int thread) {
      const char* at = data + static_cast<size_t>(thread) * part;
      Longs sum[8] = {};
      for (const char* end = at + part; at < end; at += 8 * kWidth)
        for (int i = 0; i < 8; ++i) {
          if constexpr (ahead > 0) __builtin_prefetch(at + i * kWidth + ahead);
          sum[i] += *reinterpret_cast<const Longs*>(at + i * kWidth);
        }
      for (Longs& s : sum) keep(s);
    });
  };
  const double least = std::min(seconds(std::integral_constant<int, 0>()), seconds(std::integral_constant<int, 4096>()));
  munmap(data, kBytes);
  return static_cast<double>(part) * threads / least / 1e9;
}

// Tera-operations a second of an instruction that does `operations`, over accumulators that do not wait for each other.
template <class Accumulator, class Step>
double peak(int threads, double operations, Step step) {
  constexpr long kTurns = 10'000'000;
  const double seconds = best(threads, [=](int) {
    Accumulator sums[kAccumulators] = {};
    for (long turn = 0; turn < kTurns; ++turn)
      for (auto& sum : sums) {
        step(sum);
        keep(sum);
      }
  });
  return operations * kTurns * kAccumulators * threads / seconds / 1e12;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  if (threads < 1) return 2;
  std::printf("{\"threads\": %d, \"read_gb_s\": %.3f", threads, read_bandwidth(threads));
  const auto multiply_add = [](Floats& sum) {
    Floats a = {}, b = {};
    keep(a), keep(b);
    sum += a * b;
  };
  std::printf(", \"fp32_tflops\": %.4f", peak<Floats>(threads, kWidth / 4 * 2, multiply_add));
#if defined(__AVX512BF16__)
  const auto bf16 = [](__m512& sum) {
    __m512i a = _mm512_setzero_si512();
    keep(a);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a);
  };
  std::printf(", \"bf16_tflops\": %.4f", peak<__m512>(threads, 64, bf16));
#endif
#if defined(__AVX512VNNI__)
  const auto int8 = [](__m512i& sum) {
    __m512i a = _mm512_setzero_si512();
    keep(a);
    sum = _mm512_dpbusd_epi32(sum, a, a);
  };
  std::printf(", \"int8_tops\": %.4f", peak<__m512i>(threads, 128, int8));
#elif defined(__AVXVNNI__)
  const auto int8 = [](__m256i& sum) {
    __m256i a = _mm256_setzero_si256();
    keep(a);
    sum = _mm256_dpbusd_avx_epi32(sum, a, a);
  };
  std::printf(", \"int8_tops\": %.4f", peak<__m256i>(threads, 64, int8));
#endif
  std::printf("}\n");
}
