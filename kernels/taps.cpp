// Weights of Pillow's 8-bit resize, to the last bit: the same double arithmetic in the same order
// (python-pillow/Pillow src/libImaging/Resample.c: precompute_coeffs, normalize_coeffs_8bpc).
#include "taps.h"

#include <algorithm>
#include <cmath>

namespace edgevlm {
namespace {

double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {  // Keys' cubic convolution, a = -0.5
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= 3.14159265358979323846;
  return std::sin(x) / x;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

struct Filter {
  double (*weight)(double distance);
  double support;  // weights are 0 beyond, in samples of the coarser side
};

constexpr Filter kFilters[] = {{box, 0.5}, {bilinear, 1.0}, {bicubic, 2.0}, {lanczos, 3.0}};

int32_t fixed_point(double weight) {
  return static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kWeightBits));
}

void set_weight(TapPair* pairs, int32_t tap, int32_t weight) {
  pairs[tap / 2].high[tap % 2] = static_cast<int16_t>(weight >> kLowBits);
  pairs[tap / 2].low[tap % 2] = static_cast<int16_t>(weight & ((1 << kLowBits) - 1));
}

int32_t round_up(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

Taps make_taps(int32_t in_size, int32_t out_size, Range range, edgevlm_filter filter,
               int32_t pairs_per_step) {
  const Filter& shape = kFilters[filter];
  const double scale = static_cast<double>(in_size) / out_size;
  const double stretch = std::max(scale, 1.0);
  const double support = shape.support * stretch;
  const double inverse = 1.0 / stretch;

  const auto center = [&](int32_t i) { return (i + 0.5) * scale; };
  const auto first = [&](int32_t i) {
    return std::max(static_cast<int32_t>(center(i) - support + 0.5), 0);
  };
  const auto count = [&](int32_t i) {
    return std::min(static_cast<int32_t>(center(i) + support + 0.5), in_size) - first(i);
  };

  Taps taps;
  taps.windows.reserve(static_cast<size_t>(range.size()));
  for (int32_t i = range.begin; i < range.end; ++i) {
    const int32_t n_pairs = round_up((std::max(count(i), 1) + 1) / 2, pairs_per_step);
    taps.windows.push_back({first(i), n_pairs});
    taps.pairs_per_window = std::max(taps.pairs_per_window, n_pairs);
  }

  taps.pairs.resize(taps.windows.size() * static_cast<size_t>(taps.pairs_per_window), TapPair{});
  std::vector<double> weights;
  TapPair* pairs = taps.pairs.data();
  for (int32_t i = range.begin; i < range.end; ++i, pairs += taps.pairs_per_window) {
    weights.resize(static_cast<size_t>(count(i)));
    double sum = 0.0;
    for (int32_t t = 0; t < count(i); ++t) {
      weights[t] = shape.weight((t + first(i) - center(i) + 0.5) * inverse);
      sum += weights[t];
    }
    for (int32_t t = 0; t < count(i); ++t) {
      set_weight(pairs, t, fixed_point(sum != 0.0 ? weights[t] / sum : weights[t]));
    }
  }
  return taps;
}

}  // namespace edgevlm
