// AVX2 + FMA + F16C. Nothing here may have external linkage but the table: this file runs only where dispatch says so.
#if defined(HB_X86)
#include <immintrin.h>

#include "table.h"

namespace {
namespace hb_avx2 {

#include "numbers.inl"
#include "avx2_convert.inl"
#include "avx2_codec.inl"
#include "eight_codec.inl"
#include "avx2_vec.inl"
#include "number.inl"
#include "avx2_tile.inl"
#include "eight_tile.inl"
#include "eight_dot.inl"
#include "row_scales.inl"
#include "avx2_dot_one.inl"

#include "kernels.inl"

}  // namespace hb_avx2
}  // namespace

extern const hb_table hb_table_avx2 = hb_avx2::all_kernels;
#endif
