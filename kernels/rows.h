// Rows on demand: the canvas, then one or two passes over it, each asking the one before for the
// rows it needs. Only the rows of a window are kept, so all but the source stays in the cache.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "plan.h"

namespace edgevlm {

class Rows {
 public:
  virtual ~Rows() = default;

  // Pointers to the rows [begin, end), good until the next call and readable for kSlackBytes more.
  // `begin` never decreases, until restart(). Allocates nothing.
  const uint8_t* const* get(int32_t begin, int32_t end);

  // Makes it possible to begin anywhere again.
  virtual void restart() { made_ = 0; }

 protected:
  // Holds `n_kept` rows behind the ones being made; every buffer starts as `blank`.
  Rows(int32_t n_kept, const Row& blank);

  // Makes row y and perhaps some after it, in buffer() or elsewhere, and tells how many.
  virtual int32_t make(int32_t y) = 0;

  uint8_t* buffer(int32_t y) { return buffers_[slot(y)].data(); }
  void set(int32_t y, const uint8_t* row) { rows_[slot(y)] = row; }

 private:
  size_t slot(int32_t y) const { return static_cast<size_t>(y) % buffers_.size(); }

  std::vector<Row> buffers_;
  std::vector<const uint8_t*> rows_;    // by slot
  std::vector<const uint8_t*> window_;  // by row, as get() returns them
  int32_t made_ = 0;
};

// The rows that the tiles are cut from: plan.rows, each from plan.columns.begin on.
std::unique_ptr<Rows> resized_rows(const Plan& plan);

}  // namespace edgevlm
