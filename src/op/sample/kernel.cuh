// The next token of every row of logits: the first of the largest, or one drawn by temperature among those that limits leave. Of a row
// with a logit that is no number, or infinite, none.
//
// Limits are thresholds, found by halving the ordered bits of a float: the k-th largest logit, and the largest one down from which the
// weights reach their share. Logits equal to a threshold all stay. A row is read some 70 times at most, from the second cache.
#pragma once
#include "../cuda/device.cuh"

namespace sample {

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

/// The first of the largest, for all threads; its place is NONE where there is none.
__device__ __forceinline__ Best block_best(const float* x, int n) {
    __shared__ Best parts[33];
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
    if (warp == 0) {
        best = warp_best(lane < (int)blockDim.x / 32 ? parts[lane] : Best{-INFINITY, NONE});
        if (bad) best.at = NONE;
        if (lane == 0) parts[32] = best;
    }
    __syncthreads();
    return parts[32];
}

/// x [M, N] → [M]. A block a row.
__device__ __forceinline__ void argmax(const float* x, uint32_t* found, int n) {
    const Best best = block_best(x + (long long)blockIdx.x * n, n);
    if (threadIdx.x == 0) found[blockIdx.x] = best.at;
}

/// Bits in the order of the floats that they are, and back.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Limits {
    float best, inverse;
    /// Logits from here on stay, and of them those of at least this weight.
    float from, least;

    /// The largest logit has weight 1.
    __device__ __forceinline__ float weight(float logit) const {
        const float w = expf((logit - best) * inverse);
        return logit >= from && w >= least ? w : 0.f;
    }
};

/// What all weights make together, and how many logits stay, for all threads.
struct Mass {
    double weight;
    int count;
};
__device__ __forceinline__ Mass mass(const float* x, int n, const Limits& limits) {
    double sums[2] = {0., 0.};
    for (int i = threadIdx.x; i < n; i += blockDim.x) sums[0] += limits.weight(x[i]), sums[1] += x[i] >= limits.from;
    block_sum(sums);
    return {sums[0], (int)sums[1]};
}

/// The largest threshold at which `enough` is true of what stays; it is at the lowest.
template <class F> __device__ __forceinline__ float threshold(const float* x, int n, Limits limits, F enough) {
    uint32_t low = ordered(-INFINITY), high = ordered(limits.best);
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2 + 1;
        limits.from = unordered(middle);
        if (enough(mass(x, n, limits))) low = middle;
        else high = middle - 1;
    }
    return unordered(low);
}

/// Rows `rows [M]` of x [.., N] → [M]. `limits [M, 4]`: temperature, top-p, min-p, a uniform number; `top_k [M]`, 0: all. A block a
/// row.
__device__ __forceinline__ void draw(const float* x, const uint32_t* rows, const float* limits_in, const uint32_t* top_k, uint32_t* found,
                                     int n) {
    __shared__ double starts[1024];
    __shared__ uint32_t chosen;
    x += (long long)rows[blockIdx.x] * n;
    limits_in += 4 * blockIdx.x;
    const float top_p = limits_in[1];
    const int k = (int)top_k[blockIdx.x];
    const Best best = block_best(x, n);
    if (best.at == NONE || !(best.value > -INFINITY)) { // nothing to choose from
        if (threadIdx.x == 0) found[blockIdx.x] = best.at;
        return;
    }
    Limits limits = {best.value, 1.f / limits_in[0], -INFINITY, 0.f};
    if (k && k < n) limits.from = threshold(x, n, limits, [=](Mass left) { return left.count >= k; });
    limits.least = limits_in[2];
    if (top_p < 1.f) {
        const double wanted = top_p * mass(x, n, limits).weight;
        const float from = threshold(x, n, limits, [=](Mass left) { return left.weight >= wanted; });
        limits.from = fmaxf(limits.from, from);
    }
    // In the order of the vocabulary, a thread some neighbours.
    const int each = (n + blockDim.x - 1) / blockDim.x, begin = min((int)threadIdx.x * each, n), end = min(begin + each, n);
    double own = 0.;
    for (int i = begin; i < end; i++) own += limits.weight(x[i]);
    starts[threadIdx.x] = own;
    if (threadIdx.x == 0) chosen = best.at;
    __syncthreads();
    for (int by = 1; by < (int)blockDim.x; by *= 2) {
        const double before = (int)threadIdx.x >= by ? starts[threadIdx.x - by] : 0.;
        __syncthreads();
        starts[threadIdx.x] += before;
        __syncthreads();
    }
    const double wanted = limits_in[3] * starts[blockDim.x - 1];
    double reached = starts[threadIdx.x] - own;
    if (reached <= wanted && wanted < starts[threadIdx.x])
        for (int i = begin; i < end; i++) {
            const float w = limits.weight(x[i]);
            reached += w;
            if (w > 0.f && wanted < reached) {
                chosen = i;
                break;
            }
        }
    __syncthreads();
    if (threadIdx.x == 0) found[blockIdx.x] = chosen;
}

} // namespace sample

extern "C" __global__ void argmax_f32(const float* x, uint32_t* found, int n) { sample::argmax(x, found, n); }
extern "C" __global__ void draw_f32(const float* x, const uint32_t* rows, const float* limits, const uint32_t* top_k, uint32_t* found, int n) {
    sample::draw(x, rows, limits, top_k, found, n);
}
