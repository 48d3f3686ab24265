// edgevlm_resize(): threads take bands of rows, make each row and write it into its patches.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "edgevlm_kernels.h"
#include "plan.h"
#include "rows.h"

namespace edgevlm {
namespace {

// More than one, so that a slow or busy core takes fewer bands; few, because neighbouring bands
// both make the rows that their windows share.
constexpr int32_t kBandsPerThread = 2;

class PatchWriter {
 public:
  PatchWriter(const Plan& plan, uint8_t* out)
      : tiling_(plan.tiling),
        columns_(plan.columns),
        out_(out),
        patch_row_(3 * static_cast<size_t>(plan.tiling.patch_width)) {}

  // Writes row y of the resized canvas to all tiles that have it. `pixels` begins at
  // plan.columns.begin; null stands for a row outside the canvas.
  void write(int32_t y, const uint8_t* pixels) {
    for (int32_t i = 0; i < tiling_.n_tiles; ++i) {
      const int32_t row = y - tiling_.tiles[2 * i];
      if (row >= 0 && row < tiling_.tile_height) write_tile(i, row, pixels);
    }
  }

 private:
  void write_tile(int32_t tile, int32_t row, const uint8_t* pixels) {
    const edgevlm_tiling& t = tiling_;
    const int64_t tile_bytes = 3 * int64_t{t.tile_height} * t.tile_width;
    const int64_t patch_bytes = 3 * int64_t{t.patch_height} * t.patch_width;
    const int64_t patches_across = t.tile_width / t.patch_width;
    const int64_t row_bytes = int64_t{t.patch_width} * (t.channels_first ? 1 : 3);
    uint8_t* out = out_ + tile * tile_bytes + row / t.patch_height * patches_across * patch_bytes +
                   row % t.patch_height * row_bytes;
    const int32_t left = t.tiles[2 * tile + 1];
    for (int32_t x = left; x < left + t.tile_width; x += t.patch_width, out += patch_bytes) {
      write_patch(patch_row(x, pixels), out);
    }
  }

  // The pixels [x, x + patch_width), with the fill colour where they leave the canvas.
  const uint8_t* patch_row(int32_t x, const uint8_t* pixels) {
    const int32_t end = x + tiling_.patch_width;
    const auto at = [&](int32_t column) {
      return pixels + 3 * static_cast<ptrdiff_t>(column - columns_.begin);
    };
    if (pixels != nullptr && x >= columns_.begin && end <= columns_.end) return at(x);
    uint8_t* out = patch_row_.data();
    for (int32_t i = x; i < end; ++i, out += 3) {
      const bool inside = pixels != nullptr && i >= columns_.begin && i < columns_.end;
      std::memcpy(out, inside ? at(i) : tiling_.fill, 3);
    }
    return patch_row_.data();
  }

  void write_patch(const uint8_t* pixels, uint8_t* out) const {
    const auto width = static_cast<size_t>(tiling_.patch_width);
    if (!tiling_.channels_first) {
      std::memcpy(out, pixels, 3 * width);
      return;
    }
    const size_t plane = width * static_cast<size_t>(tiling_.patch_height);
    for (size_t x = 0; x < width; ++x) {
      out[x] = pixels[3 * x];
      out[x + plane] = pixels[3 * x + 1];
      out[x + 2 * plane] = pixels[3 * x + 2];
    }
  }

  const edgevlm_tiling& tiling_;
  const Range columns_;
  uint8_t* const out_;
  Row patch_row_;
};

// The buffers of one thread. Made by the calling thread, where running out of memory can be told.
class Worker {
 public:
  Worker(const Plan& plan, uint8_t* out)
      : plan_(plan), rows_(resized_rows(plan)), writer_(plan, out) {}

  // Does a band of plan.tile_rows. False when `cancel` was set first.
  bool run(Range band, const volatile int32_t* cancel) noexcept {
    rows_->restart();
    for (int32_t i = band.begin; i < band.end; ++i) {
      if (cancel != nullptr && *cancel != 0) return false;
      const int32_t y = plan_.tile_rows[static_cast<size_t>(i)];
      const bool inside = y >= plan_.rows.begin && y < plan_.rows.end;
      writer_.write(y, inside ? rows_->get(y, y + 1)[0] : nullptr);
    }
    return true;
  }

 private:
  const Plan& plan_;
  std::unique_ptr<Rows> rows_;
  PatchWriter writer_;
};

int32_t run(const Plan& plan, uint8_t* out, int32_t threads, const volatile int32_t* cancel) {
  const auto n_rows = static_cast<int32_t>(plan.tile_rows.size());
  threads = std::min(threads, n_rows);
  const int32_t n_bands = threads == 1 ? 1 : std::min(threads * kBandsPerThread, n_rows);

  std::vector<Worker> workers;
  for (int32_t i = 0; i < threads; ++i) workers.emplace_back(plan, out);

  std::atomic<int32_t> next_band{0};
  std::atomic<bool> cancelled{false};
  const auto work = [&](Worker& worker) noexcept {
    for (int64_t band; !cancelled && (band = next_band++) < n_bands;) {
      const Range rows{static_cast<int32_t>(n_rows * band / n_bands),
                       static_cast<int32_t>(n_rows * (band + 1) / n_bands)};
      if (!worker.run(rows, cancel)) cancelled = true;
    }
  };

  std::vector<std::thread> helpers;
  helpers.reserve(workers.size());
  try {
    for (size_t i = 1; i < workers.size(); ++i) helpers.emplace_back(work, std::ref(workers[i]));
  } catch (const std::system_error&) {
    // The system gives no more threads; those that run take all the bands.
  }
  work(workers[0]);
  for (std::thread& helper : helpers) helper.join();
  return cancelled ? EDGEVLM_CANCELLED : EDGEVLM_OK;
}

}  // namespace
}  // namespace edgevlm

int32_t edgevlm_resize(const edgevlm_picture* picture, const edgevlm_tiling* tiling, uint8_t* out,
                       int64_t out_bytes, int32_t threads, const volatile int32_t* cancel) try {
  using namespace edgevlm;
  if (picture == nullptr || tiling == nullptr || out == nullptr || threads < 1 ||
      !is_valid(*picture) || !is_valid(*tiling, out_bytes)) {
    return EDGEVLM_INVALID_ARGUMENT;
  }
  return run(Plan(*picture, *tiling, tier_in_force()), out, threads, cancel);
} catch (...) {
  return EDGEVLM_OUT_OF_MEMORY;  // nothing else throws
}
