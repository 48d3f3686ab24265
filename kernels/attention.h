// Softmax attention over float rows.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace edgevlm {

// out = softmax(queries · keysᵀ / √width) · values for each head. Heads of queries share a head of
// keys where there are fewer of those. Operands are rounded to bfloat16, sums are float32.
struct Attention {
  const float* queries;  // [n_batch, n, n_heads · width]
  const float* keys;     // [n_batch, n, n_kv_heads · width]
  const float* values;   // as keys
  float* out;            // as queries
  size_t n_batch;
  size_t n;
  size_t n_heads;
  size_t n_kv_heads;  // divides n_heads
  size_t width;       // of a head; even
  size_t n_front;     // rows that all attend to each other; a later one to itself and those before
};

// Needs a CPU with AVX-512 and its bfloat16 products. False: no memory, or `parallel` failed.
bool attention_avx512(const Attention& attention, Parallel& parallel);

}  // namespace edgevlm
