// The instruction sets that the kernels are compiled for: the baseline of the architecture and the
// steps above it that are worth their compile time. Included before <hwy/foreach_target.h>.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
