// A linear layer in int8: float rows are rounded one by one, multiplied, and leave as float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace edgevlm {

enum class Activation {
  kNone,
  kQuickGelu,  // x · sigmoid(alpha x)
  kFastGelu,   // 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), arXiv 1606.08415
};

// out = activation(norm(rows) @ (weights · scales) + bias) + residual. A row has a scale of its own
// in each of `n_parts` equal parts of its length: value ≈ scale · integer, integers from -127 to
// 127. The norm is a layer norm: (row - mean) / √(variance + epsilon) · norm_scales + norm_bias.
struct Linear {
  const float* rows;         // [n_rows, n_in]
  const int8_t* weights;     // [n_in, n_out]
  const float* scales;       // [n_out]
  const float* bias;         // [n_out], or null
  const float* norm_scales;  // [n_in], or null: rows as they are
  const float* norm_bias;    // [n_in]
  const float* residual;     // [n_rows, n_out], or null
  float* out;                // [n_rows, n_out]
  size_t n_rows;
  size_t n_in;
  size_t n_out;
  size_t n_parts;  // divides n_in
  Activation activation;
  float alpha;
  float epsilon;
};

// Needs a CPU of the avx512 tier. False: no memory, or `parallel` failed.
bool linear_avx512(const Linear& layer, Parallel& parallel);

}  // namespace edgevlm
