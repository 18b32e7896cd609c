// SwiGLU: a thread some neighbouring entries.
#pragma once
#include "../cuda/device.cuh"

namespace swiglu {

/// A block's entries, and where in them this thread's begin.
template <class T> struct Piece {
    size_t base;
    int count, at;

    __device__ __forceinline__ explicit Piece(long long n) {
        const int size = blockDim.x * PACK<T>;
        base = size_t(blockIdx.x) * size;
        count = int(min(n - (long long)base, (long long)size));
        at = threadIdx.x * PACK<T>;
    }
};

template <class T> __device__ void forward(const T* gate, const T* up, T* y, long long n) {
    const Piece<T> piece(n);
    if (piece.at >= piece.count) return;
    float g[PACK<T>], u[PACK<T>];
    load(g, gate + piece.base, piece.at, piece.count);
    load(u, up + piece.base, piece.at, piece.count);
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) g[i] = g[i] * sigmoid(g[i]) * u[i];
    store(y + piece.base, piece.at, piece.count, g);
}

template <class T> __device__ void backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, long long n) {
    const Piece<T> piece(n);
    if (piece.at >= piece.count) return;
    float g[PACK<T>], u[PACK<T>], d[PACK<T>];
    load(g, gate + piece.base, piece.at, piece.count);
    load(u, up + piece.base, piece.at, piece.count);
    load(d, dy + piece.base, piece.at, piece.count);
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) {
        const float s = sigmoid(g[i]), silu = g[i] * s;
        g[i] = d[i] * u[i] * (s + silu * (1.f - s));
        u[i] = d[i] * silu;
    }
    store(dgate + piece.base, piece.at, piece.count, g);
    store(dup + piece.base, piece.at, piece.count, u);
}

} // namespace swiglu

#define KERNELS(T, type)                                                                                                          \
    extern "C" __global__ void swiglu_##type(const T* gate, const T* up, T* y, long long n) { swiglu::forward(gate, up, y, n); }  \
    extern "C" __global__ void swiglu_back_##type(const T* gate, const T* up, const T* dy, T* dgate, T* dup, long long n) {       \
        swiglu::backward(gate, up, dy, dgate, dup, n);                                                                            \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
