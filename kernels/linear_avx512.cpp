// The int8 product for CPUs with AVX-512 and VNNI: vpdpbusd adds four uint8 × int8 products to an
// int32. Rows are uint8 around 128; what 128 adds to a sum is known from the column and taken off.
//
// The matrix is cut into panels of 64 columns. A panel is brought into the order that the
// instruction wants when its turn comes, which costs a twentieth of the multiplication for the
// hundreds of rows of a picture, so no second copy of the weights is kept.
#include <atomic>
#include <cstring>

#include "avx512.h"
#include "linear.h"

namespace edgevlm {
namespace {

constexpr size_t kPanel = 64;           // columns: four registers of 16 sums
constexpr size_t kTile = 6;             // rows: 24 registers hold the sums
constexpr size_t kBlock = 128 * kTile;  // rows of one task
constexpr size_t kChunk = 2048;         // rows of the matrix that are packed at a time,
constexpr size_t kFewChunk = 256;       // or, for few rows, what the L1 cache holds beside them
constexpr size_t kFew = 64;
constexpr size_t kAhead = 64;        // rows of the matrix that are asked for ahead of use: they
                                     // lie too far apart for the CPU to guess
constexpr size_t kRowsPerTask = 16;  // when rounding
constexpr float kLargest = 127;
constexpr float kSmallestPeak = 1e-9F;  // an empty row would divide by 0
constexpr int kZeroPoint = 128;

struct Job {
  const Linear& layer;
  size_t part;        // values of a row that share a scale
  size_t padded;      // length of a part, rounded up to a multiple of 4
  size_t n_groups;    // of panels that are packed together
  size_t block;       // rows of one task
  size_t chunk;       // rows of the matrix that are packed at a time, of one part
  uint8_t* integers;  // [n_rows, n_parts, padded]
  float* row_scales;  // [n_rows, n_parts]
  std::atomic<bool> failed{false};

  size_t row_bytes() const { return layer.n_parts * padded; }
};

void quantize(const float* values, size_t n, size_t padded, uint8_t* integers, float* scale) {
  __m512 peaks = _mm512_set1_ps(kSmallestPeak);
  for (size_t i = 0; i < n; i += 16) {
    peaks = _mm512_max_ps(peaks, _mm512_abs_ps(_mm512_maskz_loadu_ps(first16(n - i), values + i)));
  }
  *scale = _mm512_reduce_max_ps(peaks) * (1 / kLargest);
  const __m512 divisor = _mm512_set1_ps(*scale);
  for (size_t i = 0; i < padded; i += 16) {
    const __mmask16 some = i < n ? first16(n - i) : 0;
    const __m512 value = _mm512_div_ps(_mm512_maskz_loadu_ps(some, values + i), divisor);
    const __m128i rounded = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value));
    _mm_mask_storeu_epi8(integers + i, first16(padded - i),
                         _mm_xor_si128(rounded, _mm_set1_epi8(-kZeroPoint)));
  }
}

void quantize_some(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Linear& layer = job.layer;
  const size_t end = least(layer.n_rows, (index + 1) * kRowsPerTask);
  for (size_t i = index * kRowsPerTask * layer.n_parts; i < end * layer.n_parts; ++i) {
    quantize(layer.rows + i * job.part, job.part, job.padded, job.integers + i * job.padded,
             job.row_scales + i);
  }
}

// 4 rows of 64 columns → [64, 4].
void pack_four(const __m512i (&row)[4], __m512i (&packed)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  // Each lane of these holds four of the lane's 16 columns: a transposition of lanes is left.
  const __m512i quarter0 = _mm512_unpacklo_epi16(low01, low23);
  const __m512i quarter1 = _mm512_unpackhi_epi16(low01, low23);
  const __m512i quarter2 = _mm512_unpacklo_epi16(high01, high23);
  const __m512i quarter3 = _mm512_unpackhi_epi16(high01, high23);
  const __m512i front01 = _mm512_shuffle_i32x4(quarter0, quarter1, 0x44);
  const __m512i front23 = _mm512_shuffle_i32x4(quarter2, quarter3, 0x44);
  const __m512i back01 = _mm512_shuffle_i32x4(quarter0, quarter1, 0xee);
  const __m512i back23 = _mm512_shuffle_i32x4(quarter2, quarter3, 0xee);
  packed[0] = _mm512_shuffle_i32x4(front01, front23, 0x88);
  packed[1] = _mm512_shuffle_i32x4(front01, front23, 0xdd);
  packed[2] = _mm512_shuffle_i32x4(back01, back23, 0x88);
  packed[3] = _mm512_shuffle_i32x4(back01, back23, 0xdd);
}

// `n` rows of the columns of kWide panels → [kWide, padded / 4, 64, 4], and what each column's sums
// begin with to end without the zero point, [kWide, 64]. What lies past the rows or columns is 0.
template <int kWide>
void pack(const int8_t* weights, size_t stride, size_t n, size_t padded, size_t n_columns,
          int8_t* packed, int32_t* offsets) {
  __mmask64 columns[kWide];
  for (size_t w = 0; w < kWide; ++w) {
    columns[w] = n_columns > w * kPanel ? first64(n_columns - w * kPanel) : 0;
  }
  __m512i sum[kWide][4] = {};
  const __m512i zero_point = _mm512_set1_epi8(static_cast<char>(kZeroPoint));
  for (size_t k = 0; k < padded; k += 4) {
#pragma GCC unroll 2
    for (size_t w = 0; w < kWide; ++w) {
      __m512i row[4] = {};
      for (size_t i = 0; i < least(4, n - k); ++i) {
        const int8_t* values = weights + (k + i) * stride + w * kPanel;
        _mm_prefetch(values + kAhead * stride, _MM_HINT_T1);
        row[i] = _mm512_maskz_loadu_epi8(columns[w], values);
      }
      __m512i four[4];
      pack_four(row, four);
      for (size_t j = 0; j < 4; ++j) {
        _mm512_store_si512(packed + (w * padded + k) * kPanel + j * kLine, four[j]);
        sum[w][j] = _mm512_dpbusd_epi32(sum[w][j], zero_point, four[j]);
      }
    }
  }
  for (size_t w = 0; w < kWide; ++w) {
    for (size_t j = 0; j < 4; ++j) {
      _mm512_storeu_si512(offsets + w * kPanel + 16 * j,
                          _mm512_sub_epi32(_mm512_setzero_si512(), sum[w][j]));
    }
  }
}

__m512 activated(__m512 x, Activation activation, float alpha) {
  if (activation == Activation::kNone) return x;
  __m512 factor;  // x · sigmoid(y) is x / (1 + 2^(factor · x))
  if (activation == Activation::kQuickGelu) {
    factor = _mm512_set1_ps(-kLog2E * alpha);
  } else {  // (1 + tanh(y)) / 2 is sigmoid(2 y)
    factor = _mm512_fmadd_ps(_mm512_set1_ps(-kLog2E * 0.0713548162726F), _mm512_mul_ps(x, x),
                             _mm512_set1_ps(-kLog2E * 1.59576912161F));
  }
  const __m512 inverse = power_of_2<6>(_mm512_mul_ps(x, factor));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), inverse));
}

// Inline, because gcc 12 keeps the sums of the intrinsic in memory: half the speed.
inline void add_products(__m512i& sum, __m512i rows, __m512i columns) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(rows), "v"(columns));
}

// Some rows of 64 columns in the order of `pack`.
struct Chunk {
  const int8_t* packed;
  const int32_t* offsets;  // [64]: what the sums begin with
  size_t part;             // that the rows belong to, and
  size_t begin;            // where in it they begin
  size_t padded;           // how many they are, rounded up to a multiple of 4
  bool first, last;        // of the columns
};

// Adds a chunk's products with `kRows` rows to `total`, and puts it out after the last chunk.
template <int kRows>
void multiply(const Job& job, const Chunk& chunk, size_t row, size_t panel, float* total) {
  const Linear& layer = job.layer;
  const size_t row_bytes = job.row_bytes();
  const bool one_part = layer.n_parts == 1;  // the row's scale last, as the function's body does it
  __m512i sums[kRows][4];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_loadu_si512(chunk.offsets + 16 * j);
  }
  const uint8_t* integers = job.integers + row * row_bytes + chunk.part * job.padded + chunk.begin;
  const int8_t* packed = chunk.packed;
  for (size_t k = 0; k < chunk.padded; k += 4, packed += 4 * kPanel) {
    const __m512i columns[4] = {_mm512_load_si512(packed), _mm512_load_si512(packed + kLine),
                                _mm512_load_si512(packed + 2 * kLine),
                                _mm512_load_si512(packed + 3 * kLine)};
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, integers + r * row_bytes + k, sizeof four);
      const __m512i rows = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add_products(sums[r][j], rows, columns[j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m512 scale =
        _mm512_set1_ps(one_part ? 1 : job.row_scales[(row + r) * layer.n_parts + chunk.part]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 sum = _mm512_cvtepi32_ps(sums[r][j]);
      float* so_far = total + r * kPanel + 16 * j;
      _mm512_store_ps(so_far, chunk.first ? _mm512_mul_ps(sum, scale)
                                          : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(so_far)));
    }
  }
  if (!chunk.last) return;
  for (size_t j = 0; j < 4; ++j) {
    const size_t column = panel + 16 * j;
    if (column >= layer.n_out) break;
    const __mmask16 some = first16(layer.n_out - column);
    const __m512 scales = _mm512_maskz_loadu_ps(some, layer.scales + column);
    const __m512 bias = layer.bias == nullptr ? _mm512_setzero_ps()
                                              : _mm512_maskz_loadu_ps(some, layer.bias + column);
    for (int r = 0; r < kRows; ++r) {
      __m512 value = _mm512_mul_ps(_mm512_load_ps(total + r * kPanel + 16 * j), scales);
      value = _mm512_mul_ps(value, _mm512_set1_ps(one_part ? job.row_scales[row + r] : 1));
      value = _mm512_add_ps(value, bias);
      _mm512_mask_storeu_ps(layer.out + (row + r) * layer.n_out + column, some,
                            activated(value, layer.activation, layer.alpha));
    }
  }
}

constexpr decltype(&multiply<1>) kMultiply[] = {multiply<1>, multiply<2>, multiply<3>,
                                                multiply<4>, multiply<5>, multiply<6>};

template <int kWide>
void multiply_some(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Linear& layer = job.layer;
  static thread_local Scratch scratch;
  const size_t column = index % job.n_groups * kWide * kPanel;
  const size_t begin = index / job.n_groups * job.block;
  const size_t end = least(layer.n_rows, begin + job.block);
  const size_t packed_bytes = rounded_up(job.chunk, 4) * kWide * kPanel;
  auto* packed = static_cast<int8_t*>(scratch.get(
      packed_bytes + kWide * kPanel * (sizeof(int32_t) + (end - begin) * sizeof(float))));
  if (packed == nullptr) {
    job.failed = true;
    return;
  }
  auto* offsets = reinterpret_cast<int32_t*>(packed + packed_bytes);
  auto* totals = reinterpret_cast<float*>(offsets + kWide * kPanel);
  for (size_t k = 0, n = 0; k < layer.n_in; k += n) {
    const size_t part = k / job.part;
    n = least(job.chunk, (part + 1) * job.part - k);
    const size_t padded = rounded_up(n, 4);
    pack<kWide>(layer.weights + k * layer.n_out + column, layer.n_out, n, padded,
                layer.n_out - column, packed, offsets);
    for (size_t w = 0; w < kWide; ++w) {
      const Chunk chunk = {
          packed + w * padded * kPanel, offsets + w * kPanel, part, k % job.part, padded, k == 0,
          k + n == layer.n_in};
      float* total = totals + w * (end - begin) * kPanel;
      for (size_t row = begin; row < end; row += kTile, total += kTile * kPanel) {
        kMultiply[least(kTile, end - row) - 1](job, chunk, row, column + w * kPanel, total);
      }
    }
  }
}

}  // namespace

bool linear_avx512(const Linear& layer, Parallel& parallel) {
  if (layer.n_rows == 0) return true;
  static thread_local Scratch scratch;
  const size_t part = layer.n_in / layer.n_parts;
  const size_t padded = rounded_up(part, 4);
  const size_t n_scales = layer.n_rows * layer.n_parts;
  const bool few = layer.n_rows <= kFew;
  const size_t group = few ? 2 * kPanel : kPanel;
  auto* scales = static_cast<float*>(scratch.get(n_scales * (sizeof(float) + padded)));
  if (scales == nullptr) return false;
  const size_t n_blocks = (layer.n_rows + kBlock - 1) / kBlock;
  const size_t n_tiles = (layer.n_rows + kTile - 1) / kTile;
  Job job = {layer,
             part,
             padded,
             (layer.n_out + group - 1) / group,
             (n_tiles + n_blocks - 1) / n_blocks * kTile,
             least(part, few ? kFewChunk : kChunk),
             reinterpret_cast<uint8_t*>(scales + n_scales),
             scales};
  const size_t n_roundings = (layer.n_rows + kRowsPerTask - 1) / kRowsPerTask;
  return parallel.run(quantize_some, n_roundings, &job) &&
         parallel.run(few ? multiply_some<2> : multiply_some<1>, n_blocks * job.n_groups, &job) &&
         !job.failed;
}

}  // namespace edgevlm
