// The int8 linear layers as operators, one for each kind of layer.
#include <cstddef>
#include <cstdint>
#include <new>

#include "linear.h"
#include "operator.h"

namespace edgevlm {
namespace {

// Inputs: rows float32 [.., in], weights int8 [in, out], scales float32 [out], and bias float32
// [out] where it has one. Output: float32 [.., out].
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

ort::Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  ort::Api* api = kernel.api;
  const Operator& op = kernel.op;
  Tensor rows, weights, scales, bias;
  if (!read(api, context, 0, &rows) || !read(api, context, 1, &weights) ||
      !read(api, context, 2, &scales) || (op.has_bias && !read(api, context, 3, &bias))) {
    return failure(api, "edgevlm.Linear: an input cannot be read");
  }
  const int64_t n_in = rows.last();
  const int64_t n_out = weights.last();
  if (weights.n_axes != 2 || weights.sizes[0] != n_in || scales.last() != n_out || n_in < 1 ||
      n_in % static_cast<int64_t>(op.n_parts) != 0 || (op.has_bias && bias.last() != n_out)) {
    return failure(api, "edgevlm.Linear: sizes of rows, weights, scales and bias disagree");
  }
  size_t n_rows = 1;
  for (size_t i = 0; i + 1 < rows.n_axes; ++i) n_rows *= static_cast<size_t>(rows.sizes[i]);
  rows.sizes[rows.n_axes - 1] = n_out;
  Linear layer = {};
  if (ort::Status* status = allocate(api, context, rows, &layer.out)) return status;
  layer.rows = static_cast<const float*>(rows.data);
  layer.weights = static_cast<const int8_t*>(weights.data);
  layer.scales = static_cast<const float*>(scales.data);
  layer.bias = static_cast<const float*>(bias.data);
  layer.n_rows = n_rows;
  layer.n_in = static_cast<size_t>(n_in);
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
  Operator op = {blank_operator(), name, has_bias, activation, n_parts};
  op.name = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name_text; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index == 1 ? ort::kInt8 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) {
    return size_t{3} + static_cast<const Operator*>(self)->has_bias;
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
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

}  // namespace

ort::Status* add_linear(ort::Api* api, ort::CustomOpDomain* domain) {
  size_t n = 0;
  const Operator* all = operators(&n);
  for (size_t i = 0; i < n; ++i) {
    if (ort::Status* status = ort::CustomOpDomainAdd::call(api, domain, &all[i])) return status;
  }
  return nullptr;
}

}  // namespace edgevlm
