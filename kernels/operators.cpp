// ONNX Runtime's custom operators of domain "edgevlm": linear layers in int8, fused.
//
// A graph brings each of them as a function of standard operators, too, so it runs without this
// file, on CPUs where ONNX Runtime's own kernels are faster and on CPUs that lack the instructions.
#include <cstddef>
#include <cstdint>
#include <new>

#include "dispatch.h"
#include "edgevlm_kernels.h"
#include "linear.h"
#include "ort.h"

namespace edgevlm {
namespace {

// Inputs: rows float32 [.., in], weights int8 [in / n_parts, out] of each part, scales float32
// [out], and bias float32 [out] where it has one. Output: float32 [.., out].
struct Operator : ort::CustomOp {
  const char* name_text;
  bool has_bias;
  Activation activation;
  size_t n_parts;
};

struct Kernel {
  const Operator& op;
  ort::Api* api;
  float alpha;
};

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

ort::Status* failure(ort::Api* api, const char* text) {
  return ort::CreateStatus::call(api, ort::kFail, text);
}

bool read(ort::Api* api, ort::KernelContext* context, size_t index, Tensor* tensor) {
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

ort::Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  ort::Api* api = kernel.api;
  const Operator& op = kernel.op;
  Tensor rows, weights[kMostParts], scales, bias;
  bool known = read(api, context, 0, &rows) && read(api, context, 1 + op.n_parts, &scales) &&
               (!op.has_bias || read(api, context, 2 + op.n_parts, &bias));
  for (size_t i = 0; i < op.n_parts; ++i) known = known && read(api, context, 1 + i, &weights[i]);
  if (!known) return failure(api, "edgevlm.Linear: an input cannot be read");
  const int64_t n_out = scales.last();
  const int64_t part = rows.last() / static_cast<int64_t>(op.n_parts);
  bool fits = part > 0 && part * static_cast<int64_t>(op.n_parts) == rows.last() &&
              (!op.has_bias || bias.last() == n_out);
  for (size_t i = 0; i < op.n_parts; ++i) {
    fits = fits && weights[i].n_axes == 2 && weights[i].sizes[0] == part &&
           weights[i].sizes[1] == n_out;
  }
  if (!fits) {
    return failure(api, "edgevlm.Linear: sizes of rows, weights, scales and bias disagree");
  }
  size_t n_rows = 1;
  for (size_t i = 0; i + 1 < rows.n_axes; ++i) n_rows *= static_cast<size_t>(rows.sizes[i]);
  rows.sizes[rows.n_axes - 1] = n_out;
  ort::Value* output = nullptr;
  void* out = nullptr;
  if (ort::Status* status =
          ort::GetOutput::call(api, context, 0, rows.sizes, rows.n_axes, &output)) {
    return status;
  }
  if (ort::Status* status = ort::GetTensorMutableData::call(api, output, &out)) return status;
  Linear layer = {};
  layer.rows = static_cast<const float*>(rows.data);
  for (size_t i = 0; i < op.n_parts; ++i) {
    layer.weights[i] = static_cast<const int8_t*>(weights[i].data);
  }
  layer.scales = static_cast<const float*>(scales.data);
  layer.bias = static_cast<const float*>(bias.data);
  layer.out = static_cast<float*>(out);
  layer.n_rows = n_rows;
  layer.part = static_cast<size_t>(part);
  layer.n_parts = op.n_parts;
  layer.n_out = static_cast<size_t>(n_out);
  layer.activation = op.activation;
  layer.alpha = kernel.alpha;
  ThreadPool pool(api, context);
  return linear_avx512(layer, pool) ? nullptr : failure(api, "edgevlm.Linear: out of memory");
}

ort::Status* create(const ort::CustomOp* custom, ort::Api* api, const ort::KernelInfo* info,
                    void** kernel) {
  const auto& op = *static_cast<const Operator*>(custom);
  float alpha = 0;
  if (op.activation == Activation::kQuickGelu) {
    if (ort::Status* status = ort::GetFloatAttribute::call(api, info, "alpha", &alpha)) {
      return status;
    }
  }
  *kernel = new (std::nothrow) Kernel{op, api, alpha};
  return *kernel != nullptr ? nullptr : failure(api, "edgevlm.Linear: out of memory");
}

Operator make(const char* name, bool has_bias, Activation activation, size_t n_parts) {
  Operator op = {};
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name_text; };
  op.execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::CustomOp* self, size_t index) {
    const size_t n_parts = static_cast<const Operator*>(self)->n_parts;
    return index >= 1 && index <= n_parts ? ort::kInt8 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) {
    const auto& op = *static_cast<const Operator*>(self);
    return 2 + op.n_parts + op.has_bias;
  };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.output_count = [](const ort::CustomOp*) { return size_t{1}; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.first_version = [](const ort::CustomOp*) { return 1; };
  op.last_version = [](const ort::CustomOp*) { return 1 << 30; };
  op.name_text = name;
  op.has_bias = has_bias;
  op.activation = activation;
  op.n_parts = n_parts;
  return op;
}

const Operator* operators(size_t* n) {
  static const Operator all[] = {
      make("Linear", false, Activation::kNone, 1),
      make("LinearQuickGelu", false, Activation::kQuickGelu, 1),
      make("LinearBias", true, Activation::kNone, 1),
      make("LinearBiasQuickGelu", true, Activation::kQuickGelu, 1),
      make("LinearBiasFastGelu", true, Activation::kFastGelu, 1),
      make("Linear4", false, Activation::kNone, 4),
      make("Linear4QuickGelu", false, Activation::kQuickGelu, 4),
      make("Linear4Bias", true, Activation::kNone, 4),
      make("Linear4BiasQuickGelu", true, Activation::kQuickGelu, 4),
      make("Linear4BiasFastGelu", true, Activation::kFastGelu, 4),
  };
  *n = sizeof all / sizeof all[0];
  return all;
}

ort::Status* domain(ort::Api* api, ort::CustomOpDomain** found) {
  static ort::CustomOpDomain* made = nullptr;
  if (made == nullptr) {
    ort::CustomOpDomain* fresh = nullptr;
    if (ort::Status* status = ort::CreateCustomOpDomain::call(api, "edgevlm", &fresh)) {
      return status;
    }
    size_t n = 0;
    const Operator* all = operators(&n);
    for (size_t i = 0; i < n; ++i) {
      if (ort::Status* status = ort::CustomOpDomainAdd::call(api, fresh, &all[i])) return status;
    }
    made = fresh;  // sessions refer to it as long as the library is loaded
  }
  *found = made;
  return nullptr;
}

}  // namespace
}  // namespace edgevlm

extern "C" __attribute__((visibility("default"))) edgevlm::ort::Status* RegisterCustomOps(
    edgevlm::ort::SessionOptions* options, const edgevlm::ort::ApiBase* base) {
  using namespace edgevlm;
  ort::Api* api = base->get_api(ort::kApiVersion);
  ort::CustomOpDomain* found = nullptr;
  if (ort::Status* status = domain(api, &found)) return status;
  return ort::AddCustomOpDomain::call(api, options, found);
}
