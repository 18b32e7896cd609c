// AdamW with moments in f32 and in 8 bits (eight_bit.rs has the codes), and the sum of squares that gradients are clipped by.
#pragma once
#include "../cuda/device.cuh"

namespace adamw {

/// Of one step, bias corrections included (cpu.rs).
struct Factors {
    float grad_scale, beta1, beta2, rest1, rest2, keep, rate, deviation, eps;

    __device__ __forceinline__ void update(float& param, float grad, float& first, float& second) const {
        grad *= grad_scale;
        first = beta1 * first + rest1 * grad;
        second = beta2 * second + rest2 * grad * grad;
        param = keep * param - rate * first / (sqrtf(second) * deviation + eps);
    }
};

/// `moments [2, n]`; a thread four entries.
__device__ __forceinline__ void step(float* param, const float* grad, float* moments, long long n, const Factors& factors) {
    const size_t base = size_t(blockIdx.x) * blockDim.x * 4;
    const int count = int(min(n - (long long)base, (long long)blockDim.x * 4)), at = threadIdx.x * 4;
    if (at >= count) return;
    float p[4], g[4], first[4], second[4];
    load(p, param + base, at, count);
    load(g, grad + base, at, count);
    load(first, moments + base, at, count);
    load(second, moments + n + base, at, count);
#pragma unroll
    for (int i = 0; i < 4; i++) factors.update(p[i], g[i], first[i], second[i]);
    store(param + base, at, count, p);
    store(moments + base, at, count, first);
    store(moments + n + base, at, count, second);
}

/// Entries that share a scale, and threads of a block: one each.
constexpr int BLOCK = 256;
/// Bits of a first moment's size, the eighth is its sign; of a second moment.
constexpr int SIGNED = 7, UNSIGNED = 8;

__device__ __forceinline__ float decade(int i, int bits) {
    constexpr float POWERS[8] = {1e-7f, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
    return POWERS[8 - bits + i];
}

__device__ __forceinline__ float decoded(int code, int bits) {
    if (code == 0) return 0.f;
    const int i = 31 - __clz(code), j = code - (1 << i);
    return decade(i, bits) * (0.1f + 0.9f * (j + 0.5f) / (1 << i));
}

template <int BITS> __device__ __forceinline__ unsigned encoded(float x) {
    float first = 1.f, inverse = 1.f / decade(0, BITS);
#pragma unroll
    for (int i = 1; i < BITS; i++)
        if (x >= 0.1f * decade(i, BITS)) first = 1 << i, inverse = 1.f / decade(i, BITS);
    const float j = (x * inverse - 0.1f) * (first / 0.9f);
    constexpr float ROUND = 12582912.f; // 1.5 · 2²³: adding it rounds to an integer, which the low bits of the sum then hold
    return x > 0.f ? __float_as_uint(first + fminf(fmaxf(j - 0.5f, 0.f), first - 1.f) + ROUND) & 255 : 0;
}

/// `codes [2, n]`, `scales [2, ceil(n / BLOCK)]`. A block takes every `gridDim.x`-th block of entries.
__device__ __forceinline__ void step_8bit(float* param, const float* grad, uint8_t* codes, float* scales, long long n,
                                          const Factors& factors) {
    __shared__ float means[2][256]; // of every code
    const int thread = threadIdx.x;
    const float size = decoded(thread & 127, SIGNED);
    means[0][thread] = thread > 127 ? -size : size;
    means[1][thread] = decoded(thread, UNSIGNED);
    __syncthreads();
    const long long blocks = (n + BLOCK - 1) / BLOCK;
    for (long long block = blockIdx.x; block < blocks; block += gridDim.x) {
        const long long i = block * BLOCK + thread;
        float p = 0.f, m = 0.f, v = 0.f;
        if (i < n) {
            p = param[i];
            m = means[0][codes[i]] * scales[block];
            v = means[1][codes[n + i]] * scales[blocks + block];
            factors.update(p, grad[i], m, v);
        }
        float most[2] = {fabsf(m), v};
        block_max(most); // all have read the scales
        // The largest entry gets the last code, whose middle is a little below 1.
        const float m_scale = most[0] / means[0][127], v_scale = most[1] / means[1][255];
        if (thread == 0) scales[block] = m_scale, scales[blocks + block] = v_scale;
        if (i < n) {
            const float m_inverse = m_scale > 0.f ? 1.f / m_scale : 0.f, v_inverse = v_scale > 0.f ? 1.f / v_scale : 0.f;
            const unsigned sign = __float_as_uint(m) >> 31 << SIGNED;
            codes[i] = uint8_t(encoded<SIGNED>(fabsf(m) * m_inverse) | sign);
            codes[n + i] = uint8_t(encoded<UNSIGNED>(v * v_inverse));
            param[i] = p;
        }
    }
}

/// `parts [gridDim.x]`
__device__ __forceinline__ void sum_of_squares(const float* x, double* parts, long long n) {
    double sum[1] = {0.};
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) sum[0] += double(x[i]) * double(x[i]);
    block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum[0];
}

} // namespace adamw

extern "C" __global__ void adamw_f32(float* param, const float* grad, float* moments, long long n, float grad_scale, float beta1,
                                     float beta2, float rest1, float rest2, float keep, float rate, float deviation, float eps) {
    adamw::step(param, grad, moments, n, {grad_scale, beta1, beta2, rest1, rest2, keep, rate, deviation, eps});
}
extern "C" __global__ void adamw_8bit(float* param, const float* grad, uint8_t* codes, float* scales, long long n, float grad_scale,
                                      float beta1, float beta2, float rest1, float rest2, float keep, float rate, float deviation,
                                      float eps) {
    adamw::step_8bit(param, grad, codes, scales, n, {grad_scale, beta1, beta2, rest1, rest2, keep, rate, deviation, eps});
}
extern "C" __global__ void sum_of_squares(const float* x, double* parts, long long n) { adamw::sum_of_squares(x, parts, n); }
