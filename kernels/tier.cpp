// The two passes, written once over vec.h and compiled once per CPU tier (EDGEVLM_TIER_*).
#include "tier.h"

#include "vec.h"

namespace edgevlm {
namespace {

void horizontal(const uint8_t* const rows[kRowsPerStep], const Window* windows, const TapPair* taps,
                int32_t pairs_per_window, int32_t width, uint8_t* const out[kRowsPerStep]) {
  for (int32_t x = 0; x < width; ++x, taps += pairs_per_window) {
    const ptrdiff_t begin = 3 * static_cast<ptrdiff_t>(windows[x].first);
    Sum sums[kRowsPerStep] = {zero(), zero(), zero(), zero()};
    ptrdiff_t i = 0;
    do {
      const Weights weights = load_weights(taps + i);
      for (int32_t r = 0; r < kRowsPerStep; ++r) {
        sums[r] = accumulate(sums[r], load_rgb(rows[r] + begin + 6 * i), weights);
      }
      i += kPairsPerStep;
    } while (i < windows[x].n_pairs);
    store_rgb(sums, out, 3 * static_cast<ptrdiff_t>(x));
  }
}

void vertical(const uint8_t* const* rows, const TapPair* taps, int32_t n_pairs, int32_t n_bytes,
              uint8_t* out) {
  for (ptrdiff_t x = 0; x < n_bytes; x += kColumnsPerStep) {
    Sum sums[4] = {zero(), zero(), zero(), zero()};
    for (int32_t i = 0; i < n_pairs; ++i) {
      const Weights weights = broadcast_weights(taps[i]);
      Pixels pixels[4];
      zip(rows[2 * i] + x, rows[2 * i + 1] + x, pixels);
      for (int32_t part = 0; part < 4; ++part) {
        sums[part] = accumulate(sums[part], pixels[part], weights);
      }
    }
    store_columns(sums, out + x);
  }
}

}  // namespace

extern const Tier EDGEVLM_TIER_TABLE = {EDGEVLM_TIER_NAME, kPairsPerStep, horizontal, vertical};

}  // namespace edgevlm
