// How a kernel runs on a thread pool that somebody else owns.
#pragma once

#include <cstddef>

namespace edgevlm {

// Runs work(data, i) for i < n, possibly at the same time.
class Parallel {
 public:
  using Work = void (*)(void* data, size_t index);
  virtual bool run(Work work, size_t n, void* data) = 0;

 protected:
  ~Parallel() = default;
};

}  // namespace edgevlm
