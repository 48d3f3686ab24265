// Chooses the CPU tier at run time, and holds the ABI's small functions.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "edgevlm_kernels.h"

namespace edgevlm {
namespace {

// Of this build, best first.
const Tier* const kTiers[] = {
#if defined(__x86_64__)
    &kAvx512Tier,
    &kAvx2Tier,
    &kSse41Tier,
#elif defined(__aarch64__)
    &kNeonTier,
#endif
    &kScalarTier,
};

bool runs_here(const Tier* tier) {
#if defined(__x86_64__)
  if (tier == &kAvx512Tier) {  // Ice Lake, Zen 4 and later
    return __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vbmi") != 0 &&
           __builtin_cpu_supports("avx512vnni") != 0;
  }
  if (tier == &kAvx2Tier) return __builtin_cpu_supports("avx2") != 0;
  if (tier == &kSse41Tier) return __builtin_cpu_supports("sse4.1") != 0;
#endif
  return true;  // aarch64 always has NEON
}

const Tier* best_tier() {
  for (const Tier* tier : kTiers) {
    if (runs_here(tier)) return tier;
  }
  return &kScalarTier;
}

std::atomic<const Tier*> selected{nullptr};

}  // namespace

const Tier& tier_in_force() {
  const Tier* tier = selected.load();
  return tier != nullptr ? *tier : *best_tier();
}

}  // namespace edgevlm

using namespace edgevlm;

int32_t edgevlm_abi_version(void) { return EDGEVLM_ABI_VERSION; }

const char* edgevlm_tier_name(int32_t index) {
  for (const Tier* tier : kTiers) {
    if (runs_here(tier) && index-- == 0) return tier->name;
  }
  return nullptr;
}

const char* edgevlm_tier(void) { return tier_in_force().name; }

int32_t edgevlm_select_tier(const char* name) {
  if (name == nullptr) return EDGEVLM_INVALID_ARGUMENT;
  for (const Tier* tier : kTiers) {
    if (std::strcmp(tier->name, name) != 0) continue;
    if (!runs_here(tier)) return EDGEVLM_TIER_LACKING;
    selected = tier;
    return EDGEVLM_OK;
  }
  return EDGEVLM_UNKNOWN_TIER;
}

bool edgevlm_flag_is_set(void* flag) { return *static_cast<volatile int32_t*>(flag) != 0; }
