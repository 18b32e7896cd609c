// The first of the largest entries of every row; of a row with an entry that is no number, or infinite, none.
#pragma once
#include "../cuda/device.cuh"

namespace argmax {

constexpr uint32_t NONE = 0xffffffffu;

struct Best {
    float value;
    uint32_t at;
};

__device__ __forceinline__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a; }

__device__ __forceinline__ Best warp_best(Best best) {
    for (int by = 16; by; by /= 2) {
        Best other;
        other.value = __shfl_xor_sync(~0u, best.value, by);
        other.at = __shfl_xor_sync(~0u, best.at, by);
        best = better(best, other);
    }
    return best;
}

/// x [M, N] → [M]. A block a row.
__device__ __forceinline__ void rows(const float* x, uint32_t* found, int n) {
    __shared__ Best parts[32];
    x += (long long)blockIdx.x * n;
    Best best = {-INFINITY, NONE};
    int bad = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float value = x[i];
        bad |= !(value < INFINITY);
        best = better(best, {value, (uint32_t)i});
    }
    best = warp_best(best);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) parts[warp] = best;
    bad = __syncthreads_or(bad);
    if (warp) return;
    best = warp_best(lane < (int)blockDim.x / 32 ? parts[lane] : Best{-INFINITY, NONE});
    if (lane == 0) found[blockIdx.x] = bad ? NONE : best.at;
}

} // namespace argmax

extern "C" __global__ void argmax_f32(const float* x, uint32_t* found, int n) { argmax::rows(x, found, n); }
