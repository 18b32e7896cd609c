// Matrices as decoding reads them: products with few rows of activations (a warp some rows of the matrix, each entry read once and
// widened in registers), rows by their number, matrices widened as a whole; and what is added to rows. Activations are f32, sums too.
#pragma once
#include "../cuda/device.cuh"

namespace linear {

/// Entries of a row that a warp takes at once; a lane has eight of them, in two runs of four.
constexpr int STEP = 256;

struct Runs {
    int first, second;
};

/// Entries in a type of their own, side by side.
template <class T> struct Plain {
    using Entry = T;
    static __device__ __forceinline__ Runs runs(int at, int lane) { return {at + 8 * lane, at + 8 * lane + 4}; }
    static __device__ __forceinline__ void load(float (&w)[8], const T* all, long long row, int at, int lane, int width) {
        const T* entries = all + row * width;
        if constexpr (PACK<T> == 8) {
            ::load(w, entries, at + 8 * lane, width);
        } else {
            float half[4];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                ::load(half, entries, at + 8 * lane + 4 * part, width);
#pragma unroll
                for (int i = 0; i < 4; i++) w[4 * part + i] = half[i];
            }
        }
    }
};

/// Codes of 8 bits (`float8.rs` says what they mean) behind a row's scale, as `cuda.rs` lays them out: all of it in whole 16 bytes.
struct F8_E4M3 {
    using Entry = uint8_t;
    static __device__ __forceinline__ Runs runs(int at, int lane) { return Plain<float>::runs(at, lane); }
    static __device__ __forceinline__ void load(float (&w)[8], const uint8_t* all, long long row, int at, int lane, int width) {
        const int first = at + 8 * lane;
        const uint8_t* entries = all + row * (16 + (width + 15) / 16 * 16);
        // With the same bits f16, whose exponents count from 15 and not from 7, has a 256th.
        const float scale = 256.f * *(const float*)entries;
        const bool there = first < width;
        const uint32_t* codes = (const uint32_t*)(entries + 16 + (there ? first : 0));
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const uint32_t four = there ? codes[part] : 0u;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t code = four >> 8 * i;
                w[4 * part + i] = scale * __half2float(__ushort_as_half((code & 0x80) << 8 | (code & 0x7f) << 7));
            }
        }
    }
};

/// GGUF's blocks (`op/blocks/plain.rs` says what they mean). 32 weights: a scale in f16, 8 bits a weight.
struct Q8_0 {
    using Entry = uint8_t;
    static __device__ __forceinline__ Runs runs(int at, int lane) { return Plain<float>::runs(at, lane); }
    static __device__ __forceinline__ void load(float (&w)[8], const uint8_t* all, long long row, int at, int lane, int width) {
        const int first = at + 8 * lane;
        if (first >= width) {
#pragma unroll
            for (int i = 0; i < 8; i++) w[i] = 0.f;
            return;
        }
        const uint8_t* block = all + (row * (width / 32) + first / 32) * 34;
        const float d = __half2float(*(const __half*)block);
        // Blocks stand at whole words of 16 bits only.
        const uint16_t* codes = (const uint16_t*)(block + 2 + first % 32);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint16_t two = codes[i];
            w[2 * i] = d * (float)(int8_t)(two & 255);
            w[2 * i + 1] = d * (float)(int8_t)(two >> 8);
        }
    }
};

/// 256 weights: scales of scales and of minima in f16, 6 bits each of both for every 32, 4 bits a weight. A lane has four
/// neighbouring bytes of codes, so weights of two neighbouring groups of 32.
struct Q4_K {
    using Entry = uint8_t;
    static __device__ __forceinline__ Runs runs(int at, int lane) {
        const int first = at + 64 * (lane / 8) + 4 * (lane % 8);
        return {first, first + 32};
    }
    static __device__ __forceinline__ void load(float (&w)[8], const uint8_t* all, long long row, int at, int lane, int width) {
        const uint8_t* block = all + (row * (width / 256) + at / 256) * 144;
        const uint8_t* packed = block + 4;
        const float d = __half2float(*(const __half*)block), min = __half2float(*(const __half*)(block + 2));
        const uint32_t codes = *(const uint32_t*)(block + 16 + 4 * lane);
        const int j = 2 * (lane / 8);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int k = j + part;
            const int s = k < 4 ? packed[k] & 63 : (packed[k + 4] & 15) | packed[k - 4] >> 6 << 4;
            const int m = k < 4 ? packed[k + 4] & 63 : packed[k + 4] >> 4 | packed[k] >> 6 << 4;
            const float scale = d * (float)s, lift = min * (float)m;
#pragma unroll
            for (int i = 0; i < 4; i++) w[4 * part + i] = scale * (float)(codes >> (8 * i + 4 * part) & 15) - lift;
        }
    }
};

__device__ __forceinline__ float warp_total(float x) {
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

/// y [M, N] = x [M, K] wᵀ: a warp has OUTS rows of w and ROWS of x. Grid: rows of w, M / ROWS.
template <class KIND, int ROWS, int OUTS>
__device__ void product(const typename KIND::Entry* w, const float* x, float* y, int m, int n, int width) {
    const int lane = threadIdx.x % 32, out = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * OUTS, first = blockIdx.y * ROWS;
    if (out >= n) return;
    float sums[OUTS][ROWS];
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[o][r] = 0.f;
#pragma unroll 2
    for (int at = 0; at < width; at += STEP) {
        const Runs runs = KIND::runs(at, lane);
        float wide[OUTS][8];
#pragma unroll
        for (int o = 0; o < OUTS; o++) KIND::load(wide[o], w, min(out + o, n - 1), at, lane, width);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float* row = x + (long long)min(first + r, m - 1) * width;
            float a[4], b[4];
            load(a, row, runs.first, width);
            load(b, row, runs.second, width);
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[o][r] = fmaf(wide[o][i], a[i], fmaf(wide[o][4 + i], b[i], sums[o][r]));
        }
    }
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float total = warp_total(sums[o][r]);
            if (lane == 0 && out + o < n && first + r < m) y[(long long)(first + r) * n + out + o] = total;
        }
}

/// Rows `ids` of w (null: all, one after the other) times `factor`. Grid: rows, then warps along them.
template <class KIND, class T>
__device__ void gather(const typename KIND::Entry* w, const uint32_t* ids, T* y, int width, float factor) {
    const int lane = threadIdx.x % 32, at = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * STEP;
    if (at >= width) return;
    const Runs runs = KIND::runs(at, lane);
    float wide[8], half[4];
    KIND::load(wide, w, ids ? ids[blockIdx.x] : blockIdx.x, at, lane, width);
    T* row = y + (long long)blockIdx.x * width;
#pragma unroll
    for (int part = 0; part < 2; part++) {
#pragma unroll
        for (int i = 0; i < 4; i++) half[i] = factor * wide[4 * part + i];
        const int from = part ? runs.second : runs.first;
        if (from < width) store(row, from, width, half);
    }
}

/// Every head's product with the matrix of its group: y [N, H, O + tail] of the first I entries of x [N, H, ..] and w [G, I, O], and
/// behind it the next `tail` entries of x as they are. Grid: columns, H, N / 8.
__device__ __forceinline__ void group_product(const float* x, const float* w, float* y, int rows, int rep, int x_width, int in, int outs,
                                              int tail) {
    constexpr int ROWS = 8;
    const int column = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, heads = gridDim.y, first = blockIdx.z * ROWS;
    if (column >= outs + tail) return;
    const float* entries[ROWS];
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        entries[r] = x + ((long long)min(first + r, rows - 1) * heads + head) * x_width;
        sums[r] = 0.f;
    }
    if (column < outs) {
        w += (long long)(head / rep) * in * outs + column;
        for (int i = 0; i < in; i++) {
            const float weight = w[(long long)i * outs];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] = fmaf(entries[r][i], weight, sums[r]);
        }
    } else {
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] = entries[r][in + column - outs];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (first + r < rows) y[((long long)(first + r) * heads + head) * (outs + tail) + column] = sums[r];
}

} // namespace linear

#define PRODUCT(type, KIND, ROWS, OUTS)                                                                                          \
    extern "C" __launch_bounds__(128) __global__ void product_##ROWS##_##type(const KIND::Entry* w, const float* x, float* y, int m, \
                                                                              int n, int width) {                                \
        linear::product<KIND, ROWS, OUTS>(w, x, y, m, n, width);                                                                 \
    }
#define GATHER(type, KIND, to, T)                                                                                                \
    extern "C" __global__ void gather_##type##_##to(const KIND::Entry* w, const uint32_t* ids, T* y, int width, float factor) {   \
        linear::gather<KIND, T>(w, ids, y, width, factor);                                                                       \
    }
#define KERNELS(type, KIND)                                                                                                      \
    PRODUCT(type, KIND, 1, 2)                                                                                                    \
    PRODUCT(type, KIND, 2, 4)                                                                                                    \
    PRODUCT(type, KIND, 4, 4)                                                                                                    \
    PRODUCT(type, KIND, 8, 4)                                                                                                    \
    GATHER(type, KIND, f32, float)                                                                                               \
    GATHER(type, KIND, bf16, bf16)
KERNELS(f32, linear::Plain<float>)
KERNELS(bf16, linear::Plain<bf16>)
KERNELS(f8_e4m3, linear::F8_E4M3)
KERNELS(q8_0, linear::Q8_0)
KERNELS(q4_k, linear::Q4_K)
#undef KERNELS
#undef GATHER
#undef PRODUCT

extern "C" __global__ void group_product(const float* x, const float* w, float* y, int rows, int rep, int x_width, int in, int outs,
                                         int tail) {
    linear::group_product(x, w, y, rows, rep, x_width, in, outs, tail);
}

/// x += factor · y.
extern "C" __global__ void add_scaled(float* x, const float* y, long long n, float factor) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = fmaf(factor, y[i], x[i]);
}

/// Adds `bias [width]` to every row of x.
extern "C" __global__ void add_bias(float* x, const float* bias, long long n, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += bias[i % width];
}
