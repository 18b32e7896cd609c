// Causal grouped-query attention, tile by tile, forward and backward (FlashAttention-2, arXiv 2307.08691). The law is
// that of `mod.rs`: query `t` stands at key `S − T + t`; a document's keys, the nearest ones and the first ones (sinks).
//
// A block has four warps. In `forward` and `dq` its rows are queries and it passes over keys, in
// `dkv` its rows are keys and it passes over the queries of all heads that share them. So every gradient has one
// writer and sums have one order: no atomics. Scores and their gradients stay in registers, from product to product.
#pragma once
#include "../cuda/tile.cuh"

namespace attention {
using namespace tile;

struct Problem {
    const void* q; // [B, T, H, K]
    const void* k; // [B, S, G, K]
    const void* v; // [B, S, G, V]
    /// Entries from batch to batch, position to position, head to head.
    long long k_strides[3], v_strides[3];
    /// [B, T], not falling along a row; or null: all from 0.
    const uint32_t* starts;
    int t, s, heads, groups, k_dim, v_dim;
    /// Nearest keys; 0: all.
    int window, sinks;
    /// Positive.
    float scale;
    /// Whether rows of K entries, and of V, begin at multiples of 16 bytes and fill them.
    bool whole_k, whole_v;
};

/// Threads of a block.
constexpr int THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;

/// What a query sees: keys `start..far` and `near..=at`.
struct Bounds {
    int start, far, near, at;

    __device__ bool sees(int key) const { return key <= at && (key >= near || (key >= start && key < far)); }
};

__device__ __forceinline__ Bounds bounds(const Problem& a, int b, int t) {
    Bounds is;
    is.start = a.starts ? (int)a.starts[(long long)b * a.t + t] : 0;
    is.at = a.s - a.t + t;
    is.near = a.window ? max(is.start, is.at + 1 - a.window) : is.start;
    is.far = a.window ? min(is.start + a.sinks, is.near) : is.start;
    return is;
}

/// `D` columns of the warp's 16·MT rows, times `factor(m, half)`, to `to`, of which `rows` rows and `columns` columns are there;
/// by way of the warp's rows of a tile in shared memory.
template <class T, int P, int MT, int NT, class F>
__device__ __forceinline__ void
store(const float (&c)[MT][NT][4], T* tile, T* to, int rows, long long stride, int columns, bool wholly, F factor) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float f = factor(m, half);
#pragma unroll
            for (int n = 0; n < NT; n++)
                put2(tile + row_of(m, half) * P + column_of(n), f * c[m][n][2 * half], f * c[m][n][2 * half + 1]);
        }
    __syncwarp();
    constexpr int E = 16 / sizeof(T), UNITS = 8 * NT / E;
    const int lane = threadIdx.x & 31;
    if (wholly) {
        for (int i = lane; i < 16 * MT * UNITS; i += 32) {
            int row = i / UNITS, column = i % UNITS * E;
            if (row < rows && column < columns) *(uint4*)(to + row * stride + column) = *(const uint4*)(tile + row * P + column);
        }
    } else {
        for (int i = lane; i < 16 * MT * 8 * NT; i += 32) {
            int row = i / (8 * NT), column = i % (8 * NT);
            if (row < rows && column < columns) to[row * stride + column] = tile[row * P + column];
        }
    }
}

/// Entries of shared memory of a kernel: its own rows, those that it passes over, room for products.
template <class T, int KD, int VD, int MT, int N, int STAGES> struct Shared {
    static constexpr int K = PITCH<T, KD>, V = PITCH<T, VD>, R = 64 * MT;
    static constexpr int ROOM = THREADS / 32 * Products<T>::template ROOM<MT, N / 8>;
    static constexpr int FORWARD = (int)sizeof(T) * (R * K + STAGES * N * (K + V) + ROOM);
    static constexpr int DQ = FORWARD + (int)sizeof(T) * R * V + (int)sizeof(float) * 2 * R;
    static constexpr int DKV = FORWARD + (int)sizeof(T) * R * V + (int)sizeof(float) * 2 * STAGES * N;
};

/// Keys over which a tile of queries `first..=last` of a row passes, N at a time.
struct Keys {
    int from, to;
    /// What lies between is seen by none of them.
    int far, near;
    /// Seen by all of them.
    int common_from, common_to;

    __device__ Keys(const Problem& a, int b, int first, int last) {
        Bounds earliest = bounds(a, b, first), latest = bounds(a, b, last);
        to = latest.at + 1;
        far = latest.far, near = earliest.near;
        common_from = latest.near, common_to = earliest.at + 1;
        from = skip(earliest.start);
    }
    __device__ int skip(int key) const { return key >= far && key < near ? near : key; }
};

/// y [B, T, H, V]; sums [B, H, T] gets the logarithms of the sums of exponentials. Grid: tiles of 64·MT queries, H, B.
template <class T, int KD, int VD, int MT, int N, int STAGES>
__device__ __forceinline__ void forward(const Problem& a, T* y, float* sums) {
    constexpr int R = 64 * MT, PK = PITCH<T, KD>, PV = PITCH<T, VD>;
    static_assert(KD >= VD, "outputs pass through the tile of queries");
    char* shared = dynamic_shared<char>();
    T* q = (T*)shared;
    T* k = q + R * PK;
    T* v = k + STAGES * N * PK;
    const int warp = threadIdx.x / 32;
    T* room = v + STAGES * N * PV + warp * Products<T>::template ROOM<MT, N / 8>;

    // The longest first.
    const int first = (gridDim.x - 1 - blockIdx.x) * R, h = blockIdx.y, b = blockIdx.z, g = h / (a.heads / a.groups);
    const int count = min(R, a.t - first);
    const Keys keys(a, b, first, first + count - 1);
    const T* k_rows = (const T*)a.k + b * a.k_strides[0] + g * a.k_strides[2];
    const T* v_rows = (const T*)a.v + b * a.v_strides[0] + g * a.v_strides[2];
    auto load = [&](int from, int stage) {
        fetch<T, N, KD, THREADS>(k + stage * N * PK, k_rows, from, a.s, a.k_strides[1], a.k_dim, a.whole_k);
        fetch<T, N, VD, THREADS>(v + stage * N * PV, v_rows, from, a.s, a.v_strides[1], a.v_dim, a.whole_v);
        cp_async_commit();
    };
    const T* q_rows = (const T*)a.q + ((long long)b * a.t * a.heads + h) * a.k_dim;
    fetch<T, R, KD, THREADS>(q, q_rows, first, a.t, (long long)a.heads * a.k_dim, a.k_dim, a.whole_k);
    if (STAGES == 2) load(keys.from, 0);

    float out[MT][VD / 8][4], largest[MT][2], sum[MT][2];
    clear(out);
#pragma unroll
    for (int m = 0; m < MT; m++) largest[m][0] = largest[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.f;
    const float scale = a.scale * LOG2_E;
    int stage = 0;
    for (int key = keys.from, next; key < keys.to; key = next) {
        next = keys.skip(key + N);
        if (STAGES == 1) {
            __syncthreads();
            load(key, 0);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && next < keys.to) load(next, 1 - stage);

        float c[MT][N / 8][4];
        clear(c);
        Products<T>::template nt<KD, PK, PK>(c, q + warp * 16 * MT * PK, k + stage * N * PK);
        const bool common = key >= keys.common_from && key + N <= keys.common_to;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (!common) {
                    Bounds is = bounds(a, b, min(first + warp * 16 * MT + row_of(m, half), a.t - 1));
#pragma unroll
                    for (int n = 0; n < N / 8; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (!is.sees(key + column_of(n) + i)) c[m][n][2 * half + i] = -INFINITY;
                }
                float most = -INFINITY;
#pragma unroll
                for (int n = 0; n < N / 8; n++) most = fmaxf(most, fmaxf(c[m][n][2 * half], c[m][n][2 * half + 1]));
                const float now = fmaxf(largest[m][half], scale * row_max(most));
                // A row that has seen nothing so far.
                const float base = now == -INFINITY ? 0.f : now;
                const float factor = exp2_fast(largest[m][half] - base);
                largest[m][half] = now;
                sum[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        c[m][n][i] = exp2_fast(fmaf(c[m][n][i], scale, -base));
                        sum[m][half] += c[m][n][i];
                    }
#pragma unroll
                for (int n = 0; n < VD / 8; n++) out[m][n][2 * half] *= factor, out[m][n][2 * half + 1] *= factor;
            }
        Products<T>::template rn<PV>(out, c, room, v + stage * N * PV);
        if (STAGES == 2) stage = 1 - stage;
    }

    const int top = first + warp * 16 * MT;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[m][half] = row_sum(sum[m][half]);
            const int t = top + row_of(m, half);
            if (threadIdx.x % 4 == 0 && t < a.t)
                sums[((long long)b * a.heads + h) * a.t + t] = largest[m][half] / LOG2_E + logf(sum[m][half]);
        }
    T* to = y + (((long long)b * a.t + top) * a.heads + h) * a.v_dim;
    store<T, PK>(out, q + warp * 16 * MT * PK, to, a.t - top, (long long)a.heads * a.v_dim, a.v_dim, a.whole_v,
                 [&](int m, int half) { return 1.f / sum[m][half]; });
}

/// along [B, H, T] ← Σ y · dy; both [B, T, H, V]. A warp a row, in order of along; four to a block.
template <class T> __device__ __forceinline__ void along(const T* y, const T* dy, float* along, int t, int heads, int v, int rows) {
    const int at = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (at >= rows) return;
    const int h = at / t % heads;
    const long long row = (((long long)(at / t / heads) * t + at % t) * heads + h) * v;
    float sum = 0.f;
    for (int i = lane; i < v; i += 32) sum = fmaf(widen(y[row + i]), widen(dy[row + i]), sum);
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) along[at] = sum;
}

/// dq [B, T, H, K] from dy [B, T, H, V], sums and along [B, H, T]. Grid: tiles of 64·MT queries, H, B.
template <class T, int KD, int VD, int MT, int N, int STAGES>
__device__ __forceinline__ void dq(const Problem& a, const T* dy, const float* sums, const float* along, T* dq) {
    constexpr int R = 64 * MT, PK = PITCH<T, KD>, PV = PITCH<T, VD>;
    char* shared = dynamic_shared<char>();
    T* q = (T*)shared;
    T* d = q + R * PK;
    T* k = d + R * PV;
    T* v = k + STAGES * N * PK;
    const int warp = threadIdx.x / 32;
    T* room = (T*)((float*)(v + STAGES * N * PV) + 2 * R) + warp * Products<T>::template ROOM<MT, N / 8>;

    const int first = (gridDim.x - 1 - blockIdx.x) * R, h = blockIdx.y, b = blockIdx.z, g = h / (a.heads / a.groups);
    const int count = min(R, a.t - first), top = first + warp * 16 * MT;
    const Keys keys(a, b, first, first + count - 1);
    const T* k_rows = (const T*)a.k + b * a.k_strides[0] + g * a.k_strides[2];
    const T* v_rows = (const T*)a.v + b * a.v_strides[0] + g * a.v_strides[2];
    auto load = [&](int from, int stage) {
        fetch<T, N, KD, THREADS>(k + stage * N * PK, k_rows, from, a.s, a.k_strides[1], a.k_dim, a.whole_k);
        fetch<T, N, VD, THREADS>(v + stage * N * PV, v_rows, from, a.s, a.v_strides[1], a.v_dim, a.whole_v);
        cp_async_commit();
    };
    const long long row = (long long)b * a.t * a.heads + h;
    fetch<T, R, KD, THREADS>(q, (const T*)a.q + row * a.k_dim, first, a.t, (long long)a.heads * a.k_dim, a.k_dim, a.whole_k);
    fetch<T, R, VD, THREADS>(d, dy + row * a.v_dim, first, a.t, (long long)a.heads * a.v_dim, a.v_dim, a.whole_v);
    if (STAGES == 2) load(keys.from, 0);

    // In shared memory, to leave the registers to the products.
    float* sum = (float*)(v + STAGES * N * PV);
    float* inner = sum + R;
    if (threadIdx.x < R) {
        const long long at = ((long long)b * a.heads + h) * a.t + min(first + (int)threadIdx.x, a.t - 1);
        sum[threadIdx.x] = sums[at] * LOG2_E;
        inner[threadIdx.x] = along[at];
    }
    sum += warp * 16 * MT, inner += warp * 16 * MT;
    float out[MT][KD / 8][4];
    clear(out);
    const float scale = a.scale * LOG2_E;
    int stage = 0;
    for (int key = keys.from, next; key < keys.to; key = next) {
        next = keys.skip(key + N);
        if (STAGES == 1) {
            __syncthreads();
            load(key, 0);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && next < keys.to) load(next, 1 - stage);

        float p[MT][N / 8][4], dp[MT][N / 8][4];
        clear(p);
        Products<T>::template nt<KD, PK, PK>(p, q + warp * 16 * MT * PK, k + stage * N * PK);
        const bool common = key >= keys.common_from && key + N <= keys.common_to;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float base = sum[row_of(m, half)];
                Bounds is;
                if (!common) is = bounds(a, b, min(top + row_of(m, half), a.t - 1));
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        p[m][n][i] = exp2_fast(fmaf(p[m][n][i], scale, -base));
                        if (!common && !is.sees(key + column_of(n) + i % 2)) p[m][n][i] = 0.f;
                    }
            }
        clear(dp);
        Products<T>::template nt<VD, PV, PV>(dp, d + warp * 16 * MT * PV, v + stage * N * PV);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float base = inner[row_of(m, i / 2)];
#pragma unroll
                for (int n = 0; n < N / 8; n++) dp[m][n][i] = p[m][n][i] * (dp[m][n][i] - base);
            }
        Products<T>::template rn<PK>(out, dp, room, k + stage * N * PK);
        if (STAGES == 2) stage = 1 - stage;
    }
    T* to = dq + (((long long)b * a.t + top) * a.heads + h) * a.k_dim;
    store<T, PK>(out, q + warp * 16 * MT * PK, to, a.t - top, (long long)a.heads * a.k_dim, a.k_dim, a.whole_k,
                 [&](int, int) { return a.scale; });
}

/// Queries over which a tile of keys `first..first + R` passes, N at a time, head after head of those that share the keys.
template <int R, int N> struct Queries {
    const Problem& a;
    int b, first, h, last_h, t;

    __device__ Queries(const Problem& a, int b, int g, int first)
        : a(a), b(b), first(first), h(g * (a.heads / a.groups)), last_h((g + 1) * (a.heads / a.groups)), t(begin()) {
        settle();
    }
    /// The first query that comes after the first key.
    __device__ int begin() const { return max(0, first - (a.s - a.t)) / N * N; }
    __device__ bool some() const { return h < last_h; }
    __device__ void next() {
        t += N;
        settle();
    }
    /// On to a tile of queries of which one may see one of the keys.
    __device__ void settle() {
        for (;; t += N) {
            if (t < a.t && !ended()) {
                if (!unseen()) return;
                continue;
            }
            if (++h == last_h) return;
            t = begin() - N;
        }
    }
    __device__ bool ended() const { return a.starts && (int)a.starts[(long long)b * a.t + t] >= first + R; }
    __device__ bool unseen() const {
        if (!a.window) return false;
        return bounds(a, b, t).near >= first + R && bounds(a, b, min(t + N, a.t) - 1).far <= first;
    }
    /// Whether every query sees every key.
    __device__ bool common() const {
        return t + N <= a.t && first + R - 1 <= bounds(a, b, t).at && first >= bounds(a, b, t + N - 1).near;
    }
};

/// dk [B, S, G, K] and dv [B, S, G, V] from dy [B, T, H, V], sums and along [B, H, T]. Grid: tiles of 64 keys, G, B.
template <class T, int KD, int VD, int N, int STAGES>
__device__ __forceinline__ void
dkv(const Problem& a, const T* dy, const float* sums, const float* along, T* dk, T* dv) {
    constexpr int R = 64, PK = PITCH<T, KD>, PV = PITCH<T, VD>;
    char* shared = dynamic_shared<char>();
    T* k = (T*)shared;
    T* v = k + R * PK;
    T* q = v + R * PV;
    T* d = q + STAGES * N * PK;
    float* columns = (float*)(d + STAGES * N * PV); // sums and along of every stage
    const int warp = threadIdx.x / 32;
    T* room = (T*)(columns + 2 * STAGES * N) + warp * Products<T>::template ROOM<1, N / 8>;

    const int first = blockIdx.x * R, g = blockIdx.y, b = blockIdx.z, top = first + 16 * warp;
    Queries<R, N> queries(a, b, g, first);
    auto load = [&](const Queries<R, N>& from, int stage) {
        const long long row = (long long)b * a.t * a.heads + from.h, at = ((long long)b * a.heads + from.h) * a.t;
        const long long q_stride = (long long)a.heads * a.k_dim, d_stride = (long long)a.heads * a.v_dim;
        fetch<T, N, KD, THREADS>(q + stage * N * PK, (const T*)a.q + row * a.k_dim, from.t, a.t, q_stride, a.k_dim, a.whole_k);
        fetch<T, N, VD, THREADS>(d + stage * N * PV, dy + row * a.v_dim, from.t, a.t, d_stride, a.v_dim, a.whole_v);
        if (threadIdx.x < 2 * N) {
            const int i = threadIdx.x % N, t = from.t + i;
            const float* of = threadIdx.x < N ? sums : along;
            cp_async_4(columns + 2 * stage * N + threadIdx.x, of + at + min(t, a.t - 1));
        }
        cp_async_commit();
    };
    const T* k_rows = (const T*)a.k + b * a.k_strides[0] + g * a.k_strides[2];
    const T* v_rows = (const T*)a.v + b * a.v_strides[0] + g * a.v_strides[2];
    fetch<T, R, KD, THREADS>(k, k_rows, first, a.s, a.k_strides[1], a.k_dim, a.whole_k);
    fetch<T, R, VD, THREADS>(v, v_rows, first, a.s, a.v_strides[1], a.v_dim, a.whole_v);
    if (STAGES == 2 && queries.some()) load(queries, 0);

    float out_k[1][KD / 8][4], out_v[1][VD / 8][4];
    clear(out_k);
    clear(out_v);
    const float scale = a.scale * LOG2_E;
    int stage = 0;
    while (queries.some()) {
        Queries<R, N> now = queries;
        queries.next();
        if (STAGES == 1) {
            __syncthreads();
            load(now, 0);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && queries.some()) load(queries, 1 - stage);

        // Transposed: a column is a query.
        float p[1][N / 8][4], dp[1][N / 8][4];
        clear(p);
        Products<T>::template nt<KD, PK, PK>(p, k + warp * 16 * PK, q + stage * N * PK);
        const bool common = now.common();
        const float* sum = columns + 2 * stage * N;
        const float* inner = sum + N;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float base = sum[column_of(n) + i] * LOG2_E;
                const int t = now.t + column_of(n) + i;
                Bounds is;
                if (!common) is = bounds(a, b, min(t, a.t - 1));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float w = exp2_fast(fmaf(p[0][n][2 * half + i], scale, -base));
                    if (!common && (t >= a.t || !is.sees(top + row_of(0, half)))) w = 0.f;
                    p[0][n][2 * half + i] = w;
                }
            }
        Products<T>::template rn<PV>(out_v, p, room, d + stage * N * PV);
        clear(dp);
        Products<T>::template nt<VD, PV, PV>(dp, v + warp * 16 * PV, d + stage * N * PV);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) dp[0][n][i] = p[0][n][i] * (dp[0][n][i] - inner[column_of(n) + i % 2]);
        Products<T>::template rn<PK>(out_k, dp, room, q + stage * N * PK);
        if (STAGES == 2) stage = 1 - stage;
    }
    // Rows of k and v that were fetched but never waited for, where no query sees them.
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const long long row = ((long long)b * a.s + top) * a.groups + g;
    store<T, PK>(out_k, k + warp * 16 * PK, dk + row * a.k_dim, a.s - top, (long long)a.groups * a.k_dim, a.k_dim, a.whole_k,
                 [&](int, int) { return a.scale; });
    store<T, PV>(out_v, v + warp * 16 * PV, dv + row * a.v_dim, a.s - top, (long long)a.groups * a.v_dim, a.v_dim, a.whole_v,
                 [&](int, int) { return 1.f; });
}

} // namespace attention

#define OPERANDS(T)                                                                                                              \
    const T *q, const T *k, const T *v, const uint32_t *starts, long long k_batch, long long k_position, long long k_head,       \
        long long v_batch, long long v_position, long long v_head, int t, int s, int heads, int groups, int k_dim, int v_dim,    \
        int window, int sinks, float scale
#define PROBLEM(of_k, of_v)                                                                                                      \
    const attention::Problem a = {q, k, v, {k_batch, k_position, k_head}, {v_batch, v_position, v_head}, starts,                 \
                                  t, s, heads, groups, k_dim, v_dim, window, sinks, scale,                                       \
                                  tile::whole(q, k_dim) && tile::whole(k, k_batch, k_position, k_head) && of_k,                  \
                                  tile::whole(v, v_dim, v_batch, v_position, v_head) && of_v}

// Heads of keys and values up to KD and VD entries, which are filled up with zeros. Of `forward` and of `dq` 16 rows of a warp MT
// times, and the keys that they take at a time, of `dkv` the queries; cuda.rs has the same numbers.
#define KERNELS(size, type, T, KD, VD, MT, KEYS, DQ_MT, DQ_KEYS, QUERIES, STAGES)                                                \
    extern "C" __launch_bounds__(128, 1) __global__ void attention_##size##_##type(OPERANDS(T), T* y, float* sums) {             \
        PROBLEM(true, tile::whole(y));                                                                                           \
        attention::forward<T, KD, VD, MT, KEYS, STAGES>(a, y, sums);                                                             \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void attention_dq_##size##_##type(                                           \
        OPERANDS(T), const T* dy, const float* sums, const float* along, T* dq) {                                                \
        PROBLEM(tile::whole(dq), tile::whole(dy));                                                                               \
        attention::dq<T, KD, VD, DQ_MT, DQ_KEYS, STAGES>(a, dy, sums, along, dq);                                                \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void attention_dkv_##size##_##type(                                          \
        OPERANDS(T), const T* dy, const float* sums, const float* along, T* dk, T* dv) {                                         \
        PROBLEM(tile::whole(dk), tile::whole(dy) && tile::whole(dv));                                                            \
        attention::dkv<T, KD, VD, QUERIES, STAGES>(a, dy, sums, along, dk, dv);                                                  \
    }
KERNELS(32_32, f32, float, 32, 32, 1, 32, 1, 32, 32, 1)
KERNELS(64_64, f32, float, 64, 64, 1, 32, 1, 32, 32, 1)
KERNELS(128_128, f32, float, 128, 128, 1, 32, 1, 32, 32, 1)
KERNELS(192_128, f32, float, 192, 128, 1, 32, 1, 32, 32, 1)
KERNELS(32_32, bf16, bf16, 32, 32, 2, 64, 2, 64, 64, 2)
KERNELS(64_64, bf16, bf16, 64, 64, 2, 64, 2, 32, 64, 2)
KERNELS(128_128, bf16, bf16, 128, 128, 2, 32, 2, 32, 64, 2)
KERNELS(192_128, bf16, bf16, 192, 128, 2, 32, 1, 64, 32, 2)
#undef KERNELS
#undef OPERANDS
#undef PROBLEM

#define KERNELS(type, T)                                                                                                         \
    extern "C" __global__ void attention_along_##type(const T* y, const T* dy, float* along, int t, int heads, int v, int rows) { \
        attention::along(y, dy, along, t, heads, v, rows);                                                                       \
    }
KERNELS(f32, float)
KERNELS(bf16, bf16)
#undef KERNELS
