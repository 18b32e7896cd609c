// What all kernels share: types of storage, loads and stores of several entries, sums over a block, and the instructions that CUDA
// C++ has no name for. Without nvcc it is the emulator that stands in for the device (tests/cuda/emulator.h).
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <stdint.h>
#else
#include "emulator.h"
#endif

using bf16 = __nv_bfloat16;

// ------------------------------------------------------------------------------------------------------ entries in storage

/// Entries of 16 bytes: what a thread reads and writes at once.
template <class T> constexpr int PACK = 16 / sizeof(T);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, bf16& to) { to = __float2bfloat16(x); }

template <class T, int N> struct __align__(N * sizeof(T)) Pack {
    T entries[N];
};

template <int N, class T> __device__ __forceinline__ bool aligned(const T* at) {
    return reinterpret_cast<uintptr_t>(at) % (N * sizeof(T)) == 0;
}

/// Entries `at..at + N` of a row of `n`, zeros behind its end; in one load where they are whole and aligned.
template <int N, class T> __device__ __forceinline__ void load(float (&to)[N], const T* row, int at, int n) {
    if (at + N <= n && aligned<N>(row + at)) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(row + at);
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = widen(pack.entries[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = at + i < n ? widen(row[at + i]) : 0.f;
    }
}

/// The other way; what is behind the end is dropped.
template <int N, class T> __device__ __forceinline__ void store(T* row, int at, int n, const float (&from)[N]) {
    if (at + N <= n && aligned<N>(row + at)) {
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; i++) narrow(from[i], pack.entries[i]);
        *reinterpret_cast<Pack<T, N>*>(row + at) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (at + i < n) narrow(from[i], row[at + i]);
    }
}

// ------------------------------------------------------------------------------------------------------------------- blocks

/// The block's dynamic shared memory.
template <class T> __device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
#else
    return reinterpret_cast<T*>(emu::dynamic);
#endif
}

struct Sum {
    static constexpr float NONE = 0.f;
    template <class V> static __device__ __forceinline__ V join(V a, V b) { return a + b; }
};
struct Max {
    static constexpr float NONE = -INFINITY;
    template <class V> static __device__ __forceinline__ V join(V a, V b) { return a > b ? a : b; }
};

/// `values` joined over all threads of the block (whole warps), for each of them, in a fixed order.
template <class How, int K, class V> __device__ __forceinline__ void block_join(V (&values)[K]) {
    __shared__ V parts[32][K];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int k = 0; k < K; k++)
        for (int by = 16; by; by /= 2) values[k] = How::join(values[k], __shfl_xor_sync(~0u, values[k], by));
    __syncthreads(); // what the last call left has been read
    if (lane == 0)
        for (int k = 0; k < K; k++) parts[warp][k] = values[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
        values[k] = lane < warps ? parts[lane][k] : V(How::NONE);
        for (int by = 16; by; by /= 2) values[k] = How::join(values[k], __shfl_xor_sync(~0u, values[k], by));
    }
}
template <int K, class V> __device__ __forceinline__ void block_sum(V (&values)[K]) { block_join<Sum>(values); }
template <int K, class V> __device__ __forceinline__ void block_max(V (&values)[K]) { block_join<Max>(values); }

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// ------------------------------------------------------------------------------------------------------------- instructions

#ifdef __CUDACC__

/// `d += a b`; fragments as the PTX ISA has them.
__device__ __forceinline__ void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Matrices of 8 x 8 entries of 16 bits in shared memory; lane `8 m + i` points to row `i` of matrix `m`.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

/// 16 bytes from global to shared memory, of which those from `bytes` on become zeros.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all groups but the last `LEFT` have arrived.
template <int LEFT> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#endif
