// The int8 product for CPUs with AVX-512 and VNNI: vpdpbusd adds four uint8 × int8 products to an
// int32. Rows are uint8 around 128; what 128 adds to a sum is known from the column and taken off.
//
// The matrix is cut into panels of 64 columns. A panel is brought into the order that the
// instruction wants when its turn comes, which costs a twentieth of the multiplication for the
// hundreds of rows of a picture, so no second copy of the weights is kept.
#include <atomic>
#include <cmath>
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

// Calls step(begin, loaded) for 64 values after another; past the n-th they are 0.
template <typename Step>
inline void each64(const float* values, size_t n, Step step) {
  __m512 loaded[4];
  size_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) loaded[j] = _mm512_loadu_ps(values + i + 16 * j);
    step(i, loaded);
  }
  if (i == n) return;
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    const size_t first = i + 16 * j;
    loaded[j] = _mm512_maskz_loadu_ps(first < n ? first16(n - first) : 0, values + first);
  }
  step(i, loaded);
}

void quantize(const float* values, size_t n, size_t padded, uint8_t* integers, float* scale) {
  __m512 peaks[4] = {};
  each64(values, n, [&](size_t, const __m512(&value)[4]) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) peaks[j] = _mm512_max_ps(peaks[j], _mm512_abs_ps(value[j]));
  });
  const float peak = _mm512_reduce_max_ps(
      _mm512_max_ps(_mm512_max_ps(peaks[0], peaks[1]), _mm512_max_ps(peaks[2], peaks[3])));
  *scale = (peak > kSmallestPeak ? peak : kSmallestPeak) * (1 / kLargest);
  const __m512 divisor = _mm512_set1_ps(*scale);
  const __m512 inverse = _mm512_set1_ps(1 / *scale);
  // Packing goes by lanes of 128 bits: 4 values of each register are in turn.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  each64(values, n, [&](size_t i, const __m512(&value)[4]) {
    __m512i rounded[4];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {  // the exact quotient, for less than a division
      const __m512 near = _mm512_mul_ps(value[j], inverse);
      const __m512 rest = _mm512_fnmadd_ps(near, divisor, value[j]);
      rounded[j] = _mm512_cvtps_epi32(_mm512_fmadd_ps(rest, inverse, near));
    }
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]),
                                              _mm512_packs_epi32(rounded[2], rounded[3]));
    const __m512i ordered =
        _mm512_xor_si512(_mm512_permutexvar_epi32(order, packed), _mm512_set1_epi8(-kZeroPoint));
    if (i + 64 <= padded) {
      _mm512_storeu_si512(integers + i, ordered);
    } else {
      _mm512_mask_storeu_epi8(integers + i, first64(padded - i), ordered);
    }
  });
}

inline float sum_of(const __m512 (&lanes)[4]) {
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(lanes[0], lanes[1]), _mm512_add_ps(lanes[2], lanes[3])));
}

// The layer norm of a row.
void normalize(const Linear& layer, const float* row, float* normed) {
  const size_t n = layer.n_in;
  const float each = 1 / static_cast<float>(n);
  __m512 sums[4] = {};
  each64(row, n, [&](size_t, const __m512(&value)[4]) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) sums[j] = _mm512_add_ps(sums[j], value[j]);
  });
  const __m512 mean = _mm512_set1_ps(sum_of(sums) * each);
  __m512 squares[4] = {};
  each64(row, n, [&](size_t i, const __m512(&value)[4]) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const size_t first = i + 16 * j;
      const __mmask16 some = first < n ? first16(n - first) : 0;
      const __m512 apart = _mm512_maskz_sub_ps(some, value[j], mean);
      squares[j] = _mm512_fmadd_ps(apart, apart, squares[j]);
    }
  });
  const float deviation = std::sqrt(sum_of(squares) * each + layer.epsilon);
  const __m512 factor = _mm512_set1_ps(1 / deviation);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 some = first16(n - i);
    const __m512 apart =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, row + i), mean), factor);
    const __m512 value = _mm512_fmadd_ps(apart, _mm512_maskz_loadu_ps(some, layer.norm_scales + i),
                                         _mm512_maskz_loadu_ps(some, layer.norm_bias + i));
    if (i + 16 <= n) {
      _mm512_storeu_ps(normed + i, value);
    } else {
      _mm512_mask_storeu_ps(normed + i, some, value);
    }
  }
}

void quantize_some(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Linear& layer = job.layer;
  static thread_local Scratch scratch;
  auto* normed = static_cast<float*>(scratch.get(layer.n_in * sizeof(float)));
  if (normed == nullptr) {
    job.failed = true;
    return;
  }
  const size_t end = least(layer.n_rows, (index + 1) * kRowsPerTask);
  for (size_t i = index * kRowsPerTask; i < end; ++i) {
    const float* row = layer.rows + i * layer.n_in;
    if (layer.norm_scales != nullptr) {
      normalize(layer, row, normed);
      row = normed;
    }
    for (size_t part = 0; part < layer.n_parts; ++part) {
      const size_t n = i * layer.n_parts + part;
      quantize(row + part * job.part, job.part, job.padded, job.integers + n * job.padded,
               job.row_scales + n);
    }
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
      __m512i row[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        const int8_t* values = weights + (k + i) * stride + w * kPanel;
        _mm_prefetch(values + kAhead * stride, _MM_HINT_T1);
        row[i] = k + i < n ? _mm512_maskz_loadu_epi8(columns[w], values) : _mm512_setzero_si512();
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
  // No further than where the sum is finite; its inverse by a step of Newton's from 14 bits.
  const __m512 power = _mm512_min_ps(_mm512_mul_ps(x, factor), _mm512_set1_ps(126));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1), power_of_2<5>(power));
  const __m512 near = _mm512_rcp14_ps(sum);
  const __m512 rest = _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2));
  return _mm512_mul_ps(_mm512_mul_ps(x, near), rest);
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
  const bool whole = chunk.first && chunk.last;
#pragma GCC unroll 6
  for (int r = 0; r < kRows && !whole; ++r) {
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
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const size_t column = panel + 16 * j;
    if (column >= layer.n_out) break;
    const __mmask16 some = first16(layer.n_out - column);
    const __m512 scales = _mm512_maskz_loadu_ps(some, layer.scales + column);
    const __m512 bias = layer.bias == nullptr ? _mm512_setzero_ps()
                                              : _mm512_maskz_loadu_ps(some, layer.bias + column);
    __m512 values[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      __m512 value =
          whole ? _mm512_cvtepi32_ps(sums[r][j]) : _mm512_load_ps(total + r * kPanel + 16 * j);
      value = _mm512_mul_ps(value, scales);
      value = _mm512_mul_ps(value, _mm512_set1_ps(one_part ? job.row_scales[row + r] : 1));
      values[r] = activated(_mm512_add_ps(value, bias), layer.activation, layer.alpha);
    }
    if (layer.residual != nullptr) {  // read before any row is written: rows lie 4 KiB apart
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const float* residual = layer.residual + (row + r) * layer.n_out + column;
        values[r] = _mm512_add_ps(values[r], _mm512_maskz_loadu_ps(some, residual));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      _mm512_mask_storeu_ps(layer.out + (row + r) * layer.n_out + column, some, values[r]);
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
