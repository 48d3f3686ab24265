// The int8 linear layers as operators, one for each kind of layer.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <new>
#include <vector>

#include "linear.h"
#include "operator.h"

namespace edgevlm {
namespace {

constexpr size_t kMostInputs = 7;

// Inputs: rows float32 [.., in], weights int8 [in, out], scales float32 [out], and where the kind
// has them bias float32 [out], scales and bias of the norm float32 [in] and residual float32
// [.., out]. Output: float32 [.., out].
struct Operator : ort::CustomOp {
  char name_text[40];
  bool has_norm;
  bool has_bias;
  bool has_residual;
  Activation activation;
  size_t n_parts;

  size_t n_inputs() const { return size_t{3} + has_bias + 2 * has_norm + has_residual; }
};

struct Kernel {
  const Operator& op;
  ort::Api* api;
  float alpha;
  float epsilon;
};

bool read_all(const Kernel& kernel, ort::KernelContext* context, Tensor (&inputs)[kMostInputs]) {
  for (size_t i = 0; i < kernel.op.n_inputs(); ++i) {
    if (!read(kernel.api, context, i, &inputs[i])) return false;
  }
  return true;
}

ort::Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  ort::Api* api = kernel.api;
  const Operator& op = kernel.op;
  Tensor inputs[kMostInputs];
  if (!read_all(kernel, context, inputs)) {
    return failure(api, "edgevlm.Linear: an input cannot be read");
  }
  const Tensor& rows = inputs[0];
  const Tensor& weights = inputs[1];
  const int64_t n_in = rows.last();
  const int64_t n_out = weights.last();
  const Tensor* next = inputs + 2;
  bool fits = weights.n_axes == 2 && weights.sizes[0] == n_in && n_in >= 1 &&
              n_in % static_cast<int64_t>(op.n_parts) == 0;
  const auto vector = [&next, &fits](int64_t size) {
    fits = fits && next->last() == size;
    return static_cast<const float*>((next++)->data);
  };
  Linear layer = {};
  layer.scales = vector(n_out);
  if (op.has_bias) layer.bias = vector(n_out);
  if (op.has_norm) {
    layer.norm_scales = vector(n_in);
    layer.norm_bias = vector(n_in);
  }
  size_t n_rows = 1;
  for (size_t i = 0; i + 1 < rows.n_axes; ++i) n_rows *= static_cast<size_t>(rows.sizes[i]);
  if (op.has_residual) {
    fits = fits && next->n_axes == rows.n_axes;
    for (size_t i = 0; fits && i + 1 < rows.n_axes; ++i) fits = next->sizes[i] == rows.sizes[i];
    layer.residual = vector(n_out);
  }
  if (!fits) return failure(api, "edgevlm.Linear: sizes of the inputs disagree");
  Tensor result = rows;
  result.sizes[rows.n_axes - 1] = n_out;
  if (ort::Status* status = allocate(api, context, result, &layer.out)) return status;
  layer.rows = static_cast<const float*>(rows.data);
  layer.weights = static_cast<const int8_t*>(weights.data);
  layer.n_rows = n_rows;
  layer.n_in = static_cast<size_t>(n_in);
  layer.n_parts = op.n_parts;
  layer.n_out = static_cast<size_t>(n_out);
  layer.activation = op.activation;
  layer.alpha = kernel.alpha;
  layer.epsilon = kernel.epsilon;
  ThreadPool pool(api, context);
  return linear_avx512(layer, pool) ? nullptr : failure(api, "edgevlm.Linear: out of memory");
}

ort::Status* create(const ort::CustomOp* custom, ort::Api* api, const ort::KernelInfo* info,
                    void** made) {
  const auto& op = *static_cast<const Operator*>(custom);
  Kernel kernel = {op, api, 0, 0};
  if (op.activation == Activation::kQuickGelu) {
    if (ort::Status* status = ort::GetFloatAttribute::call(api, info, "alpha", &kernel.alpha)) {
      return status;
    }
  }
  if (op.has_norm) {
    if (ort::Status* status = ort::GetFloatAttribute::call(api, info, "epsilon", &kernel.epsilon)) {
      return status;
    }
  }
  *made = new (std::nothrow) Kernel(kernel);
  return *made != nullptr ? nullptr : failure(api, "edgevlm.Linear: out of memory");
}

Operator make(bool has_norm, size_t n_parts, bool has_bias, Activation activation,
              bool has_residual) {
  constexpr const char* kActivations[] = {"", "QuickGelu", "FastGelu"};
  Operator op = {blank_operator(), "", has_norm, has_bias, has_residual, activation, n_parts};
  std::snprintf(op.name_text, sizeof op.name_text, "%sLinear%s%s%s%s", has_norm ? "Norm" : "",
                n_parts == 4 ? "4" : "", has_bias ? "Bias" : "",
                kActivations[static_cast<size_t>(activation)], has_residual ? "Residual" : "");
  op.name = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name_text; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index == 1 ? ort::kInt8 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) {
    return static_cast<const Operator*>(self)->n_inputs();
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  return op;
}

// Every combination: export/edgevlm_export/linear.py names them the same way.
const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = [] {
    std::vector<Operator> made;
    for (const bool norm : {false, true}) {
      for (const size_t n_parts : {1, 4}) {
        for (const bool bias : {false, true}) {
          for (const auto activation :
               {Activation::kNone, Activation::kQuickGelu, Activation::kFastGelu}) {
            for (const bool residual : {false, true}) {
              made.push_back(make(norm, n_parts, bias, activation, residual));
            }
          }
        }
      }
    }
    return made;
  }();
  return all;
}

}  // namespace

ort::Status* add_linear(ort::Api* api, ort::CustomOpDomain* domain) {
  for (const Operator& op : operators()) {
    if (ort::Status* status = ort::CustomOpDomainAdd::call(api, domain, &op)) return status;
  }
  return nullptr;
}

}  // namespace edgevlm
