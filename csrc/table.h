// What one ISA offers. Each isa_*.cpp fills one table; dispatch.cpp picks one at run time.
#pragma once
#include <stddef.h>

#include "halfbyte.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

struct hb_table {
    void (*quantize)(const void*, int, int64_t, int64_t, const float*, const uint8_t*, uint8_t*, float*, int);
    void (*codes_for_scales)(const void*, int, int64_t, int64_t, const float*, int, const float*, const uint8_t*,
                             uint8_t*, int);
    int64_t (*count_nonfinite)(const void*, int, int64_t, int);
    void (*dequantize)(const hb_weight*, int64_t, int64_t, int, void*, int);
    void (*quantize_8bit)(const float*, int64_t, const hb_state_map*, uint8_t*, float*, int);
    void (*least_error_scales)(const void*, int, int64_t, int64_t, const float*, int64_t, const float*, const float*,
                               const float*, int, float*, int);
    void (*least_error_constants)(const void*, int, int64_t, int64_t, const float*, int64_t, const float*, const float*,
                                  const float*, const float*, int, float*, int);
    void (*choose_codes)(const float*, const float*, int64_t, int64_t, const float*, int64_t, const float*,
                         const float*, int, uint8_t*, float*, int);
    void (*adamw)(const hb_adamw_numbers*, const hb_adamw_page*, int64_t, const hb_state_map*, int);
    // An ISA may lack those below; dispatch.cpp says so to the caller.
    int (*linear)(const hb_member*, int, const void*, int, int64_t, void*, float*, int) = nullptr;
    int (*linear_backward)(const hb_member*, int, const void*, const void*, const float*, int, int64_t, void*, float*,
                           int) = nullptr;
    int (*linear_frozen)(const void*, const float*, int, int64_t, int64_t, const void*, int, int64_t, const void*,
                         void*, int) = nullptr;
    int (*linear_frozen_dx)(const void*, const float*, int, int64_t, int64_t, const void*, int, int64_t, void*,
                            int) = nullptr;
    int (*add_product)(const void*, int64_t, const void*, int64_t, int, int64_t, int64_t, int64_t, float, float*,
                       int64_t, int) = nullptr;
    int (*improve_codes)(uint8_t*, float*, float*, const float*, int64_t, int64_t, const float*, const float*,
                         const float*, int, hb_change*, int32_t*, int) = nullptr;
    int (*softmax_cross_entropy)(void*, int, int64_t, int64_t, const int64_t*, double*, int, int) = nullptr;
    int (*rms_norm)(const void*, const void*, const void*, int, int, int64_t, int64_t, float, float, void*, void*,
                    float*, int) = nullptr;
    int (*rms_norm_backward)(const void*, const void*, const void*, int, int, const float*, const void*, int64_t,
                             int64_t, float, void*, int) = nullptr;
    int (*rms_norm_heads)(const void*, const void*, const void*, int, int, int64_t, int64_t, int64_t, int64_t, float,
                          float, void*, float*, int) = nullptr;
    int (*rms_norm_heads_backward)(void*, const void*, const void*, const void*, int, int, const float*, int64_t,
                                   int64_t, int64_t, int64_t, float, int) = nullptr;
    int (*rope)(void*, int, const void*, const void*, int, int64_t, int64_t, int64_t, int64_t, int64_t, int,
                int) = nullptr;
    int (*gated)(const void*, int, int64_t, int64_t, int, void*, int) = nullptr;
    int (*gated_backward)(const void*, const void*, int, int64_t, int64_t, int, void*, void*, int) = nullptr;
    int (*attention)(const hb_packed*, void*, float*, int) = nullptr;
    int (*attention_backward)(const hb_packed*, const void*, const void*, const float*, void*, int) = nullptr;
    int (*token_step)(const hb_decoder*, int64_t, const float*, float*, int) = nullptr;
    int (*batch_step)(const hb_decoder*, const hb_batch*, int) = nullptr;
    float (*multiply_add)(int64_t, int) = nullptr;
    float (*read_all)(const float*, int64_t, int) = nullptr;
    int64_t lanes = 0;  // floats in a vector
};

extern const hb_table hb_table_baseline;
#if defined(HB_X86)
extern const hb_table hb_table_avx2;
extern const hb_table hb_table_avx512;
extern const hb_table hb_table_avx512_bf16;
#elif defined(HB_ARM64)
extern const hb_table hb_table_neon;
#endif

// A kept, grown-on-demand buffer (64-byte aligned). hb_workspace_take returns NULL when memory is out.
void* hb_workspace_take(int64_t bytes);
void hb_workspace_give(void* buffer);

// Asks for huge pages where the buffer is large enough to hold whole ones and has not been touched.
void hb_prefer_huge_pages(void* start, int64_t bytes);

void hb_yield(void);  // lets another thread have this core
