// Attention of new tokens over the pages of a cache, as it is decoded: of grouped heads over keys and values, and of all heads
// over the latents of MLA with its up-projections absorbed, where a value is the beginning of its key (DeepSeek-V2, arXiv 2405.04434).
// And the rows of these pages as they are written.
//
// Pages are those of `mixer/memory.rs`: 32 positions, plane after plane. Positions are split over blocks (Flash-Decoding, Dao et al.
// 2023) and within a block over its warps (as many as have shared memory), each of which takes a page at a time for 16·MT queries: the
// heads of a group, of as many neighbouring tokens of a sequence as there is room for; `combine` puts the parts together.
// What changes from step to step stands in device memory, so that launches can be recorded.
#pragma once
#include "../cuda/tile.cuh"

namespace paged_attention {
using namespace tile;

/// Warps of a block, at most.
constexpr int PAGE = 32, WARPS = 4;

/// 8 bits with a scale for every 32 entries of a row, before the codes.
struct int8 {};

/// What is computed with, of how pages are kept.
template <class KEPT> struct Computed {
    using T = KEPT;
};
template <> struct Computed<int8> {
    using T = f16;
};

struct Cache {
    const uint8_t* pages;
    /// Where the pages of every sequence begin, in units, [S, width].
    const uint32_t* table;
    /// The sequence, the first token and the number of tokens that a block has, [Z, 3].
    const uint32_t* tiles;
    /// Positions that a token sees, [N].
    const uint32_t* lengths;
    int width;
    /// Bytes: of a unit, of what stands before the layer in a page, of a row.
    long long unit;
    int layer_at, row_bytes;
    /// The plane of the first group's values; 0: a value is the beginning of its key, and there is one plane.
    int values;
};

/// `rows` rows of a plane into a warp's tile, zeros below.
template <class KEPT, class T, int D>
__device__ __forceinline__ void fetch_page(T* to, const uint8_t* plane, int rows, int dim, int row_bytes) {
    const int lane = threadIdx.x & 31;
    if constexpr (sizeof(KEPT) == sizeof(T)) {
        const T* from = (const T*)plane;
        fetch<T, PAGE, D, 32>(to, from, 0, rows, row_bytes / (int)sizeof(T), dim, whole(from, row_bytes / (int)sizeof(T), dim), lane);
    } else {
        // A lane a row: its scale and 32 codes at a time.
        const float* scales = (const float*)(plane + (long long)lane * row_bytes);
        const int8_t* codes = (const int8_t*)(scales + (dim + 31) / 32);
        for (int first = 0; first < D; first += 32) {
            const bool there = lane < rows && first < dim;
            const float scale = there ? scales[first / 32] : 0.f;
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                const bool some = there && first + i < dim;
                const uint32_t four = some ? *(const uint32_t*)(codes + first + i) : 0u;
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; k++) x[k] = first + i + k < dim ? scale * (float)(int8_t)(four >> 8 * k) : 0.f;
                T* at = to + lane * PITCH<T, D> + first + i;
                put2(at, x[0], x[1]), put2(at + 2, x[2], x[3]);
            }
        }
    }
}

template <class KEPT, int KD, int VD, int MT, bool LATENT> struct Shared {
    using T = typename Computed<KEPT>::T;
    static constexpr int STAGES = sizeof(T) == 4 ? 1 : 2;
    /// Entries of a page, and of what a warp has.
    static constexpr int PAGES = PAGE * (PITCH<T, KD> + (LATENT ? 0 : PITCH<T, VD>));
    static constexpr int OWN = STAGES * PAGES + Products<T>::template ROOM<MT, PAGE / 8>;
    /// Bytes: of the sums of the warps' parts; behind them of queries and pages, over which these parts are put together.
    static constexpr int STATS = (int)sizeof(float) * 2 * WARPS * 16 * MT, PARTS = (int)sizeof(float) * 16 * MT * VD;
    static constexpr int loaded(int warps) { return (int)sizeof(T) * (16 * MT * PITCH<T, KD> + warps * OWN); }
    static constexpr int all(int warps) { return STATS + (loaded(warps) > PARTS ? loaded(warps) : PARTS); }
};

/// Parts of the outputs of q [N, H, K]: out [N, H, splits, V], sums [N, H, splits, 2] their greatest score (to the base 2) and their sum
/// of exponentials. Grid: splits, groups times the tiles of 16·MT heads of a group, Z. A tile has several tokens only where all heads of
/// a group fit into it that often.
template <class KEPT, class Q, int KD, int VD, int MT, bool LATENT>
__device__ __forceinline__ void
split(const Cache& c, const Q* q_in, int heads, int groups, int k_dim, int v_dim, float scale, float* out_parts, float* sums) {
    using T = typename Computed<KEPT>::T;
    using S = Shared<KEPT, KD, VD, MT, LATENT>;
    constexpr int STAGES = S::STAGES, R = 16 * MT, PK = PITCH<T, KD>, PV = LATENT ? PK : PITCH<T, VD>, PAGE_K = PAGE * PK;
    char* shared = dynamic_shared<char>();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* stats = (float*)shared;
    T* q = (T*)(shared + S::STATS);
    T* pages = q + R * PK + warp * S::OWN;
    T* room = pages + STAGES * S::PAGES;

    const int rep = heads / groups, tiles = (rep + R - 1) / R;
    const int g = blockIdx.y / tiles, first = blockIdx.y % tiles * R, own = min(R, rep - first);
    const uint32_t* tile = c.tiles + 3 * blockIdx.z;
    const uint32_t* table = c.table + (long long)tile[0] * c.width;
    const int token = tile[1], count = own * (int)tile[2];
    // The head's place among all heads of all tokens.
    auto head_of = [&](int row) { return (long long)(token + row / own) * heads + g * rep + first + row % own; };
    for (int i = threadIdx.x; i < R * KD; i += blockDim.x) {
        const int row = i / KD, column = i % KD;
        const bool there = row < count && column < k_dim;
        q[row * PK + column] = T(there ? scale * 1.4426950408889634f * widen(q_in[head_of(row) * k_dim + column]) : 0.f);
    }
    __syncthreads();

    int sees[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_of(m, half);
            sees[m][half] = row < count ? (int)c.lengths[token + row / own] : 0;
        }
    // The last token sees furthest.
    const int length = c.lengths[token + tile[2] - 1], all = (length + PAGE - 1) / PAGE, each = (all + gridDim.x - 1) / gridDim.x;
    const int begin = blockIdx.x * each, end = min(begin + each, all);
    auto load = [&](int page, int stage) {
        if (page < end) {
            const uint8_t* at = c.pages + table[page] * c.unit + c.layer_at;
            const int rows = min(PAGE, length - page * PAGE);
            const long long plane = (long long)PAGE * c.row_bytes;
            T* to = pages + stage * S::PAGES;
            fetch_page<KEPT, T, KD>(to, at + (LATENT ? 0 : g * plane), rows, k_dim, c.row_bytes);
            // Rows of keys and of values are equally long.
            if (!LATENT) fetch_page<KEPT, T, VD>(to + PAGE_K, at + (c.values + g) * plane, rows, v_dim, c.row_bytes);
        }
        cp_async_commit();
    };
    float out[MT][VD / 8][4], largest[MT][2], sum[MT][2];
    clear(out);
#pragma unroll
    for (int m = 0; m < MT; m++) largest[m][0] = largest[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.f;
    if (STAGES == 2) load(begin + warp, 0);
    int stage = 0;
    for (int page = begin + warp; page < end; page += warps) {
        __syncwarp(); // the tile that is loaded next has been read
        if (STAGES == 2) load(page + warps, 1 - stage);
        else load(page, 0);
        cp_async_wait<STAGES - 1>();
        __syncwarp();
        T* k = pages + stage * S::PAGES;
        float w[MT][PAGE / 8][4];
        clear(w);
        Products<T>::template nt<KD, PK, PK>(w, q, k);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = -INFINITY;
#pragma unroll
                for (int i = 0; i < PAGE / 8; i++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        if (page * PAGE + column_of(i) + e % 2 >= sees[m][half]) w[m][i][e] = -INFINITY;
                        most = fmaxf(most, w[m][i][e]);
                    }
                const float now = fmaxf(largest[m][half], row_max(most));
                // A token may see nothing of the page that a later one does.
                const float base = now == -INFINITY ? 0.f : now, factor = exp2_fast(largest[m][half] - base);
                largest[m][half] = now;
                sum[m][half] *= factor;
#pragma unroll
                for (int i = 0; i < PAGE / 8; i++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) sum[m][half] += w[m][i][e] = exp2_fast(w[m][i][e] - base);
#pragma unroll
                for (int i = 0; i < VD / 8; i++) out[m][i][2 * half] *= factor, out[m][i][2 * half + 1] *= factor;
            }
        Products<T>::template rn<PV>(out, w, room, LATENT ? k : k + PAGE_K);
        if (STAGES == 2) stage = 1 - stage;
    }
    cp_async_wait<0>();

    // The warps' parts, one after the other.
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = row_sum(sum[m][half]);
            if (threadIdx.x % 4 == 0) {
                stats[2 * (warp * R + row_of(m, half))] = largest[m][half];
                stats[2 * (warp * R + row_of(m, half)) + 1] = total;
            }
        }
    __syncthreads();
    float* totals = (float*)(shared + S::STATS); // [R, VD]
    for (int turn = 0; turn < warps; turn++) {
        if (turn == warp)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = row_of(m, half);
                    float most = -INFINITY;
                    for (int i = 0; i < warps; i++) most = fmaxf(most, stats[2 * (i * R + row)]);
                    const float factor = largest[m][half] == -INFINITY ? 0.f : exp2_fast(largest[m][half] - most);
#pragma unroll
                    for (int i = 0; i < VD / 8; i++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float& to = totals[row * VD + column_of(i) + e];
                            to = fmaf(factor, out[m][i][2 * half + e], turn ? to : 0.f);
                        }
                }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < count * v_dim; i += blockDim.x) {
        const int row = i / v_dim, column = i % v_dim;
        out_parts[(head_of(row) * gridDim.x + blockIdx.x) * v_dim + column] = totals[row * VD + column];
    }
    if ((int)threadIdx.x < count) {
        float most = -INFINITY, total = 0.f;
        for (int i = 0; i < warps; i++) most = fmaxf(most, stats[2 * (i * R + threadIdx.x)]);
        for (int i = 0; i < warps; i++) {
            const float* of = stats + 2 * (i * R + threadIdx.x);
            if (of[0] != -INFINITY) total = fmaf(exp2_fast(of[0] - most), of[1], total);
        }
        float* to = sums + 2 * (head_of(threadIdx.x) * gridDim.x + blockIdx.x);
        to[0] = most, to[1] = total;
    }
}

/// y [N, H, V] of their parts. A block a row.
template <class T> __device__ void combine(const float* out_parts, const float* sums, T* y, int splits, int v_dim) {
    const long long row = blockIdx.x;
    sums += 2 * row * splits;
    float most = -INFINITY, total = 0.f;
    for (int i = 0; i < splits; i++) most = fmaxf(most, sums[2 * i]);
    for (int i = 0; i < splits; i++) total += sums[2 * i + 1] * exp2_fast(sums[2 * i] - most);
    for (int column = threadIdx.x; column < v_dim; column += blockDim.x) {
        float x = 0.f;
        for (int i = 0; i < splits; i++)
            x = fmaf(exp2_fast(sums[2 * i] - most), out_parts[(row * splits + i) * v_dim + column], x);
        narrow(x / total, y[row * v_dim + column]);
    }
}

/// A row of a plane, of a [N, planes, A] and behind it b [N, planes, B], as `mixer/memory.rs` writes it. A warp a row; grid: N, planes.
template <class KEPT>
__device__ void write(uint8_t* pages, const uint32_t* table, const uint32_t* owners, const uint32_t* lengths, const float* a,
                      const float* b, int width, long long unit, int layer_at, int row_bytes, int first_plane, int a_dim, int b_dim) {
    const int n = blockIdx.x, plane = blockIdx.y, planes = gridDim.y, lane = threadIdx.x, dim = a_dim + b_dim;
    const int position = (int)lengths[n] - 1;
    uint8_t* to = pages + table[(long long)owners[n] * width + position / PAGE] * unit + layer_at +
                  (long long)((first_plane + plane) * PAGE + position % PAGE) * row_bytes;
    const long long at = (long long)n * planes + plane;
    auto entry = [&](int i) { return i < a_dim ? a[at * a_dim + i] : b[at * b_dim + i - a_dim]; };
    if constexpr (sizeof(KEPT) > 1) {
        for (int i = lane; i < dim; i += 32) narrow(entry(i), ((KEPT*)to)[i]);
    } else {
        float* scales = (float*)to;
        int8_t* codes = (int8_t*)(scales + (dim + 31) / 32);
        for (int first = 0; first < dim; first += 32) {
            const float x = first + lane < dim ? entry(first + lane) : 0.f;
            float most = fabsf(x);
            for (int by = 16; by; by /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
            // What is no number must not end as one.
            const bool good = __all_sync(~0u, fabsf(x) < INFINITY);
            const float inverse = most > 0.f ? 127.f / most : 0.f;
            if (lane == 0) scales[first / 32] = good ? most / 127.f : NAN;
            if (first + lane < dim) codes[first + lane] = good ? (int8_t)rintf(x * inverse) : 0;
        }
    }
}

} // namespace paged_attention

// Up to KD entries of keys and VD of values, which are filled up with zeros.
#define KERNELS(name, size, type, KEPT, Q, KD, VD, MT, LATENT)                                                                   \
    extern "C" __launch_bounds__(128, 1) __global__ void name##_##size##_##type(                                                 \
        const uint8_t* pages, const uint32_t* table, const uint32_t* tiles, const uint32_t* lengths, const Q* q, float* out,     \
        float* sums, int width, long long unit, int layer_at, int row_bytes, int values, int heads, int groups, int k_dim,       \
        int v_dim, float scale) {                                                                                                \
        const paged_attention::Cache c = {pages, table, tiles, lengths, width, unit, layer_at, row_bytes, values};               \
        paged_attention::split<KEPT, Q, KD, VD, MT, LATENT>(c, q, heads, groups, k_dim, v_dim, scale, out, sums);                \
    }
#define KINDS(type, KEPT, Q)                                                                                                     \
    KERNELS(paged_attention, 64_64, type, KEPT, Q, 64, 64, 1, false)                                                             \
    KERNELS(paged_attention, 128_128, type, KEPT, Q, 128, 128, 1, false)                                                         \
    KERNELS(paged_latents, 160_128, type, KEPT, Q, 160, 128, 2, true)                                                            \
    KERNELS(paged_latents, 224_160, type, KEPT, Q, 224, 160, 2, true)
KINDS(f32_f32, float, float)
KINDS(f16_f32, f16, float)
KINDS(f16_bf16, f16, bf16)
KINDS(int8_f32, paged_attention::int8, float)
KINDS(int8_bf16, paged_attention::int8, bf16)
#undef KINDS
#undef KERNELS

#define KERNELS(type, T)                                                                                                         \
    extern "C" __global__ void paged_combine_##type(const float* out, const float* sums, T* y, int splits, int v_dim) {          \
        paged_attention::combine(out, sums, y, splits, v_dim);                                                                   \
    }
KERNELS(f32, float)
KERNELS(bf16, bf16)
#undef KERNELS

#define KERNELS(type, KEPT)                                                                                                      \
    extern "C" __global__ void paged_write_##type(uint8_t* pages, const uint32_t* table, const uint32_t* owners,                 \
                                                  const uint32_t* lengths, const float* a, const float* b, int width,            \
                                                  long long unit, int layer_at, int row_bytes, int first_plane, int a_dim,       \
                                                  int b_dim) {                                                                   \
        paged_attention::write<KEPT>(pages, table, owners, lengths, a, b, width, unit, layer_at, row_bytes, first_plane, a_dim,  \
                                     b_dim);                                                                                     \
    }
KERNELS(f32, float)
KERNELS(f16, f16)
KERNELS(int8, paged_attention::int8)
#undef KERNELS
