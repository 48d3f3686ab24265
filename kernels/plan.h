// What one call of edgevlm_resize() does, worked out before any pixel is read.
#pragma once

#include <cstdint>
#include <vector>

#include "edgevlm_kernels.h"
#include "taps.h"
#include "tier.h"

namespace edgevlm {

using Row = std::vector<uint8_t>;

bool is_valid(const edgevlm_picture& picture);
bool is_valid(const edgevlm_tiling& tiling, int64_t out_bytes);

// Shared by all threads, changed by none. "Resized" means of the resized canvas.
struct Plan {
  const edgevlm_picture& picture;
  const edgevlm_tiling& tiling;
  const Tier& tier;

  std::vector<int32_t> tile_rows;  // the resized rows, and those outside, that some tile has
  Range rows, columns;             // from the first to the last resized one that some tile has
  bool resizes_height, resizes_width, vertical_first;
  Taps vertical, horizontal;  // of `rows` and `columns`; empty where that side keeps its size

  Row fill_row;        // of the canvas, above and below the picture
  Row last_rows;       // of the picture, from row `last_begin` on: a copy, since passes read
  int32_t last_begin;  // kSlackBytes past a row and the caller's memory may end there

  Plan(const edgevlm_picture& picture, const edgevlm_tiling& tiling, const Tier& tier);
};

}  // namespace edgevlm
