// Attention as an operator: between all rows, or of each row to those before it.
#include <cstddef>
#include <cstdint>
#include <new>

#include "attention.h"
#include "operator.h"

namespace edgevlm {
namespace {

// Inputs: queries float32 [batch, n, num_heads · width], keys and values float32
// [batch, n, kv_num_heads · width]. CausalAttention takes a batch of one, and keys and values of
// the rows before, float16 [past, kv_num_heads · width] and [kv_num_heads · width, past], and int64
// [], how many rows at the front of all attend to each other. Output: as queries.
struct Operator : ort::CustomOp {
  const char* name_text;
  bool causal;
};

struct Kernel {
  ort::Api* api;
  int64_t n_heads;
  int64_t n_kv_heads;
  bool causal;
};

constexpr int64_t kWidest = 512;

// The rows before; false where sizes disagree.
bool add_past(const Tensor& keys, const Tensor& values, int64_t n_front, int64_t stride,
              Attention* attention) {
  attention->past_keys = static_cast<const uint16_t*>(keys.data);
  attention->past_values = static_cast<const uint16_t*>(values.data);
  const int64_t n_past = keys.sizes[0];
  attention->n_past = static_cast<size_t>(n_past);
  attention->n_front = static_cast<size_t>(n_front);
  return keys.n_axes == 2 && values.n_axes == 2 && keys.sizes[1] == stride &&
         values.sizes[0] == stride && values.sizes[1] == n_past && attention->n_batch == 1 &&
         n_front >= 0 && attention->n_front <= attention->n_past + attention->n;
}

ort::Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  ort::Api* api = kernel.api;
  Tensor queries, keys, values, past_keys, past_values, n_prefix;
  if (!read(api, context, 0, &queries) || !read(api, context, 1, &keys) ||
      !read(api, context, 2, &values) ||
      (kernel.causal &&
       (!read(api, context, 3, &past_keys) || !read(api, context, 4, &past_values) ||
        !read(api, context, 5, &n_prefix)))) {
    return failure(api, "edgevlm.Attention: an input cannot be read");
  }
  const int64_t width = queries.last() / kernel.n_heads;
  bool fits = queries.n_axes == 3 && keys.n_axes == 3 && values.n_axes == 3 && width > 0 &&
              width % 2 == 0 && width <= kWidest && queries.last() == width * kernel.n_heads &&
              keys.last() == width * kernel.n_kv_heads;
  for (size_t i = 0; i < 3 && fits; ++i) {
    fits = keys.sizes[i] == values.sizes[i] && (i == 2 || keys.sizes[i] == queries.sizes[i]);
  }
  if (!fits) return failure(api, "edgevlm.Attention: sizes of queries, keys and values disagree");
  Attention attention = {};
  attention.queries = static_cast<const float*>(queries.data);
  attention.keys = static_cast<const float*>(keys.data);
  attention.values = static_cast<const float*>(values.data);
  attention.n_batch = static_cast<size_t>(queries.sizes[0]);
  attention.n = static_cast<size_t>(queries.sizes[1]);
  attention.n_heads = static_cast<size_t>(kernel.n_heads);
  attention.n_kv_heads = static_cast<size_t>(kernel.n_kv_heads);
  attention.width = static_cast<size_t>(width);
  attention.n_front = attention.n;
  if (kernel.causal &&
      !add_past(past_keys, past_values, *static_cast<const int64_t*>(n_prefix.data), keys.last(),
                &attention)) {
    return failure(api, "edgevlm.CausalAttention: sizes of past, prefix and rows disagree");
  }
  if (ort::Status* status = allocate(api, context, queries, &attention.out)) return status;
  ThreadPool pool(api, context);
  return attention_avx512(attention, pool) ? nullptr
                                           : failure(api, "edgevlm.Attention: out of memory");
}

ort::Status* create(const ort::CustomOp* custom, ort::Api* api, const ort::KernelInfo* info,
                    void** made) {
  const auto& op = *static_cast<const Operator*>(custom);
  Kernel kernel = {api, 0, 0, op.causal};
  if (ort::Status* status =
          ort::GetIntegerAttribute::call(api, info, "num_heads", &kernel.n_heads)) {
    return status;
  }
  kernel.n_kv_heads = kernel.n_heads;
  if (op.causal) {
    if (ort::Status* status =
            ort::GetIntegerAttribute::call(api, info, "kv_num_heads", &kernel.n_kv_heads)) {
      return status;
    }
  }
  if (kernel.n_kv_heads < 1 || kernel.n_heads % kernel.n_kv_heads != 0) {
    return failure(api, "edgevlm.Attention: heads of keys do not divide those of queries");
  }
  *made = new (std::nothrow) Kernel(kernel);
  return *made != nullptr ? nullptr : failure(api, "edgevlm.Attention: out of memory");
}

Operator make(const char* name, bool causal) {
  Operator op = {blank_operator(), name, causal};
  op.name = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name_text; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index < 3 ? ort::kFloat : index < 5 ? ort::kFloat16 : ort::kInt64;
  };
  op.input_count = [](const ort::CustomOp* self) {
    return size_t{3} + (static_cast<const Operator*>(self)->causal ? 3 : 0);
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  return op;
}

}  // namespace

ort::Status* add_attention(ort::Api* api, ort::CustomOpDomain* domain) {
  static const Operator all[] = {make("Attention", false), make("CausalAttention", true)};
  for (const Operator& op : all) {
    if (ort::Status* status = ort::CustomOpDomainAdd::call(api, domain, &op)) return status;
  }
  return nullptr;
}

}  // namespace edgevlm
