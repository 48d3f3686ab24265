// What the AVX-512 kernels share. Everything is internal to the file that includes it: a function
// compiled for AVX-512 and merged by the linker with a twin would crash a CPU that lacks it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdlib>
#include <initializer_list>

namespace edgevlm {
namespace {

constexpr size_t kLine = 64;  // bytes of a cache line and of a register

inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

inline size_t greatest(size_t a, size_t b) { return a > b ? a : b; }

inline size_t rounded_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

inline __mmask16 first16(size_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1U << n) - 1);
}

inline __mmask64 first64(size_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// Memory of a thread, kept for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* get(size_t n_bytes) {
    if (n_bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(kLine, rounded_up(n_bytes, kLine));
      size_ = memory_ != nullptr ? n_bytes : 0;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

constexpr float kLog2E = 1.44269504F;

// 2^x: of base 2, because the fraction of x is exact. The error is kDegree's first term left out:
// below 3e-6 of the result for 5, 6e-5 for 4.
template <int kDegree>
inline __m512 power_of_2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  constexpr float kTaylor[] = {1,
                               0.693147181F,
                               0.240226507F,
                               0.0555041087F,
                               9.6181291e-3F,
                               1.33335581e-3F};  // (ln 2)^i / i!
  __m512 sum = _mm512_set1_ps(kTaylor[kDegree]);
#pragma GCC unroll 5
  for (int i = kDegree - 1; i >= 0; --i) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(kTaylor[i]));
  }
  return _mm512_scalef_ps(sum, whole);
}

}  // namespace
}  // namespace edgevlm
