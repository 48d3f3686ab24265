// Eight vector operations, once per CPU tier: the only file with intrinsics.
//
//   Pixels             samples as int16, in pairs: the two taps of one output sample side by side
//   Weights            the weights of such pairs
//   Sum                32-bit sums of samples times weights, one per output sample, high and low
//                      part apart (tier.h)
//   zero, accumulate   sums of products
//   load_rgb           2 * kPairsPerStep RGB pixels, taps paired within a channel
//   load_weights       the kPairsPerStep pairs that go with them
//   store_rgb          one RGB pixel in each of kRowsPerStep rows; the byte after it is scratch
//   zip                kColumnsPerStep samples of two rows, paired
//   broadcast_weights  one pair for all columns
//   store_columns      kColumnsPerStep finished samples
//
// A finished sample is (sum + half) >> kWeightBits, clamped to 0..255.
#pragma once

#include "tier.h"

#if defined(EDGEVLM_TIER_SSE41)
#include <smmintrin.h>
#elif defined(EDGEVLM_TIER_AVX2) || defined(EDGEVLM_TIER_AVX512)
#include <immintrin.h>
#elif defined(EDGEVLM_TIER_NEON)
#include <arm_neon.h>
#endif

namespace edgevlm {
namespace {

constexpr int32_t kHalf = 1 << (kWeightBits - 1);

#if defined(EDGEVLM_TIER_SCALAR)

#define EDGEVLM_TIER_NAME "scalar"
#define EDGEVLM_TIER_TABLE kScalarTier

constexpr int32_t kPairsPerStep = 1;
constexpr int32_t kColumnsPerStep = 16;

struct Pixels {
  uint32_t tap[2][4];
};
struct Weights {
  uint32_t tap[2];  // unsigned, for sums that wrap
};
struct Sum {
  uint32_t value[4];
};

inline Sum zero() { return {}; }

inline Weights broadcast_weights(const TapPair& taps) {
  Weights weights;
  for (int i = 0; i < 2; ++i) {
    weights.tap[i] = static_cast<uint32_t>(taps.high[i] * (1 << kLowBits) + taps.low[i]);
  }
  return weights;
}

inline Weights load_weights(const TapPair* taps) { return broadcast_weights(*taps); }

inline Sum accumulate(Sum sum, const Pixels& pixels, const Weights& weights) {
  for (int i = 0; i < 4; ++i) {
    sum.value[i] += pixels.tap[0][i] * weights.tap[0] + pixels.tap[1][i] * weights.tap[1];
  }
  return sum;
}

inline uint8_t finish(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum + kHalf) >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

inline Pixels load_rgb(const uint8_t* p) {
  return {{{p[0], p[1], p[2], 0}, {p[3], p[4], p[5], 0}}};
}

inline void store_rgb(const Sum sums[kRowsPerStep], uint8_t* const out[kRowsPerStep],
                      ptrdiff_t offset) {
  for (int32_t r = 0; r < kRowsPerStep; ++r) {
    for (int c = 0; c < 3; ++c) out[r][offset + c] = finish(sums[r].value[c]);
  }
}

inline void zip(const uint8_t* a, const uint8_t* b, Pixels pixels[4]) {
  for (int i = 0; i < 16; ++i) {
    pixels[i / 4].tap[0][i % 4] = a[i];
    pixels[i / 4].tap[1][i % 4] = b[i];
  }
}

inline void store_columns(const Sum sums[4], uint8_t* out) {
  for (int i = 0; i < 16; ++i) out[i] = finish(sums[i / 4].value[i % 4]);
}

#elif defined(EDGEVLM_TIER_SSE41)

#define EDGEVLM_TIER_NAME "sse41"
#define EDGEVLM_TIER_TABLE kSse41Tier

constexpr int32_t kPairsPerStep = 1;
constexpr int32_t kColumnsPerStep = 16;

using Pixels = __m128i;
struct Weights {
  __m128i high, low;
};
struct Sum {
  __m128i high, low;
};

inline Sum zero() { return {_mm_setzero_si128(), _mm_setzero_si128()}; }

inline Weights load_weights(const TapPair* taps) {
  const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(taps));
  return {_mm_shuffle_epi32(pair, 0x00), _mm_shuffle_epi32(pair, 0x55)};
}

inline Weights broadcast_weights(const TapPair& taps) { return load_weights(&taps); }

inline Sum accumulate(Sum sum, Pixels pixels, Weights weights) {
  return {_mm_add_epi32(sum.high, _mm_madd_epi16(pixels, weights.high)),
          _mm_add_epi32(sum.low, _mm_madd_epi16(pixels, weights.low))};
}

inline __m128i finish(Sum sum) {
  const __m128i value = _mm_add_epi32(_mm_slli_epi32(sum.high, kLowBits), sum.low);
  return _mm_srai_epi32(_mm_add_epi32(value, _mm_set1_epi32(kHalf)), kWeightBits);
}

inline __m128i finish(const Sum sums[4]) {
  return _mm_packus_epi16(_mm_packs_epi32(finish(sums[0]), finish(sums[1])),
                          _mm_packs_epi32(finish(sums[2]), finish(sums[3])));
}

inline Pixels load_rgb(const uint8_t* p) {
  const __m128i order = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), order);
}

inline void store_rgb(const Sum sums[kRowsPerStep], uint8_t* const out[kRowsPerStep],
                      ptrdiff_t offset) {
  const __m128i pixels = finish(sums);
  const int32_t rgb[kRowsPerStep] = {_mm_extract_epi32(pixels, 0), _mm_extract_epi32(pixels, 1),
                                     _mm_extract_epi32(pixels, 2), _mm_extract_epi32(pixels, 3)};
  for (int32_t r = 0; r < kRowsPerStep; ++r) __builtin_memcpy(out[r] + offset, &rgb[r], 4);
}

inline void zip(const uint8_t* a, const uint8_t* b, Pixels pixels[4]) {
  const __m128i row_a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i row_b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m128i left = _mm_unpacklo_epi8(row_a, row_b);
  const __m128i right = _mm_unpackhi_epi8(row_a, row_b);
  const __m128i nothing = _mm_setzero_si128();
  pixels[0] = _mm_unpacklo_epi8(left, nothing);
  pixels[1] = _mm_unpackhi_epi8(left, nothing);
  pixels[2] = _mm_unpacklo_epi8(right, nothing);
  pixels[3] = _mm_unpackhi_epi8(right, nothing);
}

inline void store_columns(const Sum sums[4], uint8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), finish(sums));
}

#elif defined(EDGEVLM_TIER_AVX2)

#define EDGEVLM_TIER_NAME "avx2"
#define EDGEVLM_TIER_TABLE kAvx2Tier

constexpr int32_t kPairsPerStep = 2;  // one in each half of a vector
constexpr int32_t kColumnsPerStep = 32;

using Pixels = __m256i;
struct Weights {
  __m256i high, low;
};
struct Sum {
  __m256i high, low;
};

inline Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

inline Weights load_weights(const TapPair* taps) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taps));
  // No constant in a register: all 16 are needed in the inner loop.
  const __m256i apart = _mm256_permute4x64_epi64(_mm256_castsi128_si256(pairs), 0x50);
  return {_mm256_shuffle_epi32(apart, 0x00), _mm256_shuffle_epi32(apart, 0x55)};
}

inline Weights broadcast_weights(const TapPair& taps) {
  int32_t high, low;
  __builtin_memcpy(&high, taps.high, 4);
  __builtin_memcpy(&low, taps.low, 4);
  return {_mm256_set1_epi32(high), _mm256_set1_epi32(low)};
}

inline Sum accumulate(Sum sum, Pixels pixels, Weights weights) {
  return {_mm256_add_epi32(sum.high, _mm256_madd_epi16(pixels, weights.high)),
          _mm256_add_epi32(sum.low, _mm256_madd_epi16(pixels, weights.low))};
}

inline __m256i join(Sum sum) {
  return _mm256_add_epi32(_mm256_slli_epi32(sum.high, kLowBits), sum.low);
}

inline Pixels load_rgb(const uint8_t* p) {
  const __m256i order =
      _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 6, -1, 9, -1, 7,
                       -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), order);
}

inline __m128i finish_rgb(Sum sum) {
  const __m256i halves = join(sum);
  const __m128i value =
      _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  return _mm_srai_epi32(_mm_add_epi32(value, _mm_set1_epi32(kHalf)), kWeightBits);
}

inline void store_rgb(const Sum sums[kRowsPerStep], uint8_t* const out[kRowsPerStep],
                      ptrdiff_t offset) {
  const __m128i pixels =
      _mm_packus_epi16(_mm_packs_epi32(finish_rgb(sums[0]), finish_rgb(sums[1])),
                       _mm_packs_epi32(finish_rgb(sums[2]), finish_rgb(sums[3])));
  const int32_t rgb[kRowsPerStep] = {_mm_extract_epi32(pixels, 0), _mm_extract_epi32(pixels, 1),
                                     _mm_extract_epi32(pixels, 2), _mm_extract_epi32(pixels, 3)};
  for (int32_t r = 0; r < kRowsPerStep; ++r) __builtin_memcpy(out[r] + offset, &rgb[r], 4);
}

// Unpacking works within each half of a vector, and so does the packing in store_columns(): the
// columns come out in order.
inline void zip(const uint8_t* a, const uint8_t* b, Pixels pixels[4]) {
  const __m256i row_a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i row_b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  const __m256i left = _mm256_unpacklo_epi8(row_a, row_b);
  const __m256i right = _mm256_unpackhi_epi8(row_a, row_b);
  const __m256i nothing = _mm256_setzero_si256();
  pixels[0] = _mm256_unpacklo_epi8(left, nothing);
  pixels[1] = _mm256_unpackhi_epi8(left, nothing);
  pixels[2] = _mm256_unpacklo_epi8(right, nothing);
  pixels[3] = _mm256_unpackhi_epi8(right, nothing);
}

inline __m256i finish(Sum sum) {
  return _mm256_srai_epi32(_mm256_add_epi32(join(sum), _mm256_set1_epi32(kHalf)), kWeightBits);
}

inline void store_columns(const Sum sums[4], uint8_t* out) {
  const __m256i left = _mm256_packs_epi32(finish(sums[0]), finish(sums[1]));
  const __m256i right = _mm256_packs_epi32(finish(sums[2]), finish(sums[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(left, right));
}

#elif defined(EDGEVLM_TIER_AVX512)

#define EDGEVLM_TIER_NAME "avx512"
#define EDGEVLM_TIER_TABLE kAvx512Tier

constexpr int32_t kPairsPerStep = 4;  // one in each quarter of a vector
constexpr int32_t kColumnsPerStep = 64;

using Pixels = __m512i;
struct Weights {
  __m512i high, low;
};
struct Sum {
  __m512i high, low;
};

inline Sum zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }

inline Weights load_weights(const TapPair* taps) {
  const __m512i pairs =  // high 0, low 0, high 1, low 1, ...
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(taps)));
  const __m512i high = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i low = _mm512_add_epi32(high, _mm512_set1_epi32(1));
  return {_mm512_permutexvar_epi32(high, pairs), _mm512_permutexvar_epi32(low, pairs)};
}

inline Weights broadcast_weights(const TapPair& taps) {
  int32_t high, low;
  __builtin_memcpy(&high, taps.high, 4);
  __builtin_memcpy(&low, taps.low, 4);
  return {_mm512_set1_epi32(high), _mm512_set1_epi32(low)};
}

inline Sum accumulate(Sum sum, Pixels pixels, Weights weights) {
  return {_mm512_dpwssd_epi32(sum.high, pixels, weights.high),
          _mm512_dpwssd_epi32(sum.low, pixels, weights.low)};
}

inline __m512i join(Sum sum) {
  return _mm512_add_epi32(_mm512_slli_epi32(sum.high, kLowBits), sum.low);
}

inline __m512i finish(__m512i sum) {
  return _mm512_srai_epi32(_mm512_add_epi32(sum, _mm512_set1_epi32(kHalf)), kWeightBits);
}

inline Pixels load_rgb(const uint8_t* p) {
  // Bytes 0, 3, 1, 4, 2, 5 of each pair of pixels, every one the lower half of an int16.
  const __m512i order = _mm512_setr_epi64(0x0004000100030000, 0x0000000000050002,  //
                                          0x000a000700090006, 0x00000000000b0008,  //
                                          0x0010000d000f000c, 0x000000000011000e,  //
                                          0x0016001300150012, 0x0000000000170014);
  const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_maskz_permutexvar_epi8(0x0555055505550555, order, _mm512_castsi256_si512(pixels));
}

inline void store_rgb(const Sum sums[kRowsPerStep], uint8_t* const out[kRowsPerStep],
                      ptrdiff_t offset) {
  // Adds the quarters of each row's sum while gathering the rows into one vector.
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  };
  const __m512i a = halves(join(sums[0]), join(sums[1]));
  const __m512i b = halves(join(sums[2]), join(sums[3]));
  const __m512i value =
      finish(_mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)));
  const __m128i pixels = _mm512_cvtusepi32_epi8(_mm512_max_epi32(value, _mm512_setzero_si512()));
  const int32_t rgb[kRowsPerStep] = {_mm_extract_epi32(pixels, 0), _mm_extract_epi32(pixels, 1),
                                     _mm_extract_epi32(pixels, 2), _mm_extract_epi32(pixels, 3)};
  for (int32_t r = 0; r < kRowsPerStep; ++r) __builtin_memcpy(out[r] + offset, &rgb[r], 4);
}

// In order, as with AVX2.
inline void zip(const uint8_t* a, const uint8_t* b, Pixels pixels[4]) {
  const __m512i row_a = _mm512_loadu_si512(a);
  const __m512i row_b = _mm512_loadu_si512(b);
  const __m512i left = _mm512_unpacklo_epi8(row_a, row_b);
  const __m512i right = _mm512_unpackhi_epi8(row_a, row_b);
  const __m512i nothing = _mm512_setzero_si512();
  pixels[0] = _mm512_unpacklo_epi8(left, nothing);
  pixels[1] = _mm512_unpackhi_epi8(left, nothing);
  pixels[2] = _mm512_unpacklo_epi8(right, nothing);
  pixels[3] = _mm512_unpackhi_epi8(right, nothing);
}

inline void store_columns(const Sum sums[4], uint8_t* out) {
  const __m512i left = _mm512_packs_epi32(finish(join(sums[0])), finish(join(sums[1])));
  const __m512i right = _mm512_packs_epi32(finish(join(sums[2])), finish(join(sums[3])));
  _mm512_storeu_si512(out, _mm512_packus_epi16(left, right));
}

#elif defined(EDGEVLM_TIER_NEON)

#define EDGEVLM_TIER_NAME "neon"
#define EDGEVLM_TIER_TABLE kNeonTier

constexpr int32_t kPairsPerStep = 1;
constexpr int32_t kColumnsPerStep = 16;

using Pixels = int16x8_t;
struct Weights {
  int16x8_t high, low;
};
struct Sum {  // products are added without folding the pairs, which store_*() does once
  int32x4_t high[2], low[2];
};

inline Sum zero() {
  const int32x4_t nothing = vdupq_n_s32(0);
  return {{nothing, nothing}, {nothing, nothing}};
}

inline Weights load_weights(const TapPair* taps) {
  const int32x2_t pair = vreinterpret_s32_s16(vld1_s16(taps->high));
  return {vreinterpretq_s16_s32(vdupq_lane_s32(pair, 0)),
          vreinterpretq_s16_s32(vdupq_lane_s32(pair, 1))};
}

inline Weights broadcast_weights(const TapPair& taps) { return load_weights(&taps); }

inline Sum accumulate(Sum sum, Pixels pixels, Weights weights) {
  return {{vmlal_s16(sum.high[0], vget_low_s16(pixels), vget_low_s16(weights.high)),
           vmlal_high_s16(sum.high[1], pixels, weights.high)},
          {vmlal_s16(sum.low[0], vget_low_s16(pixels), vget_low_s16(weights.low)),
           vmlal_high_s16(sum.low[1], pixels, weights.low)}};
}

inline int32x4_t finish(const Sum& sum) {
  const int32x4_t high = vpaddq_s32(sum.high[0], sum.high[1]);
  const int32x4_t value =
      vaddq_s32(vshlq_n_s32(high, kLowBits), vpaddq_s32(sum.low[0], sum.low[1]));
  return vshrq_n_s32(vaddq_s32(value, vdupq_n_s32(kHalf)), kWeightBits);
}

inline uint8x16_t finish(const Sum sums[4]) {
  const int16x8_t left = vqmovn_high_s32(vqmovn_s32(finish(sums[0])), finish(sums[1]));
  const int16x8_t right = vqmovn_high_s32(vqmovn_s32(finish(sums[2])), finish(sums[3]));
  return vqmovun_high_s16(vqmovun_s16(left), right);
}

inline Pixels load_rgb(const uint8_t* p) {
  const uint8x16_t order = {0, 255, 3, 255, 1, 255, 4, 255, 2, 255, 5, 255, 255, 255, 255, 255};
  const uint8x16_t pixels = vcombine_u8(vld1_u8(p), vdup_n_u8(0));
  return vreinterpretq_s16_u8(vqtbl1q_u8(pixels, order));
}

inline void store_rgb(const Sum sums[kRowsPerStep], uint8_t* const out[kRowsPerStep],
                      ptrdiff_t offset) {
  uint8_t rgb[kRowsPerStep][4];
  vst1q_u8(rgb[0], finish(sums));
  for (int32_t r = 0; r < kRowsPerStep; ++r) __builtin_memcpy(out[r] + offset, rgb[r], 4);
}

inline void zip(const uint8_t* a, const uint8_t* b, Pixels pixels[4]) {
  const uint8x16_t row_a = vld1q_u8(a);
  const uint8x16_t row_b = vld1q_u8(b);
  const uint8x16_t left = vzip1q_u8(row_a, row_b);
  const uint8x16_t right = vzip2q_u8(row_a, row_b);
  pixels[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(left)));
  pixels[1] = vreinterpretq_s16_u16(vmovl_high_u8(left));
  pixels[2] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(right)));
  pixels[3] = vreinterpretq_s16_u16(vmovl_high_u8(right));
}

inline void store_columns(const Sum sums[4], uint8_t* out) { vst1q_u8(out, finish(sums)); }

#endif

}  // namespace
}  // namespace edgevlm
