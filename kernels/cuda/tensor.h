// Products on tensor cores, for tiles of eight rows (backward_tensor.cu): m16n8k8, operands of tf32, sums of fp32.
//
// tf32 has fp32's exponent and eleven bits, so that a bf16 or fp16 element is exact in it. An fp32 factor is split into parts,
// of which two hold 23 of its 24 bits and three all. Products are exact. How their sum is rounded is the hardware's own (newer
// chips cut off, with some bits to spare): a chain of products is short, and what adds chains up is fp32 arithmetic.
//
// Lane 4 group + member has, as (m, k) of A (16 × 8), as (k, n) of B (8 × 8), and as (m, n) of the sums (16 × 8),
//   A    (group, member)    (group + 8, member)    (group, member + 4)    (group + 8, member + 4)
//   B    (member, group)    (member + 4, group)
//   sums (group, 2 member)  (group, 2 member + 1)  (group + 8, 2 member)  (group + 8, 2 member + 1)
// An order of k is free, as long as A and B have the same, and so are those of m and n: a thread's own vectors of eight
// columns are operands as they are, and what comes out belongs to its own columns.
#pragma once
#include "vec.h"

namespace fastedit::cuda {

#ifdef __CUDACC__
// sum += A B, and the same with four columns of A and four rows of B: (member, …) alone. Volatile, or the compiler might move
// one to where its result is used, into a branch that only some lanes take.
__device__ inline void multiply(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ inline void multiply(float (&sum)[4], float a0, float a1, float b0) {
  asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)));
}
#endif

// x = high + low + rest, where rest is at most the last bit. Of a NaN, whose bits may round over into a zero's, low is a NaN.
struct Parts {
  float high, low, rest;
};
__device__ inline Parts parts(float x) {
  const float high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u), left = x - high;
  const float low = __uint_as_float(__float_as_uint(left) & 0xffffe000u);
  return {high, low, left - low};
}

// Two parts, cut off: an instruction less, for what is rounded to 16 bits in the end.
__device__ inline Parts cut(float x) {
  const float high = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
  return {high, __uint_as_float(__float_as_uint(x - high) & 0xffffe000u), 0.f};
}

}  // namespace fastedit::cuda
