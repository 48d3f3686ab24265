#include "plan.h"

#include <algorithm>
#include <cstring>

namespace edgevlm {
namespace {

bool is_side(int32_t px) { return px >= 1 && px <= EDGEVLM_MAX_SIDE_PX; }

std::vector<int32_t> tile_rows(const edgevlm_tiling& tiling) {
  std::vector<int32_t> rows;
  for (int32_t i = 0; i < tiling.n_tiles; ++i) {
    for (int32_t r = 0; r < tiling.tile_height; ++r) rows.push_back(tiling.tiles[2 * i] + r);
  }
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

// `axis` 0: rows, 1: columns.
Range needed(const edgevlm_tiling& tiling, int32_t axis, int32_t tile_size, int32_t size) {
  Range range{size, 0};
  for (int32_t i = 0; i < tiling.n_tiles; ++i) {
    const int32_t begin = tiling.tiles[2 * i + axis];
    range.begin = std::min(range.begin, std::max(begin, 0));
    range.end = std::max(range.end, std::min(begin + tile_size, size));
  }
  return range.begin < range.end ? range : Range{0, 0};
}

// The order of the passes shows in the last bit, since the first one rounds. Since Pillow 13 the
// height goes first when it shrinks by more than twice as many pixels as the width
// (src/libImaging/Resample.c: ImagingResampleInner).
bool pillow_does_height_first(const edgevlm_picture& p, const edgevlm_tiling& t) {
  const int32_t height_lost = p.canvas_height - t.height;
  const int32_t width_lost = p.canvas_width - t.width;
  return height_lost > 0 && height_lost > 2 * width_lost;
}

Row filled_row(int32_t width, const uint8_t fill[3]) {
  Row row(3 * static_cast<size_t>(width) + kSlackBytes);
  for (size_t x = 0; x < static_cast<size_t>(width); ++x) std::memcpy(&row[3 * x], fill, 3);
  return row;
}

}  // namespace

bool is_valid(const edgevlm_picture& p) {
  return p.pixels != nullptr && is_side(p.height) && is_side(p.width) && is_side(p.canvas_height) &&
         is_side(p.canvas_width) && p.row_bytes >= 3 * int64_t{p.width} && p.canvas_top >= 0 &&
         p.canvas_top <= p.canvas_height - p.height && p.canvas_left >= 0 &&
         p.canvas_left <= p.canvas_width - p.width;
}

bool is_valid(const edgevlm_tiling& t, int64_t out_bytes) {
  if (!is_side(t.height) || !is_side(t.width) || !is_side(t.tile_height) ||
      !is_side(t.tile_width) || !is_side(t.patch_height) || !is_side(t.patch_width) ||
      t.tile_height % t.patch_height != 0 || t.tile_width % t.patch_width != 0 ||
      t.filter < EDGEVLM_BOX || t.filter > EDGEVLM_LANCZOS || t.tiles == nullptr ||
      !is_side(t.n_tiles)) {
    return false;
  }
  for (int32_t i = 0; i < 2 * t.n_tiles; ++i) {
    if (t.tiles[i] < -EDGEVLM_MAX_SIDE_PX || t.tiles[i] > EDGEVLM_MAX_SIDE_PX) return false;
  }
  const int64_t tile_bytes = 3 * int64_t{t.tile_height} * t.tile_width;
  return out_bytes % tile_bytes == 0 && out_bytes / tile_bytes == t.n_tiles;
}

Plan::Plan(const edgevlm_picture& p, const edgevlm_tiling& t, const Tier& cpu_tier)
    : picture(p),
      tiling(t),
      tier(cpu_tier),
      tile_rows(edgevlm::tile_rows(t)),
      rows(needed(t, 0, t.tile_height, t.height)),
      columns(needed(t, 1, t.tile_width, t.width)),
      resizes_height(t.height != p.canvas_height),
      resizes_width(t.width != p.canvas_width),
      vertical_first(resizes_height && resizes_width && pillow_does_height_first(p, t)),
      fill_row(filled_row(p.canvas_width, t.fill)),
      last_begin(static_cast<int32_t>(
          std::max(p.height - 1 - (kSlackBytes - 1) / p.row_bytes, int64_t{0}))) {
  const uint8_t* last = p.pixels + last_begin * p.row_bytes;
  last_rows.assign(last, last + (p.height - 1 - last_begin) * p.row_bytes + 3 * int64_t{p.width});
  last_rows.resize(last_rows.size() + kSlackBytes);
  const auto filter = static_cast<edgevlm_filter>(t.filter);
  if (resizes_height) vertical = make_taps(p.canvas_height, t.height, rows, filter, 1);
  if (resizes_width) {
    horizontal = make_taps(p.canvas_width, t.width, columns, filter, tier.pairs_per_step);
  }
}

}  // namespace edgevlm
