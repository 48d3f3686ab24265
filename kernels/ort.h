// The part of ONNX Runtime's C API that a custom operator needs, written after its header
// onnxruntime_c_api.h. Entries of OrtApi are only ever appended and OrtCustomOp only ever grows, so
// what is declared here, of version 17 (2024), holds for every later ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgevlm::ort {

constexpr uint32_t kApiVersion = 17;

struct Status;  // null is success
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;  // OrtTensorTypeAndShapeInfo
struct ShapeInference;

enum ErrorCode : int { kFail = 1 };
enum ElementType : int { kFloat = 1, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };

using Api = void* const;  // an array of functions

struct ApiBase {
  Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// A function of the API: its place in OrtApi, and its type without the status that it returns.
template <size_t kIndex, class... Arguments>
struct Function {
  using Pointer = Status* (*)(Arguments...);
  static Status* call(Api* api, Arguments... arguments) {
    return reinterpret_cast<Pointer>(api[kIndex])(arguments...);
  }
};

using CreateStatus = Function<0, ErrorCode, const char*>;
using CreateCustomOpDomain = Function<26, const char*, CustomOpDomain**>;
using CustomOpDomainAdd = Function<27, CustomOpDomain*, const struct CustomOp*>;
using AddCustomOpDomain = Function<28, SessionOptions*, CustomOpDomain*>;
using GetTensorMutableData = Function<51, Value*, void**>;
using GetDimensionsCount = Function<61, const Shape*, size_t*>;
using GetDimensions = Function<62, const Shape*, int64_t*, size_t>;
using GetTensorTypeAndShape = Function<65, const Value*, Shape**>;
using GetFloatAttribute = Function<85, const KernelInfo*, const char*, float*>;
using GetIntegerAttribute = Function<86, const KernelInfo*, const char*, int64_t*>;
using GetInput = Function<90, const KernelContext*, size_t, const Value**>;
using GetOutput = Function<91, KernelContext*, size_t, const int64_t*, size_t, Value**>;
using ReleaseShape = Function<99, Shape*>;  // returns nothing
using ParallelFor =
    Function<274, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);  // 0: required
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, ShapeInference*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
};

}  // namespace edgevlm::ort
