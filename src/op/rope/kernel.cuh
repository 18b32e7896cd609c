// Rotary position embedding: a thread some neighbouring pairs of a head.
#pragma once
#include "../cuda/device.cuh"

namespace rope {

/// `x, y [B, T, H, K]`, `cos, sin [T, K/2]`; `sign` −1 turns back. Threads: `heads_in_all * ceil(K/2 / N)` with `heads_in_all = B T H`.
template <bool HALVES, class T>
__device__ void turn(const T* x, const T* cos, const T* sin, T* y, long long heads_in_all, int positions, int heads, int half,
                     float sign) {
    constexpr int N = HALVES ? PACK<T> : PACK<T> / 2; // pairs
    const int packs = (half + N - 1) / N;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= heads_in_all * packs) return;
    const int at = int(index % packs) * N;
    const size_t head = index / packs, base = head * 2 * half;
    const size_t row = head / heads % positions * half;
    float c[N], s[N];
    load(c, cos + row, at, half);
    load(s, sin + row, at, half);
    if constexpr (HALVES) {
        float a[N], b[N];
        load(a, x + base, at, half);
        load(b, x + base + half, at, half);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float first = a[i] * c[i] - b[i] * sign * s[i];
            b[i] = b[i] * c[i] + a[i] * sign * s[i];
            a[i] = first;
        }
        store(y + base, at, half, a);
        store(y + base + half, at, half, b);
    } else {
        float pairs[2 * N];
        load(pairs, x + base, 2 * at, 2 * half);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float a = pairs[2 * i], b = pairs[2 * i + 1];
            pairs[2 * i] = a * c[i] - b * sign * s[i];
            pairs[2 * i + 1] = b * c[i] + a * sign * s[i];
        }
        store(y + base, 2 * at, 2 * half, pairs);
    }
}

} // namespace rope

#define KERNELS(T, type)                                                                                                          \
    extern "C" __global__ void rope_halves_##type(const T* x, const T* cos, const T* sin, T* y, long long heads_in_all,           \
                                                  int positions, int heads, int half, float sign) {                              \
        rope::turn<true>(x, cos, sin, y, heads_in_all, positions, heads, half, sign);                                             \
    }                                                                                                                             \
    extern "C" __global__ void rope_interleaved_##type(const T* x, const T* cos, const T* sin, T* y, long long heads_in_all,      \
                                                       int positions, int heads, int half, float sign) {                         \
        rope::turn<false>(x, cos, sin, y, heads_in_all, positions, heads, half, sign);                                            \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
