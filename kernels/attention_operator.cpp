// Attention as an operator: between all rows, of each row to those before it, or both.
#include <cstddef>
#include <cstdint>
#include <new>

#include "attention.h"
#include "operator.h"

namespace edgevlm {
namespace {

// Inputs: queries float32 [batch, n, num_heads · width], keys and values float32
// [batch, n, kv_num_heads · width]. CausalAttention has two more, int32, which say what `n` says
// (ONNX Runtime's GroupQueryAttention wants them); PrefixAttention one more, int64: how many rows
// at the front attend to each other. Output: as queries.
enum class Reach { kAll, kBefore, kPrefix };

struct Operator : ort::CustomOp {
  const char* name_text;
  Reach reach;
};

struct Kernel {
  ort::Api* api;
  int64_t n_heads;
  int64_t n_kv_heads;
  Reach reach;
};

constexpr int64_t kWidest = 512;

ort::Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  ort::Api* api = kernel.api;
  Tensor queries, keys, values, n_prefix;
  if (!read(api, context, 0, &queries) || !read(api, context, 1, &keys) ||
      !read(api, context, 2, &values) ||
      (kernel.reach == Reach::kPrefix && !read(api, context, 3, &n_prefix))) {
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
  if (ort::Status* status = allocate(api, context, queries, &attention.out)) return status;
  attention.queries = static_cast<const float*>(queries.data);
  attention.keys = static_cast<const float*>(keys.data);
  attention.values = static_cast<const float*>(values.data);
  attention.n_batch = static_cast<size_t>(queries.sizes[0]);
  attention.n = static_cast<size_t>(queries.sizes[1]);
  attention.n_heads = static_cast<size_t>(kernel.n_heads);
  attention.n_kv_heads = static_cast<size_t>(kernel.n_kv_heads);
  attention.width = static_cast<size_t>(width);
  if (kernel.reach == Reach::kAll) attention.n_front = attention.n;
  if (kernel.reach == Reach::kPrefix) {
    const int64_t n_front = *static_cast<const int64_t*>(n_prefix.data);
    if (n_front < 0 || n_front > queries.sizes[1]) {
      return failure(api, "edgevlm.PrefixAttention: the prefix is longer than the rows");
    }
    attention.n_front = static_cast<size_t>(n_front);
  }
  ThreadPool pool(api, context);
  return attention_avx512(attention, pool) ? nullptr
                                           : failure(api, "edgevlm.Attention: out of memory");
}

ort::Status* create(const ort::CustomOp* custom, ort::Api* api, const ort::KernelInfo* info,
                    void** made) {
  const auto& op = *static_cast<const Operator*>(custom);
  Kernel kernel = {api, 0, 0, op.reach};
  if (ort::Status* status =
          ort::GetIntegerAttribute::call(api, info, "num_heads", &kernel.n_heads)) {
    return status;
  }
  kernel.n_kv_heads = kernel.n_heads;
  if (op.reach == Reach::kBefore) {
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

Operator make(const char* name, Reach reach) {
  Operator op = {blank_operator(), name, reach};
  op.name = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name_text; };
  op.input_type = [](const ort::CustomOp* self, size_t index) {
    if (index < 3) return ort::kFloat;
    return static_cast<const Operator*>(self)->reach == Reach::kPrefix ? ort::kInt64 : ort::kInt32;
  };
  op.input_count = [](const ort::CustomOp* self) {
    const Reach reach = static_cast<const Operator*>(self)->reach;
    return size_t{3} + (reach == Reach::kPrefix ? 1 : 0) + (reach == Reach::kBefore ? 2 : 0);
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  return op;
}

}  // namespace

ort::Status* add_attention(ort::Api* api, ort::CustomOpDomain* domain) {
  static const Operator all[] = {make("Attention", Reach::kAll),
                                 make("CausalAttention", Reach::kBefore),
                                 make("PrefixAttention", Reach::kPrefix)};
  for (const Operator& op : all) {
    if (ort::Status* status = ort::CustomOpDomainAdd::call(api, domain, &op)) return status;
  }
  return nullptr;
}

}  // namespace edgevlm
