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

// A row of `width` floats, times `factor`, → width / 2 pairs.
void pair_up(const float* row, size_t width, float factor, Pair* pairs) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (size_t i = 0; i < width; i += 32) {
    const size_t left = width - i;
    const __m512 first = _mm512_maskz_loadu_ps(first16(left), row + i);
    const __m512 second =
        _mm512_maskz_loadu_ps(left > 16 ? first16(left - 16) : 0, row + i + (left > 16 ? 16 : 0));
    _mm512_mask_storeu_epi32(pairs + i / 2, first16(left / 2),
                             narrowed(_mm512_mul_ps(first, scale), _mm512_mul_ps(second, scale)));
  }
}

// One head of keys and values → the order of the products; what lies past the last row is 0.
void arrange(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const Attention& a = job.attention;
  const size_t stride = a.n_kv_heads * a.width;
  const size_t first = index / a.n_kv_heads * a.n * stride + index % a.n_kv_heads * a.width;
  Pair* keys = job.keys + index * job.key_pairs();
  std::memset(keys, 0, job.key_pairs() * sizeof(Pair));
  alignas(kLine) Pair row[512];
  const size_t n_pairs = a.width / 2;
  for (size_t i = 0; i < a.n; ++i) {
    pair_up(a.keys + first + i * stride, a.width, 1, row);
    Pair* column = keys + i / kPanel * n_pairs * kPanel + i % kPanel;
    for (size_t k = 0; k < n_pairs; ++k) column[k * kPanel] = row[k];
  }
  Pair* values = job.values + index * job.value_pairs();
  for (size_t i = 0; i < job.n_panels * kPanel; i += 2) {
    const float* even = a.values + first + i * stride;
    for (size_t k = 0; k < job.n_columns; k += 16) {
      const __mmask16 some = k < a.width ? first16(a.width - k) : 0;
      const __m512 low = _mm512_maskz_loadu_ps(i < a.n ? some : 0, even + k);
      const __m512 high = _mm512_maskz_loadu_ps(i + 1 < a.n ? some : 0, even + stride + k);
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
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
  __m512 sum = _mm512_setzero_ps();
  auto* narrow = reinterpret_cast<uint16_t*>(scores);  // 16 bits trail the 32 that are read
  for (size_t i = 0; i < padded; i += 16) {
    const __mmask16 some = i < n ? first16(n - i) : 0;
    const __m512 shifted = _mm512_sub_ps(_mm512_load_ps(scores + i), peak);
    const __m512 weight = _mm512_maskz_mov_ps(some, exponential<4>(shifted));
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
    const size_t n_seen = greatest(a.n_front, row + n_rows);
    const size_t padded = rounded_up(n_seen, 16);
    for (size_t k = 0; k < padded; k += kPanel) {
      multiply_columns(least(kPanel, padded - k), queries, n_pairs, keys + k * n_pairs, kPanel,
                       n_pairs, scores + k, stride);
    }
    float sums[kTile];
    for (size_t r = 0; r < kTile; ++r) {
      const size_t n = least(greatest(a.n_front, row + r + 1), n_seen);
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

}  // namespace

bool attention_avx512(const Attention& attention, Parallel& parallel) {
  if (attention.n == 0 || attention.n_batch == 0) return true;
  static thread_local Scratch scratch;
  const size_t n_kv = attention.n_batch * attention.n_kv_heads;
  const size_t n_tiles = (attention.n + kTile - 1) / kTile;
  const size_t n_blocks = (attention.n + kBlock - 1) / kBlock;
  Job job = {attention,
             (attention.n + kPanel - 1) / kPanel,
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
  return parallel.run(arrange, n_kv, &job) &&
         parallel.run(attend, attention.n_batch * attention.n_heads * n_blocks, &job) &&
         !job.failed;
}

}  // namespace edgevlm
