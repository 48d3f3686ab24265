// Softmax attention over float rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace edgevlm {

// out = softmax(queries · keysᵀ / √width) · values for each head. Heads of queries share a head of
// keys where there are fewer of those. Operands are rounded to bfloat16, sums are float32.
struct Attention {
  const float* queries;  // [n_batch, n, n_heads · width]
  const float* keys;     // [n_batch, n, n_kv_heads · width]
  const float* values;   // as keys
  // Of rows before these: float16 [n_past, n_kv_heads · width] and [n_kv_heads · width, n_past].
  const uint16_t* past_keys;
  const uint16_t* past_values;
  float* out;  // as queries
  size_t n_batch;
  size_t n;
  size_t n_past;  // 0 unless n_batch is 1
  size_t n_heads;
  size_t n_kv_heads;  // divides n_heads
  size_t width;       // of a head; even
  // Of the past and these together: so many rows at the front attend to each other, a later one to
  // itself and those before.
  size_t n_front;
};

// Needs a CPU with AVX-512 and its bfloat16 products. False: no memory, or `parallel` failed.
bool attention_avx512(const Attention& attention, Parallel& parallel);

}  // namespace edgevlm
