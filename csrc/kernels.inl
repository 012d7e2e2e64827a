// Everything that is written once for all instruction sets with vectors, in the order of its dependencies, and the table of
// it. Included inside an ISA's namespace, after its own pieces.

#include "quantize.inl"
#include "scales.inl"
#include "constants.inl"
#include "choose.inl"
#include "dequantize.inl"
#include "adamw.inl"

#include "lanes.inl"
#include "exp.inl"
#include "improve.inl"
#include "measure.inl"

#include "pack.inl"
#include "micro.inl"
#include "workspace.inl"
#include "dense.inl"
#include "product.inl"
#include "linear.inl"
#include "adapter_gradients.inl"
#include "offsets.inl"
#include "small.inl"
#include "group.inl"
#include "frozen.inl"
#include "add_product.inl"
#include "cross_entropy.inl"

#include "norm.inl"
#include "rope.inl"
#include "gated.inl"

#include "attention_layout.inl"
#include "attention.inl"
#include "attention_backward.inl"

#include "dot_one.inl"
#include "barrier.inl"
#include "attend_one.inl"
#include "token_step.inl"
#include "attend_blocks.inl"
#include "batch_step.inl"

constexpr hb_table all_kernels = {
    quantize,
    codes_for_scales,
    count_nonfinite,
    dequantize,
    quantize_8bit,
    least_error_scales,
    least_error_constants,
    choose_codes,
    adamw,
    linear,
    linear_backward,
    linear_frozen,
    linear_frozen_dx,
    add_product,
    improve_codes,
    softmax_cross_entropy,
    rms_norm,
    rms_norm_backward,
    rms_norm_heads,
    rms_norm_heads_backward,
    rope,
    gated,
    gated_backward,
    attention,
    attention_backward,
    token_step,
    batch_step,
    multiply_add,
    read_all,
    vec_width,
};
