// The CPU tier that runs the passes.
#pragma once

#include "tier.h"

namespace edgevlm {

const Tier& tier_in_force();

}  // namespace edgevlm
