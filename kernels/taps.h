// Which samples make an output sample, and their weights: what Pillow computes before it resizes.
#pragma once

#include <cstdint>
#include <vector>

#include "edgevlm_kernels.h"
#include "tier.h"

namespace edgevlm {

struct Range {
  int32_t begin, end;

  int32_t size() const { return end - begin; }
};

// The windows and weights of the output samples of one axis, a range of them.
struct Taps {
  std::vector<Window> windows;
  std::vector<TapPair> pairs;  // [windows, pairs_per_window]
  int32_t pairs_per_window = 0;
};

// Taps of the samples `range` out of `out_size`, made from `in_size` ones. Windows are a multiple
// of `pairs_per_step` long.
Taps make_taps(int32_t in_size, int32_t out_size, Range range, edgevlm_filter filter,
               int32_t pairs_per_step);

}  // namespace edgevlm
