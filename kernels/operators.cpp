// ONNX Runtime's custom operators of domain "edgevlm".
//
// A graph brings each of them as a function of ONNX Runtime's own operators, too, so it runs
// without this file: on CPUs where those are faster, and on CPUs that lack the instructions.
#include "operator.h"

namespace edgevlm {
namespace {

// Sessions refer to it as long as the library is loaded.
ort::Status* domain(ort::Api* api, ort::CustomOpDomain** found) {
  static ort::CustomOpDomain* made = nullptr;
  if (made == nullptr) {
    ort::CustomOpDomain* fresh = nullptr;
    if (ort::Status* status = ort::CreateCustomOpDomain::call(api, "edgevlm", &fresh)) {
      return status;
    }
    if (ort::Status* status = add_linear(api, fresh)) return status;
    if (__builtin_cpu_supports("avx512bf16")) {
      if (ort::Status* status = add_attention(api, fresh)) return status;
    }
    made = fresh;
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
