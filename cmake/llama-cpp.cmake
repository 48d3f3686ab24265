# Build settings for llama-cpp-python, which PyPI has only as source. install.sh passes this file
# through CMAKE_ARGS=-DCMAKE_PROJECT_INCLUDE=...; it halves the time that llama.cpp takes to compile.

# Only libllama and libggml are used: llama.cpp's `common` (argument parser, chat templates) stays
# out, and libmtmd, which only `edgevlm bench --vs mtmd` wants, too (EDGEVLM_MTMD=ON builds it). A
# normal variable wins over the cache entry that llama-cpp-python forces (CMake policy CMP0126).
set(LLAMA_BUILD_COMMON OFF)
if(NOT EDGEVLM_MTMD)
  set(LLAVA_BUILD OFF)
endif()

# gcc before 13 declares 8 of the 64 bytes that _tile_loadconfig reads, drops the stores that fill
# them, and the AMX kernels crash on CPUs that have AMX. Without AMX the AVX-512 kernels serve.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13
   AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
