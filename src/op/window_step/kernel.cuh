// The next tokens of every sequence of a batch in attention over a window: each is written in the place of the one that has left it, and
// sees what then stands there (`mixer/window/decode.rs` has the same on the CPU). A sequence's tokens go one after the other, as each
// overwrites what the one before has seen. The ring stands in the state: keys [G, slots, K], then values.
#pragma once
#include "../cuda/device.cuh"

namespace window_step {

struct Ring {
    uint8_t* states;
    const uint32_t* slots;    // [S]: where a sequence's state begins, in units
    const uint32_t* ends;     // [S + 1]: a sequence's tokens are those from its entry to the next
    const uint32_t* lengths;  // [N]: positions up to a token
    long long unit, layer_at; // in bytes
    int size, sinks;
};

/// q, y [N, H, K], k, v [N, G, K]. Grid: G, S. Shared memory: a score for every place of the ring.
__device__ __forceinline__ void step(const Ring& ring, const float* q, const float* k, const float* v, float* y, int heads, int dim, float scale) {
    float* weights = dynamic_shared<float>();
    const int g = blockIdx.x, groups = gridDim.x, s = blockIdx.y, rep = heads / groups, places = ring.size + ring.sinks;
    float* keys = (float*)(ring.states + ring.slots[s] * ring.unit + ring.layer_at) + (long long)g * places * dim;
    float* values = keys + (long long)groups * places * dim;
    for (int token = ring.ends[s]; token < (int)ring.ends[s + 1]; token++) {
        const int position = (int)ring.lengths[token] - 1;
        const int place = position < ring.sinks ? position : ring.sinks + (position - ring.sinks) % ring.size;
        __syncthreads(); // what the last token saw has been read
        for (int i = threadIdx.x; i < dim; i += blockDim.x) {
            keys[(long long)place * dim + i] = k[((long long)token * groups + g) * dim + i];
            values[(long long)place * dim + i] = v[((long long)token * groups + g) * dim + i];
        }
        __syncthreads();
        // The ring is filled from its beginning on.
        const int seen = min(position + 1, places);
        for (int head = g * rep; head < (g + 1) * rep; head++) {
            const float* query = q + ((long long)token * heads + head) * dim;
            float most[1] = {-INFINITY}, total[1] = {0.f};
            for (int j = threadIdx.x; j < seen; j += blockDim.x) {
                float score = 0.f;
                for (int i = 0; i < dim; i++) score = fmaf(query[i], keys[(long long)j * dim + i], score);
                weights[j] = scale * score;
                most[0] = fmaxf(most[0], weights[j]);
            }
            block_max(most);
            for (int j = threadIdx.x; j < seen; j += blockDim.x) total[0] += weights[j] = expf(weights[j] - most[0]);
            block_sum(total); // behind it all weights are there
            for (int i = threadIdx.x; i < dim; i += blockDim.x) {
                float sum = 0.f;
                for (int j = 0; j < seen; j++) sum = fmaf(weights[j], values[(long long)j * dim + i], sum);
                y[((long long)token * heads + head) * dim + i] = sum / total[0];
            }
            __syncthreads(); // the next head's weights take their place
        }
    }
}

} // namespace window_step

extern "C" __global__ void window_step_f32(uint8_t* states, const uint32_t* slots, const uint32_t* ends, const uint32_t* lengths, const float* q,
                                       const float* k, const float* v, float* y, long long unit, long long layer_at, int size, int sinks,
                                       int heads, int dim, float scale) {
    const window_step::Ring ring = {states, slots, ends, lengths, unit, layer_at, size, sinks};
    window_step::step(ring, q, k, v, y, heads, dim, scale);
}
