// AVX2 + FMA + F16C. Nothing here may have external linkage but the table: this file runs only where dispatch says so.
#if defined(HB_X86)
#include <immintrin.h>

#include "table.h"

namespace {
namespace hb_avx2 {

#include "numbers.inl"
#include "avx2_convert.inl"
#include "avx2_codec.inl"
#include "quantize.inl"
#include "dequantize.inl"
#include "adamw.inl"

#include "avx2_vec.inl"
#include "lanes.inl"
#include "exp.inl"
#include "measure.inl"

#include "avx2_tile.inl"
#include "avx2_pack.inl"
#include "micro.inl"
#include "workspace.inl"
#include "dense.inl"
#include "product.inl"
#include "linear.inl"
#include "adapter_gradients.inl"
#include "avx2_dot.inl"
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
#include "avx2_dot_one.inl"
#include "dot_one.inl"
#include "barrier.inl"
#include "attend_one.inl"
#include "token_step.inl"

}  // namespace hb_avx2
}  // namespace

extern const hb_table hb_table_avx2 = {
    hb_avx2::quantize,
    hb_avx2::count_nonfinite,
    hb_avx2::dequantize,
    hb_avx2::quantize_8bit,
    hb_avx2::adamw,
    hb_avx2::linear,
    hb_avx2::linear_backward,
    hb_avx2::linear_frozen,
    hb_avx2::linear_frozen_dx,
    hb_avx2::softmax_cross_entropy,
    hb_avx2::rms_norm,
    hb_avx2::rms_norm_backward,
    hb_avx2::rms_norm_heads,
    hb_avx2::rms_norm_heads_backward,
    hb_avx2::rope,
    hb_avx2::gated,
    hb_avx2::gated_backward,
    hb_avx2::attention,
    hb_avx2::attention_backward,
    hb_avx2::token_step,
    hb_avx2::multiply_add,
    hb_avx2::read_all,
    hb_avx2::vec_width,
};
#endif
