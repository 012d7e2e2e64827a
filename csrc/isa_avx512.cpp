// AVX-512 F/BW/DQ/VL. Nothing here may have external linkage but the table: this file runs only where dispatch says so.
#if defined(HB_X86)
#include <immintrin.h>

#include "table.h"

namespace {
namespace hb_avx512 {

#include "avx512.inl"
#include "kernels.inl"

}  // namespace hb_avx512
}  // namespace

extern const hb_table hb_table_avx512 = hb_avx512::all_kernels;
#endif
