#include "rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace edgevlm {
namespace {

Row blank_row(int32_t width) { return Row(3 * static_cast<size_t>(width) + kSlackBytes); }

// Rows of the canvas from column `left` on: the source's own memory, unless the canvas is wider.
class CanvasRows : public Rows {
 public:
  CanvasRows(const Plan& plan, int32_t left, int32_t n_kept)
      : Rows(n_kept, is_wider(plan) ? plan.fill_row : Row{}), plan_(plan), left_(left) {}

 private:
  static bool is_wider(const Plan& plan) { return plan.picture.canvas_width != plan.picture.width; }

  int32_t make(int32_t y) override {
    const edgevlm_picture& p = plan_.picture;
    const int32_t picture_y = y - p.canvas_top;
    const uint8_t* row = plan_.fill_row.data();
    if (picture_y >= 0 && picture_y < p.height) {
      row = picture_row(picture_y);
      if (is_wider(plan_)) {  // beside the picture the buffer keeps the fill colour
        std::memcpy(buffer(y) + 3 * static_cast<ptrdiff_t>(p.canvas_left), row,
                    3 * static_cast<size_t>(p.width));
        row = buffer(y);
      }
    }
    set(y, row + 3 * static_cast<ptrdiff_t>(left_));
    return 1;
  }

  const uint8_t* picture_row(int32_t y) const {
    const bool is_last = y >= plan_.last_begin;
    const uint8_t* rows = is_last ? plan_.last_rows.data() : plan_.picture.pixels;
    return rows + (is_last ? y - plan_.last_begin : y) * plan_.picture.row_bytes;
  }

  const Plan& plan_;
  const int32_t left_;
};

class HorizontalPass : public Rows {
 public:
  // `end` is the number of rows that `source` can make.
  HorizontalPass(const Plan& plan, std::unique_ptr<Rows> source, int32_t end, int32_t n_kept)
      : Rows(n_kept, blank_row(plan.columns.size())),
        plan_(plan),
        source_(std::move(source)),
        end_(end) {
    const uint8_t* in[kRowsPerStep];
    uint8_t* out[kRowsPerStep];
    std::fill(in, in + kRowsPerStep, plan.fill_row.data());
    std::fill(out, out + kRowsPerStep, buffer(0));
    pass(in, out);
    fill_row_.assign(out[0], out[0] + 3 * static_cast<ptrdiff_t>(plan.columns.size()));
    fill_row_.resize(fill_row_.size() + kSlackBytes);
  }

  void restart() override {
    Rows::restart();
    source_->restart();
  }

 private:
  int32_t make(int32_t y) override {
    const int32_t n_rows = std::min(kRowsPerStep, end_ - y);
    const uint8_t* const* source = source_->get(y, y + n_rows);
    if (source[0] == plan_.fill_row.data()) {  // a quarter of a 4:3 photo on a square canvas
      set(y, fill_row_.data());
      return 1;
    }
    const uint8_t* in[kRowsPerStep];
    uint8_t* out[kRowsPerStep];
    for (int32_t r = 0; r < kRowsPerStep; ++r) {
      const int32_t i = std::min(r, n_rows - 1);  // past the end, the last row once more
      in[r] = source[i];
      out[r] = buffer(y + i);
      set(y + i, out[r]);
    }
    pass(in, out);
    return n_rows;
  }

  void pass(const uint8_t* const in[kRowsPerStep], uint8_t* const out[kRowsPerStep]) const {
    plan_.tier.horizontal(in, plan_.horizontal.windows.data(), plan_.horizontal.pairs.data(),
                          plan_.horizontal.pairs_per_window, plan_.columns.size(), out);
  }

  const Plan& plan_;
  const std::unique_ptr<Rows> source_;
  const int32_t end_;
  Row fill_row_;  // the canvas's, resized
};

class VerticalPass : public Rows {
 public:
  // Rows of `source` are `width` pixels wide.
  VerticalPass(const Plan& plan, std::unique_ptr<Rows> source, int32_t width, int32_t n_kept)
      : Rows(n_kept, blank_row(width)),
        plan_(plan),
        source_(std::move(source)),
        width_(width),
        window_(2 * static_cast<size_t>(plan.vertical.pairs_per_window)) {}

  void restart() override {
    Rows::restart();
    source_->restart();
  }

 private:
  int32_t make(int32_t y) override {
    const Taps& taps = plan_.vertical;
    const size_t index = static_cast<size_t>(y - plan_.rows.begin);
    const Window window = taps.windows[index];
    const int32_t n_taps = 2 * window.n_pairs;
    const int32_t n_rows = std::min(n_taps, plan_.picture.canvas_height - window.first);
    const uint8_t* const* source = source_->get(window.first, window.first + n_rows);
    std::copy(source, source + n_rows, window_.begin());
    // The last weight of an odd window is 0; any row will do.
    std::fill(window_.begin() + n_rows, window_.begin() + n_taps, source[0]);
    set(y, buffer(y));
    plan_.tier.vertical(window_.data(),
                        &taps.pairs[index * static_cast<size_t>(taps.pairs_per_window)],
                        window.n_pairs, 3 * width_, buffer(y));
    return 1;
  }

  const Plan& plan_;
  const std::unique_ptr<Rows> source_;
  const int32_t width_;
  std::vector<const uint8_t*> window_;
};

}  // namespace

Rows::Rows(int32_t n_kept, const Row& blank)
    : buffers_(static_cast<size_t>(n_kept + kRowsPerStep), blank),
      rows_(buffers_.size()),
      window_(buffers_.size()) {}

const uint8_t* const* Rows::get(int32_t begin, int32_t end) {
  made_ = std::max(made_, begin);
  while (made_ < end) made_ += make(made_);
  for (int32_t y = begin; y < end; ++y) window_[static_cast<size_t>(y - begin)] = rows_[slot(y)];
  return window_.data();
}

std::unique_ptr<Rows> resized_rows(const Plan& plan) {
  const int32_t window = 2 * plan.vertical.pairs_per_window;
  if (plan.vertical_first) {
    auto canvas = std::make_unique<CanvasRows>(plan, 0, window);
    auto vertical = std::make_unique<VerticalPass>(plan, std::move(canvas),
                                                   plan.picture.canvas_width, kRowsPerStep);
    return std::make_unique<HorizontalPass>(plan, std::move(vertical), plan.rows.end, 1);
  }
  const int32_t left = plan.resizes_width ? 0 : plan.columns.begin;
  std::unique_ptr<Rows> rows =
      std::make_unique<CanvasRows>(plan, left, std::max(window, kRowsPerStep));
  if (plan.resizes_width) {
    rows = std::make_unique<HorizontalPass>(plan, std::move(rows), plan.picture.canvas_height,
                                            std::max(window, 1));
  }
  if (plan.resizes_height) {
    rows = std::make_unique<VerticalPass>(plan, std::move(rows), plan.columns.size(), 1);
  }
  return rows;
}

}  // namespace edgevlm
