// Attention for CPUs with AVX-512 and bfloat16: vdpbf16ps adds two products to a float32. Keys and
// values are brought into the order that the instruction wants once, then every block of queries
// takes scores, softmax and mixture in one go, so that the scores stay in the cache.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "avx512.h"

namespace edgevlm {
namespace {

constexpr size_t kPanel = 64;          // columns of a product: four registers of 16 sums
constexpr size_t kTile = 6;            // rows: 24 registers hold the sums
constexpr size_t kBlock = 16 * kTile;  // queries of one task

using Pair = uint32_t;  // two neighbours along the sum, bfloat16

struct Job {
  const Attention& attention;
  size_t n_keys;     // the past's and the rows'
  size_t n_panels;   // of 64 keys
  size_t n_columns;  // width, rounded up to 16
  size_t block;      // queries of one task
  size_t n_blocks;
  Pair* keys;    // [n_batch, n_kv_heads, n_panels, width / 2, 64]
  Pair* values;  // [n_batch, n_kv_heads, n_panels · 32, n_columns]
  std::atomic<bool> failed{false};

  size_t key_pairs() const { return n_panels * kPanel * attention.width / 2; }
  size_t value_pairs() const { return n_panels * kPanel / 2 * n_columns; }
};

// 32 values → 32 bfloat16 in their order, and 16 → 16.
__m512i narrowed(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

__m256i narrowed(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

__m512 load(__mmask16 some, const float* values) { return _mm512_maskz_loadu_ps(some, values); }

__m512 load(__mmask16 some, const uint16_t* halves) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, halves));
}

// The first 32 of `n` values → 16 pairs; zeros past the last.
template <typename Value>
__m512i paired(const Value* values, size_t n) {
  const __m512 second = load(n > 16 ? first16(n - 16) : 0, values + (n > 16 ? 16 : 0));
  return narrowed(load(first16(n), values), second);
}

// A row of `width` floats, times `factor`, → width / 2 pairs.
void pair_up(const float* row, size_t width, float factor, Pair* pairs) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (size_t i = 0; i < width; i += 32) {
    const size_t left = width - i;
    const __m512 first = load(first16(left), row + i);
    const __m512 second = load(left > 16 ? first16(left - 16) : 0, row + i + (left > 16 ? 16 : 0));
    _mm512_mask_storeu_epi32(pairs + i / 2, first16(left / 2),
                             narrowed(_mm512_mul_ps(first, scale), _mm512_mul_ps(second, scale)));
  }
}

// 16 rows of 16 pairs → 16 columns.
void transpose(__m512i (&rows)[16]) {
  __m512i halves[16];
  for (size_t i = 0; i < 16; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (size_t i = 0; i < 16; i += 4) {  // now lane l of rows[i + c] has column 4 l + c of 4 rows
    rows[i] = _mm512_unpacklo_epi64(halves[i], halves[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(halves[i], halves[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(halves[i + 1], halves[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(halves[i + 1], halves[i + 3]);
  }
  for (size_t c = 0; c < 4; ++c) {
    const __m512i front01 = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0x44);
    const __m512i back01 = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0xee);
    const __m512i front23 = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0x44);
    const __m512i back23 = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0xee);
    halves[c] = _mm512_shuffle_i32x4(front01, front23, 0x88);
    halves[c + 4] = _mm512_shuffle_i32x4(front01, front23, 0xdd);
    halves[c + 8] = _mm512_shuffle_i32x4(back01, back23, 0x88);
    halves[c + 12] = _mm512_shuffle_i32x4(back01, back23, 0xdd);
  }
  std::memcpy(rows, halves, sizeof rows);
}

// Keys → a column each: 16 pairs of 16 keys at a time.
void arrange_keys(const Job& job, const float* rows, size_t kv_head, Pair* arranged) {
  const Attention& a = job.attention;
  const size_t stride = a.n_kv_heads * a.width;
  const size_t n_pairs = a.width / 2;
  for (size_t i = 0; i < job.n_panels * kPanel; i += 16) {
    Pair* columns = arranged + i / kPanel * n_pairs * kPanel + i % kPanel;
    for (size_t k = 0; k < n_pairs; k += 16) {
      const size_t left = a.width - 2 * k;
      __m512i pairs[16] = {};
      for (size_t j = 0; j < 16 && i + j < job.n_keys; ++j) {
        const size_t row = i + j;
        pairs[j] = row < a.n_past
                       ? paired(a.past_keys + row * stride + kv_head * a.width + 2 * k, left)
                       : paired(rows + (row - a.n_past) * stride + 2 * k, left);
      }
      transpose(pairs);
      for (size_t j = 0; j < least(16, n_pairs - k); ++j) {
        _mm512_store_si512(columns + (k + j) * kPanel, pairs[j]);
      }
    }
  }
}

// Values of the past lie by channel: 16 pairs of rows of 16 channels at a time.
void arrange_past_values(const Attention& a, size_t kv_head, size_t n_columns, Pair* values) {
  const uint16_t* channels = a.past_values + kv_head * a.width * a.n_past;
  const size_t n_pairs = a.n_past / 2;
  for (size_t i = 0; i < n_pairs; i += 16) {
    const size_t n = least(16, n_pairs - i);
    for (size_t k = 0; k < n_columns; k += 16) {
      __m512i pairs[16] = {};
      for (size_t c = 0; c < 16 && k + c < a.width; ++c) {
        pairs[c] = paired(channels + (k + c) * a.n_past + 2 * i, 2 * n);
      }
      transpose(pairs);
      for (size_t j = 0; j < n; ++j) {
        _mm512_store_si512(values + (i + j) * n_columns + k, pairs[j]);
      }
    }
  }
}

// Up to 16 channels of a row of values; zeros where there is none.
__m512 value_row(const Attention& a, const float* values, size_t kv_head, size_t row, size_t k) {
  const __mmask16 some = k < a.width ? first16(a.width - k) : 0;
  if (row >= a.n_past + a.n) return _mm512_setzero_ps();
  if (row >= a.n_past) {
    return load(some, values + (row - a.n_past) * a.n_kv_heads * a.width + k);
  }
  uint16_t column[16] = {};
  for (size_t j = 0; j < 16 && k + j < a.width; ++j) {
    column[j] = a.past_values[(kv_head * a.width + k + j) * a.n_past + row];
  }
  return load(some, column);
}

// One head of keys and values → the order of the products; what lies past the last row is 0.
void arrange(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Attention& a = job.attention;
  const size_t stride = a.n_kv_heads * a.width;
  const size_t kv_head = index % a.n_kv_heads;
  const size_t first = index / a.n_kv_heads * a.n * stride + kv_head * a.width;
  arrange_keys(job, a.keys + first, kv_head, job.keys + index * job.key_pairs());
  Pair* values = job.values + index * job.value_pairs();
  arrange_past_values(a, kv_head, job.n_columns, values);
  for (size_t i = a.n_past / 2 * 2; i < job.n_panels * kPanel; i += 2) {
    for (size_t k = 0; k < job.n_columns; k += 16) {
      const __m512 low = value_row(a, a.values + first, kv_head, i, k);
      const __m512 high = value_row(a, a.values + first, kv_head, i + 1, k);
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(narrowed(low)),
                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(high)), 16));
      _mm512_store_si512(values + i / 2 * job.n_columns + k, pairs);
    }
  }
}

// Inline assembly, because gcc 12 keeps the sums of the intrinsic in memory.
inline void add_products(__m512& sum, __m512i rows, __m512i columns) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(rows), "v"(columns));
}

// rows [kTile, n_pairs] (`row_pairs` apart) · columns [n_pairs, 16 · kWide] (`column_pairs` apart).
template <int kWide>
void multiply(const Pair* rows, size_t row_pairs, const Pair* columns, size_t column_pairs,
              size_t n_pairs, float* out, size_t out_stride) {
  __m512 sums[kTile][kWide];
#pragma GCC unroll 6
  for (size_t r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sums[r][j] = _mm512_setzero_ps();
  }
  for (size_t k = 0; k < n_pairs; ++k) {
    __m512i column[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      column[j] = _mm512_load_si512(columns + k * column_pairs + 16 * j);
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < kTile; ++r) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(rows[r * row_pairs + k]));
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) add_products(sums[r][j], row, column[j]);
    }
  }
#pragma GCC unroll 6
  for (size_t r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) _mm512_store_ps(out + r * out_stride + 16 * j, sums[r][j]);
  }
}

// The same for 16, 32, 48 or 64 columns.
void multiply_columns(size_t n_columns, const Pair* rows, size_t row_pairs, const Pair* columns,
                      size_t column_pairs, size_t n_pairs, float* out, size_t out_stride) {
  const auto product = n_columns == 64   ? multiply<4>
                       : n_columns == 48 ? multiply<3>
                       : n_columns == 32 ? multiply<2>
                                         : multiply<1>;
  product(rows, row_pairs, columns, column_pairs, n_pairs, out, out_stride);
}

// exp(score - largest) of the first `n` scores, in place and as pairs, 0 up to `padded`; their sum.
float soften(float* scores, size_t n, size_t padded) {
  __m512 peaks = _mm512_set1_ps(-INFINITY);
  for (size_t i = 0; i < n; i += 16) {
    const __m512 some = _mm512_mask_loadu_ps(peaks, first16(n - i), scores + i);
    peaks = _mm512_max_ps(peaks, some);
  }
  const __m512 log2_e = _mm512_set1_ps(kLog2E);
  const __m512 peak = _mm512_set1_ps(kLog2E * _mm512_reduce_max_ps(peaks));
  __m512 sum = _mm512_setzero_ps();
  auto* narrow = reinterpret_cast<uint16_t*>(scores);  // 16 bits trail the 32 that are read
  for (size_t i = 0; i < padded; i += 16) {
    const __mmask16 some = i < n ? first16(n - i) : 0;
    const __m512 shifted = _mm512_fmsub_ps(_mm512_load_ps(scores + i), log2_e, peak);
    const __m512 weight = _mm512_maskz_mov_ps(some, power_of_2<4>(shifted));
    sum = _mm512_add_ps(sum, weight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(narrow + i), narrowed(weight));
  }
  return _mm512_reduce_add_ps(sum);
}

void attend(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Attention& a = job.attention;
  static thread_local Scratch scratch;
  const size_t n_pairs = a.width / 2;
  const size_t stride = job.n_panels * kPanel;
  const size_t n_bytes = kTile * (stride + job.n_columns + n_pairs) * sizeof(float);
  auto* scores = static_cast<float*>(scratch.get(n_bytes));
  if (scores == nullptr) {
    job.failed = true;
    return;
  }
  float* mixed = scores + kTile * stride;
  auto* queries = reinterpret_cast<Pair*>(mixed + kTile * job.n_columns);
  const size_t head = index / job.n_blocks % a.n_heads;
  const size_t batch = index / job.n_blocks / a.n_heads;
  const size_t kv_head = batch * a.n_kv_heads + head / (a.n_heads / a.n_kv_heads);
  const Pair* keys = job.keys + kv_head * job.key_pairs();
  const Pair* values = job.values + kv_head * job.value_pairs();
  const size_t out_stride = a.n_heads * a.width;
  const size_t offset = batch * a.n * out_stride + head * a.width;
  const float factor = 1 / std::sqrt(static_cast<float>(a.width));
  const size_t begin = index % job.n_blocks * job.block;
  const size_t end = least(a.n, begin + job.block);
  for (size_t row = begin; row < end; row += kTile) {
    const size_t n_rows = least(kTile, end - row);
    std::memset(queries, 0, kTile * n_pairs * sizeof(Pair));
    for (size_t r = 0; r < n_rows; ++r) {
      pair_up(a.queries + offset + (row + r) * out_stride, a.width, factor, queries + r * n_pairs);
    }
    const size_t n_seen = greatest(a.n_front, a.n_past + row + n_rows);
    const size_t padded = rounded_up(n_seen, 16);
    for (size_t k = 0; k < padded; k += kPanel) {
      multiply_columns(least(kPanel, padded - k), queries, n_pairs, keys + k * n_pairs, kPanel,
                       n_pairs, scores + k, stride);
    }
    float sums[kTile];
    for (size_t r = 0; r < kTile; ++r) {
      const size_t n = least(greatest(a.n_front, a.n_past + row + r + 1), n_seen);
      sums[r] = soften(scores + r * stride, n, padded);
    }
    const auto* weights = reinterpret_cast<const Pair*>(scores);
    for (size_t k = 0; k < job.n_columns; k += kPanel) {
      multiply_columns(least(kPanel, job.n_columns - k), weights, stride, values + k, job.n_columns,
                       padded / 2, mixed + k, job.n_columns);
    }
    for (size_t r = 0; r < n_rows; ++r) {
      const __m512 scale = _mm512_set1_ps(1 / sums[r]);
      for (size_t k = 0; k < a.width; k += 16) {
        const __m512 value = _mm512_load_ps(mixed + r * job.n_columns + k);
        _mm512_mask_storeu_ps(a.out + offset + (row + r) * out_stride + k, first16(a.width - k),
                              _mm512_mul_ps(value, scale));
      }
    }
  }
}

// A head of keys and all queries that attend to it: what was arranged is in the cache still.
void arrange_and_attend(void* data, size_t index) {
  const Job& job = *static_cast<Job*>(data);
  arrange(data, index);
  const size_t n = job.attention.n_heads / job.attention.n_kv_heads * job.n_blocks;
  for (size_t i = index * n; i < (index + 1) * n; ++i) attend(data, i);
}

}  // namespace

bool attention_avx512(const Attention& attention, Parallel& parallel) {
  if (attention.n == 0 || attention.n_batch == 0) return true;
  static thread_local Scratch scratch;
  const size_t n_kv = attention.n_batch * attention.n_kv_heads;
  const size_t n_tiles = (attention.n + kTile - 1) / kTile;
  const size_t n_blocks = (attention.n + kBlock - 1) / kBlock;
  const size_t n_keys = attention.n_past + attention.n;
  Job job = {attention,
             n_keys,
             (n_keys + kPanel - 1) / kPanel,
             rounded_up(attention.width, 16),
             (n_tiles + n_blocks - 1) / n_blocks * kTile,
             n_blocks,
             nullptr,
             nullptr};
  const size_t value_pairs = rounded_up(n_kv * job.value_pairs(), kLine / sizeof(Pair));
  job.values =
      static_cast<Pair*>(scratch.get((value_pairs + n_kv * job.key_pairs()) * sizeof(Pair)));
  if (job.values == nullptr) return false;
  job.keys = job.values + value_pairs;
  if (n_blocks == 1) return parallel.run(arrange_and_attend, n_kv, &job) && !job.failed;
  return parallel.run(arrange, n_kv, &job) &&
         parallel.run(attend, attention.n_batch * attention.n_heads * n_blocks, &job) &&
         !job.failed;
}

}  // namespace edgevlm
