// Stochastic rounding to bf16: the draws of mod.rs, bit for bit.
#pragma once
#include "../cuda/device.cuh"

namespace rounding {

__device__ __forceinline__ unsigned mix(unsigned x) {
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

/// A thread an entry.
__device__ __forceinline__ void round(const float* from, bf16* to, long long n, unsigned first, unsigned second) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned draw = mix(mix(unsigned(i) ^ first) ^ second) >> 16;
    const float x = from[i];
    // What is left of its bits is a number of bf16 itself.
    to[i] = __float2bfloat16(x != x ? x : __uint_as_float((__float_as_uint(x) + draw) & 0xffff0000u));
}

} // namespace rounding

extern "C" __global__ void round_bf16(const float* from, bf16* to, long long n, int first, int second) {
    rounding::round(from, to, n, first, second);
}
