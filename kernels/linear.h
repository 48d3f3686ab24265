// A linear layer in int8: float rows are rounded one by one, multiplied, and leave as float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgevlm {

constexpr size_t kMostParts = 4;

enum class Activation {
  kNone,
  kQuickGelu,  // x · sigmoid(alpha x)
  kFastGelu,   // 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), arXiv 1606.08415
};

// out = activation(rows @ (weights · scales) + bias). A row has a scale of its own in each of
// `n_parts` equal parts of its length: value ≈ scale · integer, integers from -127 to 127.
struct Linear {
  const float* rows;                  // [n_rows, n_parts · part]
  const int8_t* weights[kMostParts];  // of each part [part, n_out]
  const float* scales;                // [n_out]
  const float* bias;                  // [n_out], or null
  float* out;                         // [n_rows, n_out]
  size_t n_rows;
  size_t part;
  size_t n_parts;
  size_t n_out;
  Activation activation;
  float alpha;
};

// Runs work(i) for i < n, possibly at the same time.
class Parallel {
 public:
  using Work = void (*)(void* data, size_t index);
  virtual bool run(Work work, size_t n, void* data) = 0;

 protected:
  ~Parallel() = default;
};

// Needs a CPU of the avx512 tier. False: no memory, or `parallel` failed.
bool linear_avx512(const Linear& layer, Parallel& parallel);

}  // namespace edgevlm
