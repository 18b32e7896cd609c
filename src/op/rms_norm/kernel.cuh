// RMSNorm and the gated norm of Mamba2 (the formulas stand in mod.rs). Both norm groups of neighbouring channels: of RMSNorm one
// group is the row, of the gated norm what is normed is `y silu(z)`. A block a group.
#pragma once
#include "../cuda/device.cuh"

namespace rms_norm {

/// Entries `at..` of what is normed.
template <bool GATED, int N, class T> __device__ __forceinline__ void values(float (&v)[N], const T* y, const T* z, int at, int n) {
    load(v, y, at, n);
    if constexpr (GATED) {
        float gate[N];
        load(gate, z, at, n);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] *= gate[i] * sigmoid(gate[i]);
    }
}

/// `y, z, out [rows, D]`, `weight [D]`; block `row * groups + g`.
template <bool GATED, class T>
__device__ void forward(const T* y, const T* z, const T* weight, T* out, int groups, int group, float eps) {
    constexpr int N = PACK<T>;
    const size_t base = size_t(blockIdx.x) * group;
    y += base, out += base, weight += size_t(blockIdx.x % groups) * group;
    if constexpr (GATED) z += base;
    float v[N], w[N], squares[1] = {0.f};
    for (int at = threadIdx.x * N; at < group; at += blockDim.x * N) {
        values<GATED>(v, y, z, at, group);
#pragma unroll
        for (int i = 0; i < N; i++) squares[0] += v[i] * v[i];
    }
    block_sum(squares);
    const float r = 1.f / sqrtf(squares[0] / group + eps);
    for (int at = threadIdx.x * N; at < group; at += blockDim.x * N) {
        values<GATED>(v, y, z, at, group);
        load(w, weight, at, group);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] *= r * w[i];
        store(out, at, group, v);
    }
}

/// Block `(part, g)` takes every `gridDim.x`-th row of group `g`, and leaves its part of the weight's gradient in
/// `dweight [gridDim.x, D]`. Shared memory: `group` sums.
template <bool GATED, class T>
__device__ void backward(const T* y, const T* z, const T* weight, const T* dout, T* dy, T* dz, float* dweight, int rows, int group,
                         float eps) {
    constexpr int N = PACK<T>;
    float* sums = dynamic_shared<float>(); // each entry is one thread's only
    const int groups = gridDim.y, step = blockDim.x * N;
    const size_t d = size_t(groups) * group, first = size_t(blockIdx.y) * group;
    weight += first;
    for (int at = threadIdx.x * N; at < group; at += step)
        for (int i = at; i < min(at + N, group); i++) sums[i] = 0.f;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const size_t base = row * d + first;
        const T* gates = nullptr;
        if constexpr (GATED) gates = z + base;
        float v[N], w[N], g[N], totals[2] = {0.f, 0.f};
        for (int at = threadIdx.x * N; at < group; at += step) {
            values<GATED>(v, y + base, gates, at, group);
            load(w, weight, at, group);
            load(g, dout + base, at, group);
#pragma unroll
            for (int i = 0; i < N; i++) {
                totals[0] += v[i] * v[i];
                totals[1] += g[i] * w[i] * v[i];
            }
        }
        block_sum(totals);
        const float r = 1.f / sqrtf(totals[0] / group + eps);
        // Along the row itself the norm takes the gradient away.
        const float along = totals[1] * r * r / group;
        for (int at = threadIdx.x * N; at < group; at += step) {
            values<GATED>(v, y + base, gates, at, group);
            load(w, weight, at, group);
            load(g, dout + base, at, group);
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (at + i < group) sums[at + i] += g[i] * v[i] * r;
                v[i] = r * (g[i] * w[i] - v[i] * along);
            }
            if constexpr (GATED) {
                float inputs[N], gate[N];
                load(inputs, y + base, at, group);
                load(gate, gates, at, group);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const float s = sigmoid(gate[i]), silu = gate[i] * s;
                    gate[i] = v[i] * inputs[i] * (s + silu * (1.f - s));
                    v[i] *= silu;
                }
                store(dz + base, at, group, gate);
            }
            store(dy + base, at, group, v);
        }
    }
    float* part = dweight + blockIdx.x * d + first;
    for (int at = threadIdx.x * N; at < group; at += step)
        for (int i = at; i < min(at + N, group); i++) part[i] = sums[i];
}

} // namespace rms_norm

#define KERNELS(T, type)                                                                                                          \
    extern "C" __global__ void rms_norm_##type(const T* x, const T* weight, T* out, int d, float eps) {                           \
        rms_norm::forward<false, T>(x, nullptr, weight, out, 1, d, eps);                                                          \
    }                                                                                                                             \
    extern "C" __global__ void rms_norm_back_##type(const T* x, const T* weight, const T* dout, T* dx, float* dweight, int rows,  \
                                                    int d, float eps) {                                                           \
        rms_norm::backward<false, T>(x, nullptr, weight, dout, dx, nullptr, dweight, rows, d, eps);                               \
    }                                                                                                                             \
    extern "C" __global__ void gated_rms_norm_##type(const T* y, const T* z, const T* weight, T* out, int groups, int group,      \
                                                     float eps) {                                                                 \
        rms_norm::forward<true, T>(y, z, weight, out, groups, group, eps);                                                        \
    }                                                                                                                             \
    extern "C" __global__ void gated_rms_norm_back_##type(const T* y, const T* z, const T* weight, const T* dout, T* dy, T* dz,   \
                                                          float* dweight, int rows, int group, float eps) {                       \
        rms_norm::backward<true, T>(y, z, weight, dout, dy, dz, dweight, rows, group, eps);                                       \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
