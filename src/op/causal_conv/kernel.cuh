// The short causal convolution with SiLU. A thread walks down some positions of neighbouring channels and keeps what the taps reach
// in registers: every input is read once.
#pragma once
#include "../cuda/device.cuh"

namespace causal_conv {

/// Taps that there are registers for; narrower convolutions have zeros before.
constexpr int WIDTH = 4;

/// What forward and backward share: taps of this thread's channels, and the inputs that the present position reaches.
template <int N, class T> struct Window {
    const T *x, *taps, *bias;
    int width, c, at;
    float tap[WIDTH][N], shift[N], inputs[WIDTH][N];

    /// `x` is the row's position 0; `taps [width, C]`.
    __device__ __forceinline__ Window(const T* x, const T* taps, const T* bias, int width, int c, int at)
        : x(x), taps(taps), bias(bias), width(width), c(c), at(at) {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            const int from = w - (WIDTH - width);
#pragma unroll
            for (int i = 0; i < N; i++) tap[w][i] = inputs[w][i] = 0.f;
            if (from >= 0) load(tap[w], taps + size_t(from) * c, at, c);
        }
        load(shift, bias, at, c);
    }

    /// Takes the input of position `t` in; those before the row are zero.
    __device__ __forceinline__ void take(long long row_stride, int t) {
#pragma unroll
        for (int w = 0; w + 1 < WIDTH; w++)
#pragma unroll
            for (int i = 0; i < N; i++) inputs[w][i] = inputs[w + 1][i];
        if (t >= 0) load(inputs[WIDTH - 1], x + t * row_stride, at, c);
    }

    /// Before the activation, of a position `into` entries into its document.
    __device__ __forceinline__ void product(float (&out)[N], int into) const {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = shift[i];
#pragma unroll
        for (int back = 0; back < WIDTH; back++)
            if (back <= into)
#pragma unroll
                for (int i = 0; i < N; i++) out[i] += tap[WIDTH - 1 - back][i] * inputs[WIDTH - 1 - back][i];
    }
};

/// How far position `t` is into its document; without documents, into its row.
__device__ __forceinline__ int into_document(const uint32_t* starts, size_t row, int t) {
    return starts ? t - int(starts[row + t]) : t;
}

/// `x [B, T, C]` with strides of batch and row, `starts [B, T]` or null, `y [B, T, C]`. Block `(channels, positions, b)`.
template <int N, class T>
__device__ void forward(const T* x, const T* taps, const T* bias, const uint32_t* starts, T* y, int t_count, int c, int width,
                        long long batch_stride, long long row_stride, int positions, int silu) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= c) return;
    const size_t row = size_t(blockIdx.z) * t_count;
    const int first = blockIdx.y * positions, end = min(first + positions, t_count);
    Window<N, T> window(x + blockIdx.z * batch_stride, taps, bias, width, c, at);
    for (int t = first - (WIDTH - 1); t < first; t++) window.take(row_stride, t);
    for (int t = first; t < end; t++) {
        float out[N];
        window.take(row_stride, t);
        window.product(out, into_document(starts, row, t));
        if (silu)
#pragma unroll
            for (int i = 0; i < N; i++) out[i] *= sigmoid(out[i]);
        store(y + (row + t) * c, at, c, out);
    }
}

/// Gradients: `dx [B, T, C]` (or null), and in `dtaps [gridDim.z, gridDim.y, width + 1, C]` each block's part of that of taps and,
/// last, of the bias.
template <int N, class T>
__device__ void backward(const T* x, const T* taps, const T* bias, const uint32_t* starts, const T* dy, T* dx, float* dtaps,
                         int t_count, int c, int width, long long batch_stride, long long row_stride, int positions, int silu) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= c) return;
    const size_t row = size_t(blockIdx.z) * t_count;
    const int first = blockIdx.y * positions, end = min(first + positions, t_count);
    Window<N, T> window(x + blockIdx.z * batch_stride, taps, bias, width, c, at);
    // `back_to[w]` is what has gathered of the gradient of the input that stands in `window.inputs[w]`.
    float back_to[WIDTH][N], sums[WIDTH][N], bias_sum[N], d[N], out[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        bias_sum[i] = 0.f;
#pragma unroll
        for (int w = 0; w < WIDTH; w++) back_to[w][i] = sums[w][i] = 0.f;
    }
    for (int t = first - (WIDTH - 1); t < first; t++) window.take(row_stride, t);
    // Outputs up to a width behind the block still read from it.
    for (int t = first; t < end + WIDTH - 1; t++) {
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int w = 0; w + 1 < WIDTH; w++) back_to[w][i] = back_to[w + 1][i];
            back_to[WIDTH - 1][i] = 0.f;
        }
        if (t < t_count) {
            window.take(row_stride, t);
            const int into = into_document(starts, row, t);
            load(d, dy + (row + t) * c, at, c);
            if (silu) {
                window.product(out, into);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const float s = sigmoid(out[i]);
                    d[i] *= s * (1.f + out[i] * (1.f - s));
                }
            }
#pragma unroll
            for (int back = 0; back < WIDTH; back++)
                if (back <= into)
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        const int w = WIDTH - 1 - back;
                        back_to[w][i] += window.tap[w][i] * d[i];
                        if (t < end) sums[w][i] += window.inputs[w][i] * d[i];
                    }
            if (t < end)
#pragma unroll
                for (int i = 0; i < N; i++) bias_sum[i] += d[i];
        }
        const int done = t - (WIDTH - 1);
        if (dx && done >= first && done < end) store(dx + (row + done) * c, at, c, back_to[0]);
    }
    float* part = dtaps + (size_t(blockIdx.z) * gridDim.y + blockIdx.y) * (width + 1) * c;
#pragma unroll
    for (int w = 0; w < WIDTH; w++) {
        const int to = w - (WIDTH - width);
        if (to >= 0) store(part + size_t(to) * c, at, c, sums[w]);
    }
    store(part + size_t(width) * c, at, c, bias_sum);
}

} // namespace causal_conv

#define KERNELS(T, type)                                                                                                          \
    extern "C" __global__ void causal_conv_##type(const T* x, const T* taps, const T* bias, const uint32_t* starts, T* y,         \
                                                  int t_count, int c, int width, long long batch_stride, long long row_stride,    \
                                                  int positions, int silu) {                                                      \
        causal_conv::forward<2>(x, taps, bias, starts, y, t_count, c, width, batch_stride, row_stride, positions, silu);          \
    }                                                                                                                             \
    extern "C" __global__ void causal_conv_back_##type(const T* x, const T* taps, const T* bias, const uint32_t* starts,          \
                                                       const T* dy, T* dx, float* dtaps, int t_count, int c, int width,           \
                                                       long long batch_stride, long long row_stride, int positions, int silu) {   \
        causal_conv::backward<2>(x, taps, bias, starts, dy, dx, dtaps, t_count, c, width, batch_stride, row_stride, positions,    \
                                 silu);                                                                                           \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
