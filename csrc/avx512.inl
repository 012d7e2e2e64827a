// AVX-512 F/BW/DQ/VL up to the number that tiles hold. Included inside an ISA's namespace.

#include "numbers.inl"
#include "avx2_convert.inl"
#include "avx2_codec.inl"
#include "eight_codec.inl"
#include "avx512_vec.inl"
#include "number.inl"
#include "avx512_tile.inl"
#include "avx512_dot.inl"
#include "row_scales.inl"
#include "avx512_dot_one.inl"
