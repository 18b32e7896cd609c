// The next tokens of every sequence of a batch in Mamba2, between its projections: the convolution's last inputs move on, SiLU, the
// state moves on and is read, gate and norm (`mixer/mamba2/decode.rs` has the same on the CPU, `Mamba2Step` in mamba_ssm the like).
// A sequence's tokens go one after the other, in one launch.
//
// A block has the heads of a group, as they share x and B and so a part of the convolution's inputs, which is moved by whoever reads
// it; a warp has a head at a time. States stand as `mixer/memory.rs` keeps them: the inputs [W − 1, C], then every head's tiles of 16 × 16
// of [N, P], filled up with zeros. Which state is a sequence's stands in device memory, so that launches can be recorded.
#pragma once
#include "../cuda/device.cuh"

namespace mamba2_step {

template <class T> struct Problem {
    const T* z;                     // [N, H·P]
    const T* xbc;                   // [N, kv·P + kv·N + H·N]
    const T* dt;                    // [N, H]
    const float *taps, *bias;       // [W, C], the last of the present, and [C]; C = G·P + G·N + H·N
    const float *params, *norm;     // [3, H]: A_log, dt_bias, D; [H·P]
    uint8_t* states;
    const uint32_t* slots;          // [S]: where a sequence's state begins, in units
    const uint32_t* ends;           // [S + 1]: a sequence's tokens are those from its entry to the next
    long long unit, layer_at;       // in bytes: a unit, and what stands before the layer in a state
    /// G, and of x and B before they are repeated.
    int heads, groups, kv, p, n, width;
    float eps;
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

/// y [N, H·P]. Grid: G, S. Shared memory: the group's x, B and Cs after the convolution, and for every warp 4·32 + P entries.
template <class T> __device__ void step(const Problem<T>& a, T* y) {
    float* mixed = dynamic_shared<float>();
    const int g = blockIdx.x, s = blockIdx.y, rep = a.heads / a.groups, first = g * rep;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int own = a.p + a.n + rep * a.n, channels = a.groups * (a.p + a.n) + a.heads * a.n;
    float* inputs = (float*)(a.states + a.slots[s] * a.unit + a.layer_at);
    const int from = g / (a.groups / a.kv); // of the projected heads
    const int p_tiles = (a.p + 15) / 16, n_tiles = (a.n + 15) / 16, kept = p_tiles * n_tiles * 256;
    float* parts = mixed + own + warp * (4 * 32 + a.p);
    float* out = parts + 4 * 32;
    for (int token = a.ends[s]; token < (int)a.ends[s + 1]; token++) {
        const T* row = a.xbc + (long long)token * (a.kv * (a.p + a.n) + a.heads * a.n);
        __syncthreads(); // what the last token left has been read
        for (int i = threadIdx.x; i < own; i += blockDim.x) {
            // Of the group's x, its B, its heads' Cs: the channel, and where it was projected.
            int channel, at;
            if (i < a.p) channel = g * a.p + i, at = from * a.p + i;
            else if (i < a.p + a.n) channel = a.groups * a.p + g * a.n + i - a.p, at = a.kv * a.p + from * a.n + i - a.p;
            else {
                const int c = first * a.n + i - a.p - a.n;
                channel = a.groups * (a.p + a.n) + c, at = a.kv * (a.p + a.n) + c;
            }
            const float now = widen(row[at]);
            float sum = fmaf(a.taps[(a.width - 1) * channels + channel], now, a.bias[channel]);
            for (int w = 0; w + 1 < a.width; w++) {
                float* input = inputs + (long long)w * channels + channel;
                sum = fmaf(a.taps[w * channels + channel], *input, sum);
                *input = w + 2 < a.width ? input[channels] : now;
            }
            mixed[i] = sum * sigmoid(sum);
        }
        __syncthreads();

        const float *x = mixed, *b = mixed + a.p;
        for (int h = first + warp; h < first + rep; h += warps) {
            const float* c = mixed + a.p + a.n + (h - first) * a.n;
            const float raw = widen(a.dt[(long long)token * a.heads + h]) + a.params[a.heads + h];
            const float delta = fmaxf(raw, 0.f) + log1pf(expf(-fabsf(raw)));
            const float decay = expf(-expf(a.params[h]) * delta);
            float* state = inputs + (long long)(a.width - 1) * channels + (long long)h * kept;
            // Four neighbours of P a lane, over rows of N that are `rows` apart.
            const int quads = 4 * p_tiles, across = min(quads, 32), rows = 32 / across;
            for (int start = 0; start < quads; start += 32) {
                const int quad = start + lane % across, p = 4 * quad;
                const bool works = lane / across < rows && quad < quads;
                float u[4], sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int k = 0; k < 4; k++) u[k] = works && p + k < a.p ? delta * x[p + k] : 0.f;
                if (works)
#pragma unroll 8
                    for (int n = lane / across; n < a.n; n += rows) {
                        float* at = state + (n / 16 * p_tiles + quad / 4) * 256 + n % 16 * 16 + quad % 4 * 4;
                        float v[4];
                        load(v, at, 0, 4);
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            v[k] = fmaf(decay, v[k], u[k] * b[n]);
                            sum[k] = fmaf(v[k], c[n], sum[k]);
                        }
                        store(at, 0, 4, v);
                    }
                __syncwarp();
#pragma unroll
                for (int k = 0; k < 4; k++) parts[4 * lane + k] = sum[k];
                __syncwarp();
                if (lane < across && quad < quads)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (p + k < a.p) {
                            float total = a.params[2 * a.heads + h] * x[p + k];
                            for (int r = 0; r < rows; r++) total += parts[4 * (r * across + lane) + k];
                            out[p + k] = total;
                        }
            }
            __syncwarp();
            const long long base = ((long long)token * a.heads + h) * a.p;
            float squares = 0.f;
            for (int p = lane; p < a.p; p += 32) {
                const float gate = widen(a.z[base + p]), v = out[p] * gate * sigmoid(gate);
                out[p] = v;
                squares = fmaf(v, v, squares);
            }
            const float r = 1.f / sqrtf(warp_sum(squares) / a.p + a.eps);
            for (int p = lane; p < a.p; p += 32) narrow(out[p] * r * a.norm[h * a.p + p], y[base + p]);
            __syncwarp();
        }
    }
}

} // namespace mamba2_step

#define KERNELS(T, type)                                                                                                         \
    extern "C" __global__ void mamba2_step_##type(const T* z, const T* xbc, const T* dt, const float* taps, const float* bias,   \
                                                  const float* params, const float* norm, uint8_t* states,                       \
                                                  const uint32_t* slots, const uint32_t* ends, T* y, long long unit,             \
                                                  long long layer_at, int heads, int groups, int kv, int p, int n, int width,    \
                                                  float eps) {                                                                   \
        const mamba2_step::Problem<T> a = {z, xbc, dt, taps, bias, params, norm, states, slots, ends, unit, layer_at,            \
                                           heads, groups, kv, p, n, width, eps};                                                 \
        mamba2_step::step(a, y);                                                                                                 \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
