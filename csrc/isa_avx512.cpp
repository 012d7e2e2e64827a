// AVX-512 F/BW/DQ/VL. Nothing here may have external linkage but the table: this file runs only where dispatch says so.
#if defined(HB_X86)
#include <immintrin.h>

#include "table.h"

namespace {
namespace hb_avx512 {

#include "numbers.inl"
#include "avx2_convert.inl"
#include "avx2_codec.inl"
#include "quantize.inl"
#include "dequantize.inl"
#include "adamw.inl"

#include "avx512_vec.inl"
#include "lanes.inl"
#include "exp.inl"
#include "measure.inl"

#include "avx512_tile.inl"
#include "avx2_pack.inl"
#include "micro.inl"
#include "workspace.inl"
#include "dense.inl"
#include "product.inl"
#include "linear.inl"
#include "adapter_gradients.inl"
#include "avx512_dot.inl"
#include "small.inl"
#include "group.inl"
#include "frozen.inl"
#include "cross_entropy.inl"

#include "norm.inl"
#include "rope.inl"
#include "gated.inl"

#include "attention_layout.inl"
#include "attention.inl"
#include "attention_backward.inl"

#include "row_scales.inl"
#include "avx512_dot_one.inl"
#include "dot_one.inl"
#include "barrier.inl"
#include "attend_one.inl"
#include "token_step.inl"

}  // namespace hb_avx512
}  // namespace

extern const hb_table hb_table_avx512 = {
    hb_avx512::quantize,
    hb_avx512::count_nonfinite,
    hb_avx512::dequantize,
    hb_avx512::quantize_8bit,
    hb_avx512::adamw,
    hb_avx512::linear,
    hb_avx512::linear_backward,
    hb_avx512::linear_frozen,
    hb_avx512::linear_frozen_dx,
    hb_avx512::softmax_cross_entropy,
    hb_avx512::rms_norm,
    hb_avx512::rms_norm_backward,
    hb_avx512::rms_norm_heads,
    hb_avx512::rms_norm_heads_backward,
    hb_avx512::rope,
    hb_avx512::gated,
    hb_avx512::gated_backward,
    hb_avx512::attention,
    hb_avx512::attention_backward,
    hb_avx512::token_step,
    hb_avx512::multiply_add,
    hb_avx512::read_all,
    hb_avx512::vec_width,
};
#endif
