// NEON, as every 64-bit ARM processor has it. Nothing here may have external linkage but the table.
#if defined(HB_ARM64)
#include <arm_neon.h>

#include "table.h"

namespace {
namespace hb_neon {

#include "numbers.inl"
#include "neon_convert.inl"
#include "neon_codec.inl"
#include "eight_codec.inl"
#include "neon_vec.inl"
#include "number.inl"
#include "neon_tile.inl"
#include "eight_tile.inl"
#include "eight_dot.inl"
#include "row_scales.inl"
#include "eight_dot_one.inl"

#include "kernels.inl"

}  // namespace hb_neon
}  // namespace

extern const hb_table hb_table_neon = hb_neon::all_kernels;
#endif
