// Losses over rows of logits [M, V], a block a row: losses, and what their gradients need again, in f32, sums over a row at last in
// f64 (as cpu.rs).
#pragma once
#include "../cuda/device.cuh"

namespace loss {

/// A row's probabilities `exp(scale x − log_sum)`.
struct Softmax {
    float scale, log_sum;
    __device__ __forceinline__ float log_probability(float x) const { return scale * x - log_sum; }
};

/// Calls `each(at, entries)` for the packs of a row that are this thread's.
template <class T, class F> __device__ __forceinline__ void for_packs(const T* row, int v, F each) {
    for (int at = threadIdx.x * PACK<T>; at < v; at += blockDim.x * PACK<T>) {
        float x[PACK<T>];
        load(x, row, at, v);
        each(at, x);
    }
}

/// The same over two rows: `each(at, count, a, b)`.
template <class T, class F> __device__ __forceinline__ void for_pairs(const T* a_row, const T* b_row, int v, F each) {
    for (int at = threadIdx.x * PACK<T>; at < v; at += blockDim.x * PACK<T>) {
        float a[PACK<T>], b[PACK<T>];
        load(a, a_row, at, v);
        load(b, b_row, at, v);
        each(at, min(PACK<T>, v - at), a, b);
    }
}

template <class T> __device__ __forceinline__ float greatest(const T* row, int v) {
    float most[1] = {-INFINITY};
    for_packs(row, v, [&](int at, const float(&x)[PACK<T>]) {
        for (int i = 0; i < PACK<T>; i++)
            if (at + i < v) most[0] = fmaxf(most[0], x[i]);
    });
    block_max(most);
    return most[0];
}

template <class T> __device__ __forceinline__ Softmax softmax(const T* row, int v, float scale) {
    const float most = scale * greatest(row, v);
    float part = 0.f;
    for_packs(row, v, [&](int at, const float(&x)[PACK<T>]) {
        for (int i = 0; i < PACK<T>; i++)
            if (at + i < v) part += expf(scale * x[i] - most);
    });
    double sum[1] = {part};
    block_sum(sum);
    return {scale, most + float(log(sum[0]))};
}

/// `logits [M, V]`, `targets, loss, log_sums [M]`.
template <class T>
__device__ void cross_entropy(const T* logits, const uint32_t* targets, float* loss, float* log_sums, int v) {
    const T* row = logits + size_t(blockIdx.x) * v;
    const Softmax q = softmax(row, v, 1.f);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = q.log_sum - widen(row[targets[blockIdx.x]]);
        log_sums[blockIdx.x] = q.log_sum;
    }
}

/// `(softmax − onehot(target)) dloss`
template <class T>
__device__ void cross_entropy_back(const T* logits, const uint32_t* targets, const float* log_sums, const float* dloss, T* dlogits,
                                   int v) {
    const size_t base = size_t(blockIdx.x) * v;
    const int target = int(targets[blockIdx.x]);
    const float log_sum = log_sums[blockIdx.x], factor = dloss[blockIdx.x];
    for_packs(logits + base, v, [&](int at, float(&x)[PACK<T>]) {
        for (int i = 0; i < PACK<T>; i++) x[i] = (expf(x[i] - log_sum) - (at + i == target ? 1.f : 0.f)) * factor;
        store(dlogits + base, at, v, x);
    });
}

/// In the order of `Divergence`.
enum Kind { FORWARD_KL, REVERSE_KL, JSD, TVD };

/// `ln((1 + e^r) / 2)`
__device__ __forceinline__ float log_mean(float r) { return fmaxf(r, 0.f) + log1pf(expf(-fabsf(r))) - 0.69314718f; }

/// An entry's part of the divergence.
__device__ __forceinline__ float term(int kind, float p, float q, float log_ratio) {
    switch (kind) {
    case REVERSE_KL: return q * log_ratio;
    case JSD: return -0.5f * (p * log_mean(log_ratio) + q * log_mean(-log_ratio));
    default: return 0.5f * fabsf(p - q);
    }
}

/// By `q`, up to a constant that the softmax takes out.
__device__ __forceinline__ float slope(int kind, float p, float q, float log_ratio) {
    switch (kind) {
    case REVERSE_KL: return log_ratio;
    case JSD: return -0.5f * log_mean(-log_ratio);
    default: return q > p ? 0.5f : q < p ? -0.5f : 0.f;
    }
}

/// `teacher, student [M, V]`, `loss [M]`, `log_sums [M, 2]`; `scale = 1 / τ`.
template <class T>
__device__ void forward_kl(const T* teacher, const T* student, float* loss, float* log_sums, int v, float scale) {
    const size_t base = size_t(blockIdx.x) * v;
    teacher += base, student += base;
    const float most_t = scale * greatest(teacher, v), most_s = scale * greatest(student, v);
    // Σ p (ln p − ln q), each logit relative to its row's greatest: small numbers stay exact.
    float sum_t = 0.f, sum_s = 0.f, difference = 0.f;
    for_pairs(teacher, student, v, [&](int, int count, const float(&t)[PACK<T>], const float(&s)[PACK<T>]) {
        for (int i = 0; i < count; i++) {
            const float log_p = scale * t[i] - most_t, log_q = scale * s[i] - most_s, p = expf(log_p);
            sum_t += p;
            sum_s += expf(log_q);
            difference += p * (log_p - log_q);
        }
    });
    double sums[3] = {sum_t, sum_s, difference};
    block_sum(sums);
    if (threadIdx.x == 0) {
        const double log_t = log(sums[0]), log_s = log(sums[1]);
        loss[blockIdx.x] = float(sums[2] / sums[0] - log_t + log_s);
        log_sums[2 * blockIdx.x] = most_t + float(log_t);
        log_sums[2 * blockIdx.x + 1] = most_s + float(log_s);
    }
}

/// `(softmax(student / τ) − softmax(teacher / τ)) / τ dloss`
template <class T>
__device__ void forward_kl_back(const T* teacher, const T* student, const float* log_sums, const float* dloss, T* dstudent, int v,
                                float scale) {
    const size_t base = size_t(blockIdx.x) * v;
    const Softmax p = {scale, log_sums[2 * blockIdx.x]}, q = {scale, log_sums[2 * blockIdx.x + 1]};
    const float factor = dloss[blockIdx.x] * scale;
    for_pairs(teacher + base, student + base, v, [&](int at, int, const float(&t)[PACK<T>], float(&s)[PACK<T>]) {
        for (int i = 0; i < PACK<T>; i++) s[i] = (expf(q.log_probability(s[i])) - expf(p.log_probability(t[i]))) * factor;
        store(dstudent + base, at, v, s);
    });
}

/// The other divergences.
template <class T>
__device__ void divergence(const T* teacher, const T* student, float* loss, float* log_sums, int v, float scale, int kind) {
    const size_t base = size_t(blockIdx.x) * v;
    teacher += base, student += base;
    const Softmax p = softmax(teacher, v, scale), q = softmax(student, v, scale);
    float part = 0.f;
    for_pairs(teacher, student, v, [&](int, int count, const float(&t)[PACK<T>], const float(&s)[PACK<T>]) {
        for (int i = 0; i < count; i++) {
            const float log_p = p.log_probability(t[i]), log_q = q.log_probability(s[i]);
            part += term(kind, expf(log_p), expf(log_q), log_q - log_p);
        }
    });
    double sum[1] = {part};
    block_sum(sum);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = float(sum[0]);
        log_sums[2 * blockIdx.x] = p.log_sum;
        log_sums[2 * blockIdx.x + 1] = q.log_sum;
    }
}

/// `q (f − Σ q f) / τ dloss` with `f = ∂D/∂q`.
template <class T>
__device__ void divergence_back(const T* teacher, const T* student, const float* log_sums, const float* dloss, T* dstudent, int v,
                                float scale, int kind) {
    const size_t base = size_t(blockIdx.x) * v;
    teacher += base, student += base;
    const Softmax p = {scale, log_sums[2 * blockIdx.x]}, q = {scale, log_sums[2 * blockIdx.x + 1]};
    double sums[2] = {0., 0.}; // Σ q f, Σ q
    for_pairs(teacher, student, v, [&](int, int count, const float(&t)[PACK<T>], const float(&s)[PACK<T>]) {
        for (int i = 0; i < count; i++) {
            const float log_p = p.log_probability(t[i]), log_q = q.log_probability(s[i]), chance = expf(log_q);
            sums[0] += double(chance) * double(slope(kind, expf(log_p), chance, log_q - log_p));
            sums[1] += chance;
        }
    });
    block_sum(sums);
    // Where the mean is all but one slope, what is left is as exact as the probabilities.
    const double mean = sums[0] / sums[1];
    const float factor = dloss[blockIdx.x] * scale;
    for_pairs(teacher, student, v, [&](int at, int, const float(&t)[PACK<T>], float(&s)[PACK<T>]) {
        for (int i = 0; i < PACK<T>; i++) {
            const float log_p = p.log_probability(t[i]), log_q = q.log_probability(s[i]), chance = expf(log_q);
            s[i] = chance * float(double(slope(kind, expf(log_p), chance, log_q - log_p)) - mean) * factor;
        }
        store(dstudent + base, at, v, s);
    });
}

} // namespace loss

#define KERNELS(T, type)                                                                                                          \
    extern "C" __global__ void cross_entropy_##type(const T* logits, const uint32_t* targets, float* loss, float* log_sums,      \
                                                    int v) {                                                                      \
        loss::cross_entropy(logits, targets, loss, log_sums, v);                                                                  \
    }                                                                                                                             \
    extern "C" __global__ void cross_entropy_back_##type(const T* logits, const uint32_t* targets, const float* log_sums,        \
                                                         const float* dloss, T* dlogits, int v) {                                 \
        loss::cross_entropy_back(logits, targets, log_sums, dloss, dlogits, v);                                                   \
    }                                                                                                                             \
    extern "C" __global__ void divergence_##type(const T* teacher, const T* student, float* loss, float* log_sums, int v,        \
                                                 float scale, int kind) {                                                         \
        if (kind == loss::FORWARD_KL) loss::forward_kl(teacher, student, loss, log_sums, v, scale);                               \
        else loss::divergence(teacher, student, loss, log_sums, v, scale, kind);                                                  \
    }                                                                                                                             \
    extern "C" __global__ void divergence_back_##type(const T* teacher, const T* student, const float* log_sums,                  \
                                                      const float* dloss, T* dstudent, int v, float scale, int kind) {            \
        if (kind == loss::FORWARD_KL) loss::forward_kl_back(teacher, student, log_sums, dloss, dstudent, v, scale);               \
        else loss::divergence_back(teacher, student, log_sums, dloss, dstudent, v, scale, kind);                                  \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
#undef KERNELS
