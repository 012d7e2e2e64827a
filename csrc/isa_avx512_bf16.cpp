// AVX-512 with bfloat16 units: as isa_avx512.cpp, but bfloat16 is multiplied in pairs. Nothing here may have external
// linkage but the table: this file runs only where dispatch says so.
#if defined(HB_X86)
#include <immintrin.h>

#include "table.h"

namespace {
namespace hb_avx512_bf16 {

#include "avx512.inl"
#include "avx512_pairs.inl"
#include "kernels.inl"

}  // namespace hb_avx512_bf16
}  // namespace

extern const hb_table hb_table_avx512_bf16 = hb_avx512_bf16::all_kernels;
#endif
