// What the driver asks of a CPU tier: the two passes of a separable resize over uint8 rows.
// Included by tier files, so it may hold nothing that emits a symbol: a function compiled for
// AVX2 and merged by the linker with its twin would crash a CPU that has no AVX2.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgevlm {

constexpr int32_t kRowsPerStep = 4;  // rows that one horizontal pass does together

// Passes may read this many bytes past the last sample of a row, and write as many past their
// output.
constexpr int32_t kSlackBytes = 64;

// Pillow's weights have 22 bits after the point, int16 multiplications take 16:
// weight = high * 2^kLowBits + low. Sums wrap modulo 2^32, so the split is exact.
constexpr int32_t kWeightBits = 22;
constexpr int32_t kLowBits = 12;

struct TapPair {  // weights of two neighbouring samples
  int16_t high[2];
  int16_t low[2];
};

struct Window {  // the samples that make one output sample: 2 * n_pairs from `first` on
  int32_t first;
  int32_t n_pairs;  // at least 1, a multiple of pairs_per_step; the last weights may be 0
};

struct Tier {
  const char* name;
  int32_t pairs_per_step;

  // Resamples kRowsPerStep rows of RGB pixels to `width` pixels each. The weights of output pixel x
  // begin at taps[x * pairs_per_window].
  void (*horizontal)(const uint8_t* const rows[kRowsPerStep], const Window* windows,
                     const TapPair* taps, int32_t pairs_per_window, int32_t width,
                     uint8_t* const out[kRowsPerStep]);

  // The weighted sum of 2 * n_pairs rows of `n_bytes` samples.
  void (*vertical)(const uint8_t* const* rows, const TapPair* taps, int32_t n_pairs,
                   int32_t n_bytes, uint8_t* out);
};

extern const Tier kScalarTier;
extern const Tier kSse41Tier;
extern const Tier kAvx2Tier;
extern const Tier kAvx512Tier;
extern const Tier kNeonTier;

}  // namespace edgevlm
