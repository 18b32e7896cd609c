// Products of small matrices in shared memory by one warp, for kernels that work on tiles.
//
// A warp holds 16·MT rows and 8·NT columns of a result in `float c[MT][NT][4]`: lane `l` has, of tile (m, n), the entries
// (16m + l/4, 8n + 2(l%4)), the one right of it, and both eight rows below, as `mma.m16n8k16` leaves them (PTX ISA 9.7.14).
// bf16 and f16 go through the tensor cores; f32 through fused multiply-adds in the same layout, so that a kernel is written once.
#pragma once
#include "device.cuh"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

using f16 = __half;

__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, f16& to) { to = __float2half(x); }

namespace tile {

/// Two neighbours in 32 bits, `lo` in the lower half.
template <class T> __device__ __forceinline__ uint32_t pack(float lo, float hi);
/// c += a b, a of 16 rows and 16 columns and b of 16 rows and 8 columns spread over the warp.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16_16816(c, a, b);
}

#ifdef __CUDACC__

template <> __device__ __forceinline__ uint32_t pack<bf16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// 4 bytes from global to shared memory.
__device__ __forceinline__ void cp_async_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
/// 2^x, relative error 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

template <> inline uint32_t pack<bf16>(float lo, float hi) {
    return emu::float_to_bf16(lo) | uint32_t(emu::float_to_bf16(hi)) << 16;
}
template <> inline uint32_t pack<f16>(float lo, float hi) { return emu::float_to_f16(lo) | uint32_t(emu::float_to_f16(hi)) << 16; }
template <> inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16_16816(c, a, b); }
inline float exp2_fast(float x) { return exp2f(x); }

#endif

/// Two neighbours of a row.
template <class T> __device__ __forceinline__ void put2(T* to, float x, float y) { *(uint32_t*)to = pack<T>(x, y); }
template <> __device__ __forceinline__ void put2<float>(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }

/// Entries from row to row of a tile of D columns in shared memory: 16 bytes more than they need, so that eight rows of 16 bytes
/// stand in different banks (D a multiple of 16).
template <class T, int D> constexpr int PITCH = D + 16 / (int)sizeof(T);

template <int MT, int NT> __device__ __forceinline__ void clear(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.f;
}

/// The row, within the warp's, of entries `2·half` and `2·half + 1` of tile m.
__device__ __forceinline__ int row_of(int m, int half) { return 16 * m + (threadIdx.x & 31) / 4 + 8 * half; }
/// The column of the even entries of tile n.
__device__ __forceinline__ int column_of(int n) { return 8 * n + 2 * (threadIdx.x & 3); }

/// Sums (or maxima) over a row of the result are completed over the four lanes that share it.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
/// Sums over the rows of a column, over the eight lanes that share it.
__device__ __forceinline__ float column_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

/// Products for 16-bit types. `a` points to the warp's first row (or, where a is transposed, column).
template <class T> struct Products {
    /// c += a bᵀ; a [16·MT, K], b [8·NT, K].
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void nt(float (&c)[MT][NT][4], const T* a, const T* b) {
        int lane = threadIdx.x & 31;
        a += lane % 16 * PA + 8 * (lane / 16);
        b += (lane % 8 + 8 * (lane / 16)) * PB + 8 * (lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            uint32_t left[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix_x4(left[m], a + 16 * m * PA + k);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t right[4];
                ldmatrix_x4(right, b + 8 * n * PB + k);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma<T>(c[m][n], left[m], {right[0], right[1]});
                    mma<T>(c[m][n + 1], left[m], {right[2], right[3]});
                }
            }
        }
    }
    /// c += a b; a [16·MT, K], b [K, 8·NT].
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void nn(float (&c)[MT][NT][4], const T* a, const T* b) {
        int lane = threadIdx.x & 31;
        a += lane % 16 * PA + 8 * (lane / 16);
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            uint32_t left[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix_x4(left[m], a + 16 * m * PA + k);
            step(c, left, b + k * PB, PB);
        }
    }
    /// c += aᵀ b; a [K, 16·MT], b [K, 8·NT].
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void tn(float (&c)[MT][NT][4], const T* a, const T* b) {
        int lane = threadIdx.x & 31;
        a += (lane % 8 + 8 * (lane / 16)) * PA + 8 * (lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            uint32_t left[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix_x4_trans(left[m], a + k * PA + 16 * m);
            step(c, left, b + k * PB, PB);
        }
    }
    /// c += a b; a [16·MT, 8·KT] as a product left it, b [8·KT, 8·NT]. No room is needed.
    template <int PB, int MT, int KT, int NT>
    static __device__ __forceinline__ void rn(float (&c)[MT][NT][4], const float (&a)[MT][KT][4], T*, const T* b) {
#pragma unroll
        for (int k = 0; k < KT; k += 2) {
            uint32_t left[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                left[m][0] = pack<T>(a[m][k][0], a[m][k][1]);
                left[m][1] = pack<T>(a[m][k][2], a[m][k][3]);
                left[m][2] = pack<T>(a[m][k + 1][0], a[m][k + 1][1]);
                left[m][3] = pack<T>(a[m][k + 1][2], a[m][k + 1][3]);
            }
            step(c, left, b + 8 * k * PB, PB);
        }
    }
    /// Entries of room that `rn` needs for a warp.
    template <int MT, int KT> static constexpr int ROOM = 0;

  private:
    /// 16 rows of b.
    template <int MT, int NT>
    static __device__ __forceinline__ void step(float (&c)[MT][NT][4], const uint32_t (&left)[MT][4], const T* b, int pb) {
        int lane = threadIdx.x & 31;
        b += lane % 16 * pb + 8 * (lane / 16);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, b + 8 * n);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(c[m][n], left[m], {right[0], right[1]});
                mma<T>(c[m][n + 1], left[m], {right[2], right[3]});
            }
        }
    }
};

/// The same in f32, four entries of a row at a time.
template <> struct Products<float> {
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void nt(float (&c)[MT][NT][4], const float* a, const float* b) {
#pragma unroll 1
        for (int k = 0; k < K; k += 4) {
            float left[MT][2][4];
            rows<PA>(left, a + k);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float right[2][4];
                four(right[0], b + column_of(n) * PB + k);
                four(right[1], b + (column_of(n) + 1) * PB + k);
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int e = 0; e < 4; e++) c[m][n][i] = fmaf(left[m][i / 2][e], right[i % 2][e], c[m][n][i]);
            }
        }
    }
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void nn(float (&c)[MT][NT][4], const float* a, const float* b) {
#pragma unroll 1
        for (int k = 0; k < K; k += 4) {
            float left[MT][2][4];
            rows<PA>(left, a + k);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float of[MT][2];
#pragma unroll
                for (int m = 0; m < MT; m++) of[m][0] = left[m][0][e], of[m][1] = left[m][1][e];
                step(c, of, b + (k + e) * PB);
            }
        }
    }
    template <int K, int PA, int PB, int MT, int NT>
    static __device__ __forceinline__ void tn(float (&c)[MT][NT][4], const float* a, const float* b) {
#pragma unroll 4
        for (int k = 0; k < K; k++) {
            float left[MT][2];
#pragma unroll
            for (int m = 0; m < MT; m++) left[m][0] = a[k * PA + row_of(m, 0)], left[m][1] = a[k * PA + row_of(m, 1)];
            step(c, left, b + k * PB);
        }
    }
    template <int MT, int KT> static constexpr int ROOM = 16 * MT * (8 * KT + 4);
    /// `room` is this warp's alone.
    template <int PB, int MT, int KT, int NT>
    static __device__ __forceinline__ void rn(float (&c)[MT][NT][4], const float (&a)[MT][KT][4], float* room, const float* b) {
        constexpr int P = 8 * KT + 4;
        __syncwarp();
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int k = 0; k < KT; k++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    put2(room + row_of(m, half) * P + column_of(k), a[m][k][2 * half], a[m][k][2 * half + 1]);
        __syncwarp();
        nn<8 * KT, P, PB>(c, room, b);
    }

  private:
    static __device__ __forceinline__ void four(float (&to)[4], const float* from) {
        const float4 x = *(const float4*)from;
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
    template <int PA, int MT> static __device__ __forceinline__ void rows(float (&to)[MT][2][4], const float* a) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) four(to[m][half], a + row_of(m, half) * PA);
    }
    /// A row of b.
    template <int MT, int NT> static __device__ __forceinline__ void step(float (&c)[MT][NT][4], const float (&left)[MT][2], const float* b) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float2 right = *(const float2*)(b + column_of(n));
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) c[m][n][i] = fmaf(left[m][i / 2], i % 2 ? right.y : right.x, c[m][n][i]);
        }
    }
};

/// Whether rows that begin `steps` entries from `at` on begin at multiples of 16 bytes.
template <class T, class... Steps> __device__ __forceinline__ bool whole(const T* at, Steps... steps) {
    return aligned<PACK<T>>(at) && ((steps % PACK<T> == 0) && ...);
}

/// Rows `first..first + R` of a matrix of `rows` rows and `columns ≤ D` columns, `stride` entries apart, into a tile of R rows in shared
/// memory; zeros around them. `wholly`: rows begin at multiples of 16 bytes and columns fill them. There after `cp_async_commit`,
/// `cp_async_wait` and a barrier of the THREADS that take part, of which this is `thread`.
template <class T, int R, int D, int THREADS>
__device__ __forceinline__ void fetch(T* tile, const T* from, int first, int rows, long long stride, int columns, bool wholly,
                                      int thread) {
    if (wholly) {
        // Neighbouring threads take 64 or 128 bytes of a row. Not unrolled: offsets of all rows would fill the registers of the caller's loop.
        constexpr int E = 16 / sizeof(T), UNITS = D / E, ACROSS = UNITS % 8 ? 4 : 8;
        static_assert(UNITS % ACROSS == 0 && THREADS % ACROSS == 0);
        const int column = thread % ACROSS * E;
        int row = thread / ACROSS;
        const T* source = from + (first + row) * stride + column;
        T* target = tile + row * PITCH<T, D> + column;
#pragma unroll 1
        for (; row < R; row += THREADS / ACROSS) {
#pragma unroll
            for (int i = 0; i < UNITS; i += ACROSS) {
                bool there = first + row < rows && column + i * E < columns;
                cp_async_16(target + i * E, there ? source + i * E : from, there ? 16 : 0);
            }
            source += THREADS / ACROSS * stride;
            target += THREADS / ACROSS * PITCH<T, D>;
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < R * D; i += THREADS) {
            int row = i / D, column = i % D;
            bool there = first + row < rows && column < columns;
            tile[row * PITCH<T, D> + column] = there ? from[(first + row) * stride + column] : T(0.f);
        }
    }
}

/// By all threads of the block.
template <class T, int R, int D, int THREADS>
__device__ __forceinline__ void fetch(T* tile, const T* from, int first, int rows, long long stride, int columns, bool wholly) {
    fetch<T, R, D, THREADS>(tile, from, first, rows, stride, columns, wholly, threadIdx.x);
}

} // namespace tile
