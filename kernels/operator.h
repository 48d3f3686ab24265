// What our operators for ONNX Runtime have in common.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ort.h"
#include "parallel.h"

namespace edgevlm {

// ONNX Runtime's threads, as an operator that runs on them sees them.
class ThreadPool final : public Parallel {
 public:
  ThreadPool(ort::Api* api, ort::KernelContext* context) : api_(api), context_(context) {}

  bool run(Work work, size_t n, void* data) override {
    return ort::ParallelFor::call(api_, context_, work, n, 0, data) == nullptr;
  }

 private:
  ort::Api* api_;
  ort::KernelContext* context_;
};

constexpr size_t kMostAxes = 8;

struct Tensor {
  void* data = nullptr;
  int64_t sizes[kMostAxes] = {};
  size_t n_axes = 0;

  int64_t last() const { return n_axes == 0 ? 0 : sizes[n_axes - 1]; }
};

inline ort::Status* failure(ort::Api* api, const char* text) {
  return ort::CreateStatus::call(api, ort::kFail, text);
}

inline bool read(ort::Api* api, ort::KernelContext* context, size_t index, Tensor* tensor) {
  const ort::Value* value = nullptr;
  ort::Shape* shape = nullptr;
  if (ort::GetInput::call(api, context, index, &value) != nullptr ||
      ort::GetTensorTypeAndShape::call(api, value, &shape) != nullptr) {
    return false;
  }
  const bool known = ort::GetDimensionsCount::call(api, shape, &tensor->n_axes) == nullptr &&
                     tensor->n_axes <= kMostAxes &&
                     ort::GetDimensions::call(api, shape, tensor->sizes, tensor->n_axes) == nullptr;
  ort::ReleaseShape::call(api, shape);
  return known && ort::GetTensorMutableData::call(api, const_cast<ort::Value*>(value),
                                                  &tensor->data) == nullptr;
}

// The operator's output, in the sizes of `like`.
inline ort::Status* allocate(ort::Api* api, ort::KernelContext* context, const Tensor& like,
                             float** out) {
  ort::Value* value = nullptr;
  if (ort::Status* status =
          ort::GetOutput::call(api, context, 0, like.sizes, like.n_axes, &value)) {
    return status;
  }
  void* data = nullptr;
  ort::Status* status = ort::GetTensorMutableData::call(api, value, &data);
  *out = static_cast<float*>(data);
  return status;
}

// An operator of this domain, on the CPU, with one float32 output; the rest is filled in by the
// file that has it.
inline ort::CustomOp blank_operator() {
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.output_count = [](const ort::CustomOp*) { return size_t{1}; };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.first_version = [](const ort::CustomOp*) { return 1; };
  op.last_version = [](const ort::CustomOp*) { return 1 << 30; };
  return op;
}

// Adds operators to a domain.
ort::Status* add_linear(ort::Api* api, ort::CustomOpDomain* domain);
ort::Status* add_attention(ort::Api* api, ort::CustomOpDomain* domain);

}  // namespace edgevlm
