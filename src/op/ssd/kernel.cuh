// The state-space dual by chunks of 64 positions (Dao & Gu 2024, arXiv 2405.21060, section 6); the law stands in mod.rs.
//
// Forward: `states` sums what each chunk adds to the state, `pass` carries it from chunk to chunk, `outputs` takes products within
// a chunk and with the state that enters it. Backward: `states` and `pass` do the same for the adjoint, from the last chunk on,
// `back_reads` has the gradient of C, `back_x` that of x, `back_b` those of B and of the steps. The heads of a group are one block's in
// the last two, so that what they share has one writer and one order of sums.
//
// With `ℓ` the logarithm of a decay and `E(t, s) = exp(Σ ℓ over s+1..=t)`, 0 over a border of documents, position t of a chunk has
// `y = Σ_{s ≤ t} E(t, s) (C_t · B_s) Δ_s x_s + e_t S C_t + D x_t`, and the next state is `f S + Σ_s w_s Δ_s x_s ⊗ B_s`, where e_t is E
// from the chunk's beginning, w_s to its end, and f over all of it.
#pragma once
#include "../cuda/tile.cuh"

namespace ssd {
using namespace tile;

/// Positions of a chunk, and threads of a block: 16 positions a warp.
constexpr int CHUNK = 64, THREADS = 128;

template <class T> struct Problem {
    /// [B, T, G·P + G·N + H·N], rows contiguous.
    const T* xbc;
    /// [B, T, H], rows contiguous.
    const float* dt;
    /// [3, H]: A_log, dt_bias, D.
    const float* params;
    /// [B, T], or null.
    const uint32_t* starts;
    /// Entries from batch to batch and from row to row.
    long long xbc_batch, xbc_row, dt_batch, dt_row;
    int t, heads, groups, p, n;
    /// Whether heads of x, B, C and dy begin at multiples of 16 bytes and fill them.
    bool whole;

    __device__ int chunks() const { return (t + CHUNK - 1) / CHUNK; }
    __device__ int group(int h) const { return h / (heads / groups); }
    __device__ const T* x(int b, int h) const { return xbc + b * xbc_batch + group(h) * p; }
    __device__ const T* b_in(int b, int h) const { return xbc + b * xbc_batch + groups * p + group(h) * n; }
    __device__ const T* c_out(int b, int h) const { return xbc + b * xbc_batch + groups * (p + n) + h * n; }
    __device__ long long channels() const { return (long long)groups * (p + n) + heads * n; }
    /// Of states [B, chunks, H, P, N].
    __device__ long long state(int b, int chunk, int h) const {
        return (((long long)b * chunks() + chunk) * heads + h) * p * n;
    }
};

/// What a head's chunk makes of its steps, in shared memory.
struct Steps {
    float delta[CHUNK], slope[CHUNK];
    /// Σ ℓ / ln 2 from the chunk's beginning, as the sum of two: the difference of two such sums is as exact as itself, not as they.
    float high[CHUNK], low[CHUNK];
    /// Where the position's document begins, from the chunk's beginning; what comes before it is seen by none.
    int start[CHUNK];

    /// E(t, s)
    __device__ float decay(int t, int s) const {
        return s <= t && s >= start[t] ? exp2_fast((high[t] - high[s]) + (low[t] - low[s])) : 0.f;
    }
    /// e_t
    __device__ float entered(int t) const { return start[t] < 0 ? exp2_fast(high[t] + low[t]) : 0.f; }
    /// w_s, f: positions behind the sequence's end repeat the last.
    __device__ float leaving(int s) const { return decay(CHUNK - 1, s); }
    __device__ float through() const { return entered(CHUNK - 1); }
};

/// Filled by the block; there after a barrier.
template <class T> __device__ __forceinline__ void fill(Steps& steps, const Problem<T>& a, int b, int chunk, int h) {
    const int i = threadIdx.x, first = chunk * CHUNK;
    const float rate = -expf(a.params[h]);
    if (i < CHUNK) {
        const int at = first + i;
        float delta = 0.f, slope = 0.f;
        if (at < a.t) {
            const float raw = a.dt[b * a.dt_batch + at * a.dt_row + h] + a.params[a.heads + h];
            const float e = expf(-fabsf(raw));
            delta = fmaxf(raw, 0.f) + log1pf(e);
            slope = (raw > 0.f ? 1.f : e) / (1.f + e);
        }
        steps.delta[i] = delta, steps.slope[i] = slope;
        // Without documents nothing begins: a state may have been there before.
        const int last = min(at, a.t - 1);
        steps.start[i] = a.starts ? max((int)a.starts[(long long)b * a.t + last] - first, -1) : -1;
    }
    __syncthreads();
    if (i < 32) {
        const double scale = (double)rate * 1.4426950408889634;
        const double one = scale * steps.delta[2 * i], two = one + scale * steps.delta[2 * i + 1];
        double before = two;
        for (int distance = 1; distance < 32; distance *= 2) {
            const double other = __shfl_up_sync(~0u, before, distance);
            if (i >= distance) before += other;
        }
        const double sums[2] = {before - two + one, before};
        for (int k = 0; k < 2; k++) {
            steps.high[2 * i + k] = (float)sums[k];
            steps.low[2 * i + k] = (float)(sums[k] - (float)sums[k]);
        }
    }
}

/// Rows of 64 positions from `first` on, D wide.
template <class T, int D> __device__ __forceinline__ void fetch_rows(T* to, const T* from, int first, int t, long long row, int n, bool wholly) {
    fetch<T, CHUNK, D, THREADS>(to, from, first, t, row, n, wholly);
}

/// R rows and D columns from (row, column) on of a state [P, N] in f32.
template <class T, int R, int D>
__device__ __forceinline__ void load_state(T* to, const float* state, int row, int column, int p, int n) {
    for (int i = threadIdx.x; i < R * D; i += THREADS) {
        const int r = i / D, c = i % D;
        to[r * PITCH<T, D> + c] = T(row + r < p && column + c < n ? state[(long long)(row + r) * n + column + c] : 0.f);
    }
}

/// Two neighbours of a row, `columns` of which are there.
template <class T> __device__ __forceinline__ void write2(T* row, int column, int columns, float x, float y) {
    if (column + 1 < columns && aligned<2>(row + column)) put2(row + column, x, y);
    else {
        if (column < columns) row[column] = T(x);
        if (column + 1 < columns) row[column + 1] = T(y);
    }
}
template <class T> __device__ __forceinline__ float read(const T* row, int column, int columns) {
    return column < columns ? widen(row[column]) : 0.f;
}

/// Columns of a state that are worked on at a time.
template <int D> constexpr int PIECE = D < 64 ? D : 64;

template <class T, int D> struct Shared {
    static constexpr int ROWS = CHUNK * PITCH<T, D>;
    /// Also a piece of a state's columns.
    static constexpr int PIECES = ROWS > D * PITCH<T, PIECE<D>> ? ROWS : D * PITCH<T, PIECE<D>>;
    static constexpr int ROOM = THREADS / 32 * Products<T>::template ROOM<1, CHUNK / 8>;
    static constexpr int STATES = (int)sizeof(T) * 2 * ROWS;
    static constexpr int OUTPUTS = (int)sizeof(T) * (3 * ROWS + ROOM);
    static constexpr int BACK_READS = (int)sizeof(T) * (2 * ROWS + PIECES + ROOM);
    static constexpr int BACK_X = OUTPUTS;
    static constexpr int BACK_B = (int)sizeof(T) * (4 * ROWS + ROOM);
};

/// What a chunk adds to the state at its end, `Σ_s w_s Δ_s x_s ⊗ B_s`, or, back, to the adjoint at its beginning, `Σ_t e_t dy_t ⊗ C_t`
/// (dy [B, T, H·P]): sums [B, chunks, H, P, N]; through [B, chunks, H]: f. Grid: chunks, H, B.
template <bool BACK, class T, int D>
__device__ __forceinline__ void states(const Problem<T>& a, const T* dy, float* sums, float* through) {
    constexpr int P = PITCH<T, D>;
    T* left = dynamic_shared<T>();
    T* right = left + CHUNK * P;
    __shared__ Steps steps;
    const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, first = chunk * CHUNK;
    if (BACK) {
        const long long row = (long long)a.heads * a.p;
        fetch_rows<T, D>(left, dy + b * a.t * row + h * a.p, first, a.t, row, a.p, a.whole);
        fetch_rows<T, D>(right, a.c_out(b, h), first, a.t, a.xbc_row, a.n, a.whole);
    } else {
        fetch_rows<T, D>(left, a.x(b, h), first, a.t, a.xbc_row, a.p, a.whole);
        fetch_rows<T, D>(right, a.b_in(b, h), first, a.t, a.xbc_row, a.n, a.whole);
    }
    cp_async_commit();
    fill(steps, a, b, chunk, h);
    cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK * D; i += THREADS) {
        const int s = i / D;
        T& entry = right[s * P + i % D];
        entry = T((BACK ? steps.entered(s) : steps.leaving(s) * steps.delta[s]) * widen(entry));
    }
    __syncthreads();
    if (threadIdx.x == 0) through[((long long)b * a.chunks() + chunk) * a.heads + h] = steps.through();
    float* out = sums + a.state(b, chunk, h);
    for (int top = threadIdx.x / 32 * 16; top < D; top += THREADS / 2) {
        float c[1][D / 8][4];
        clear(c);
        Products<T>::template tn<CHUNK, P, P>(c, left + top, right);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = top + row_of(0, half);
            if (row >= a.p) continue;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                write2(out + (long long)row * a.n, column_of(n), a.n, c[0][n][2 * half], c[0][n][2 * half + 1]);
        }
    }
}

/// sums [B, chunks, H, E] → the states that enter the chunks, from `begin` [B, H, E] (null: zeros), and at the end `end`; or, back,
/// the adjoints that leave the chunks, from the last. A thread an entry. Grid: entries, H, B.
template <bool BACK>
__device__ __forceinline__ void pass(float* sums, const float* through, const float* begin, float* end, int chunks, int heads, int entries) {
    constexpr int AHEAD = 4;
    const int entry = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
    if (entry >= entries) return;
    const long long at = ((long long)b * heads + h) * entries + entry;
    float state = begin ? begin[at] : 0.f;
    for (int first = 0; first < chunks; first += AHEAD) {
        float added[AHEAD], kept[AHEAD];
        // Loads first: the stores might be to the same places, for all that the compiler knows.
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + i >= chunks) break;
            const long long head = ((long long)b * chunks + (BACK ? chunks - 1 - first - i : first + i)) * heads + h;
            added[i] = sums[head * entries + entry], kept[i] = through[head];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + i >= chunks) break;
            const long long head = ((long long)b * chunks + (BACK ? chunks - 1 - first - i : first + i)) * heads + h;
            sums[head * entries + entry] = state;
            state = fmaf(kept[i], state, added[i]);
        }
    }
    if (end) end[at] = state;
}

/// y [B, T, H·P] from the states that enter the chunks. Grid: chunks, H, B.
template <class T, int D> __device__ __forceinline__ void outputs(const Problem<T>& a, const float* entering, T* y) {
    constexpr int P = PITCH<T, D>, W = PIECE<D>;
    T* c_out = dynamic_shared<T>();
    T* x = c_out + CHUNK * P;
    T* b_in = x + CHUNK * P; // then pieces of the state
    __shared__ Steps steps;
    const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, first = chunk * CHUNK, warp = threadIdx.x / 32;
    T* room = b_in + CHUNK * P + warp * Products<T>::template ROOM<1, CHUNK / 8>;
    fetch_rows<T, D>(c_out, a.c_out(b, h), first, a.t, a.xbc_row, a.n, a.whole);
    fetch_rows<T, D>(x, a.x(b, h), first, a.t, a.xbc_row, a.p, a.whole);
    fetch_rows<T, D>(b_in, a.b_in(b, h), first, a.t, a.xbc_row, a.n, a.whole);
    cp_async_commit();
    fill(steps, a, b, chunk, h);
    cp_async_wait<0>();
    __syncthreads();

    float m[1][CHUNK / 8][4];
    clear(m);
    Products<T>::template nt<D, P, P>(m, c_out + warp * 16 * P, b_in);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = warp * 16 + row_of(0, i / 2), s = column_of(n) + i % 2;
            m[0][n][i] *= steps.decay(t, s) * steps.delta[s];
        }
    const float skip = a.params[2 * a.heads + h];
    for (int piece = 0; piece < a.p; piece += W) {
        __syncthreads();
        load_state<T, W, D>(b_in, entering + a.state(b, chunk, h), piece, 0, a.p, a.n);
        __syncthreads();
        float out[1][W / 8][4];
        clear(out);
        Products<T>::template nt<D, P, P>(out, c_out + warp * 16 * P, b_in);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float e = steps.entered(warp * 16 + row_of(0, i / 2));
#pragma unroll
            for (int n = 0; n < W / 8; n++) out[0][n][i] *= e;
        }
        Products<T>::template rn<P>(out, m, room, x + piece);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = warp * 16 + row_of(0, half);
            if (first + i >= a.t) continue;
            T* row = y + ((long long)b * a.t + first + i) * a.heads * a.p + h * a.p;
#pragma unroll
            for (int n = 0; n < W / 8; n++) {
                const int column = piece + column_of(n);
                const T* of = x + i * P + column;
                write2(row, column, a.p, fmaf(skip, widen(of[0]), out[0][n][2 * half]), fmaf(skip, widen(of[1]), out[0][n][2 * half + 1]));
            }
        }
    }
}

/// The part of C in dxbc [B, T, channels], `dC_t = Σ_{s ≤ t} E(t, s) Δ_s (dy_t · x_s) B_s + e_t Sᵀ dy_t`, from dy [B, T, H·P] and the states
/// that enter the chunks; reads [B, H, T] gets `e_t C_t · Sᵀ dy_t`. Grid: chunks, H, B.
template <class T, int D>
__device__ __forceinline__ void back_reads(const Problem<T>& a, const T* dy, const float* entering, T* dxbc, float* reads) {
    constexpr int P = PITCH<T, D>, W = PIECE<D>;
    T* d = dynamic_shared<T>();
    T* b_in = d + CHUNK * P;
    T* x = b_in + CHUNK * P; // then pieces of the state
    __shared__ Steps steps;
    const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, first = chunk * CHUNK, warp = threadIdx.x / 32;
    T* room = x + Shared<T, D>::PIECES + warp * Products<T>::template ROOM<1, CHUNK / 8>;
    const long long dy_row = (long long)a.heads * a.p;
    fetch_rows<T, D>(d, dy + b * a.t * dy_row + h * a.p, first, a.t, dy_row, a.p, a.whole);
    fetch_rows<T, D>(x, a.x(b, h), first, a.t, a.xbc_row, a.p, a.whole);
    fetch_rows<T, D>(b_in, a.b_in(b, h), first, a.t, a.xbc_row, a.n, a.whole);
    cp_async_commit();
    fill(steps, a, b, chunk, h);
    cp_async_wait<0>();
    __syncthreads();

    float m[1][CHUNK / 8][4];
    clear(m);
    Products<T>::template nt<D, P, P>(m, d + warp * 16 * P, x);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = warp * 16 + row_of(0, i / 2), s = column_of(n) + i % 2;
            m[0][n][i] *= steps.decay(t, s) * steps.delta[s];
        }
    float read_sum[2] = {0.f, 0.f};
    for (int piece = 0; piece < a.n; piece += W) {
        __syncthreads();
        load_state<T, D, W>(x, entering + a.state(b, chunk, h), 0, piece, a.p, a.n);
        __syncthreads();
        float out[1][W / 8][4];
        clear(out);
        Products<T>::template nn<D, P, PITCH<T, W>>(out, d + warp * 16 * P, x);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = warp * 16 + row_of(0, half);
            const float e = steps.entered(i);
            const T* c_row = a.c_out(b, h) + min(first + i, a.t - 1) * a.xbc_row;
#pragma unroll
            for (int n = 0; n < W / 8; n++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float& o = out[0][n][2 * half + k];
                    o *= e;
                    read_sum[half] = fmaf(o, read(c_row, piece + column_of(n) + k, a.n), read_sum[half]);
                }
        }
        Products<T>::template rn<P>(out, m, room, b_in + piece);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = first + warp * 16 + row_of(0, half);
            if (at >= a.t) continue;
            T* row = dxbc + ((long long)b * a.t + at) * a.channels() + a.groups * (a.p + a.n) + h * a.n;
#pragma unroll
            for (int n = 0; n < W / 8; n++) write2(row, piece + column_of(n), a.n, out[0][n][2 * half], out[0][n][2 * half + 1]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = row_sum(read_sum[half]);
        const int at = first + warp * 16 + row_of(0, half);
        if (threadIdx.x % 4 == 0 && at < a.t) reads[((long long)b * a.heads + h) * a.t + at] = sum;
    }
}

/// Of pairs `m` (rows s, 16 of the warp's from `top` on; columns t): for every i the sum over s < i ≤ t, into `sums [CHUNK]`. A
/// decay's own gradient: what passes over it. Sums of what belongs to it only, without differences.
__device__ __forceinline__ void passing(float (&m)[1][CHUNK / 8][4], int top, float* sums) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float right = 0.f; // of the tiles to the right
#pragma unroll
        for (int n = CHUNK / 8 - 1; n >= 0; n--) {
            const float even = m[0][n][2 * half], odd = m[0][n][2 * half + 1];
            // From this lane's pair on, within the tile.
            float from = even + odd;
            float other = __shfl_down_sync(~0u, from, 1, 4);
            if (lane % 4 < 3) from += other;
            other = __shfl_down_sync(~0u, from, 2, 4);
            if (lane % 4 < 2) from += other;
            other = __shfl_down_sync(~0u, from, 1, 4);
            const float behind = right + (lane % 4 < 3 ? other : 0.f);
            right += __shfl_sync(~0u, from, 0, 4);
            const int s = top + row_of(0, half), i = column_of(n);
            m[0][n][2 * half + 1] = s < i + 1 ? behind + odd : 0.f;
            m[0][n][2 * half] = s < i ? behind + odd + even : 0.f;
        }
    }
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float sum = column_sum(m[0][n][k] + m[0][n][2 + k]);
            if (lane < 4) sums[column_of(n) + k] = sum;
        }
}

/// The part of x in dxbc [B, T, channels], `dx_s = Σ_h Δ_s (Σ_{t ≥ s} E(t, s) (B_s · C_t) dy_t + w_s G B_s) + D dy_s`, from dy [B, T, H·P] and
/// the adjoints G that leave the chunks. Grid: chunks, G, B.
template <class T, int D> __device__ __forceinline__ void back_x(const Problem<T>& a, const T* dy, const float* leaving, T* dxbc) {
    constexpr int P = PITCH<T, D>, W = PIECE<D>;
    T* b_in = dynamic_shared<T>();
    T* d = b_in + CHUNK * P;
    T* c_out = d + CHUNK * P;
    T* adjoint = d; // over both, once they have been used
    __shared__ Steps steps;
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, first = chunk * CHUNK;
    const int warp = threadIdx.x / 32, top = warp * 16, rep = a.heads / a.groups;
    T* room = c_out + CHUNK * P + warp * Products<T>::template ROOM<1, CHUNK / 8>;
    fetch_rows<T, D>(b_in, a.b_in(b, g * rep), first, a.t, a.xbc_row, a.n, a.whole);
    cp_async_commit();

    float dx[1][D / 8][4];
    clear(dx);
    for (int h = g * rep; h < (g + 1) * rep; h++) {
        __syncthreads();
        const long long dy_row = (long long)a.heads * a.p;
        fetch_rows<T, D>(d, dy + b * a.t * dy_row + h * a.p, first, a.t, dy_row, a.p, a.whole);
        fetch_rows<T, D>(c_out, a.c_out(b, h), first, a.t, a.xbc_row, a.n, a.whole);
        cp_async_commit();
        fill(steps, a, b, chunk, h);
        cp_async_wait<0>();
        __syncthreads();

        // Rows s and columns t.
        float c[1][CHUNK / 8][4];
        clear(c);
        Products<T>::template nt<D, P, P>(c, b_in + top * P, c_out);
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int s = top + row_of(0, i / 2);
                c[0][n][i] *= steps.decay(column_of(n) + i % 2, s) * steps.delta[s];
            }
        Products<T>::template rn<P>(dx, c, room, d);
        const float skip = a.params[2 * a.heads + h];
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                dx[0][n][i] = fmaf(skip, widen(d[(top + row_of(0, i / 2)) * P + column_of(n) + i % 2]), dx[0][n][i]);

        __syncthreads();
        load_state<T, D, D>(adjoint, leaving + a.state(b, chunk, h), 0, 0, a.p, a.n);
        __syncthreads();
#pragma unroll
        for (int piece = 0; piece < D; piece += W) {
            float out[1][W / 8][4];
            clear(out);
            Products<T>::template nt<D, P, P>(out, b_in + top * P, adjoint + piece * P);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int s = top + row_of(0, i / 2);
                const float gain = steps.leaving(s) * steps.delta[s];
#pragma unroll
                for (int n = 0; n < W / 8; n++) {
                    float& to = dx[0][piece / 8 + n][i];
                    to = fmaf(gain, out[0][n][i], to);
                }
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = first + top + row_of(0, half);
        if (at >= a.t) continue;
        T* row = dxbc + ((long long)b * a.t + at) * a.channels() + g * a.p;
#pragma unroll
        for (int n = 0; n < D / 8; n++) write2(row, column_of(n), a.p, dx[0][n][2 * half], dx[0][n][2 * half + 1]);
    }
}

/// The part of B in dxbc [B, T, channels], `dB_s = Σ_h Δ_s (Σ_{t ≥ s} E(t, s) (dy_t · x_s) C_t + w_s Gᵀ x_s)`, ddt [B, T, H] and parts of
/// dparams [B·chunks, 3·H], from dy [B, T, H·P], the states that enter and the adjoints G that leave the chunks, and the reads of
/// `back_reads`. Grid: chunks, G, B.
template <class T, int D>
__device__ __forceinline__ void back_b(const Problem<T>& a, const T* dy, const float* entering, const float* leaving, const float* reads,
                                       T* dxbc, float* ddt, float* dparams) {
    constexpr int P = PITCH<T, D>, W = PIECE<D>;
    T* x = dynamic_shared<T>();
    T* b_in = x + CHUNK * P;
    T* d = b_in + CHUNK * P;
    T* c_out = d + CHUNK * P;
    T* adjoint = d; // over both, once they have been used
    __shared__ Steps steps;
    __shared__ float over[THREADS / 32][CHUNK]; // pairs that pass over a position, of each warp
    __shared__ float direct[CHUNK], written[CHUNK], read[CHUNK], parts[3][THREADS / 32];
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, first = chunk * CHUNK;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, top = warp * 16, rep = a.heads / a.groups;
    T* room = c_out + CHUNK * P + warp * Products<T>::template ROOM<1, CHUNK / 8>;
    fetch_rows<T, D>(x, a.x(b, g * rep), first, a.t, a.xbc_row, a.p, a.whole);
    fetch_rows<T, D>(b_in, a.b_in(b, g * rep), first, a.t, a.xbc_row, a.n, a.whole);
    cp_async_commit();

    float db[1][D / 8][4];
    clear(db);
    for (int h = g * rep; h < (g + 1) * rep; h++) {
        __syncthreads();
        const long long dy_row = (long long)a.heads * a.p;
        fetch_rows<T, D>(d, dy + b * a.t * dy_row + h * a.p, first, a.t, dy_row, a.p, a.whole);
        fetch_rows<T, D>(c_out, a.c_out(b, h), first, a.t, a.xbc_row, a.n, a.whole);
        cp_async_commit();
        fill(steps, a, b, chunk, h);
        if (threadIdx.x < CHUNK) {
            const int at = first + threadIdx.x;
            read[threadIdx.x] = at < a.t ? reads[((long long)b * a.heads + h) * a.t + at] : 0.f;
        }
        cp_async_wait<0>();
        __syncthreads();

        // Rows s and columns t.
        float c[1][CHUNK / 8][4], m[1][CHUNK / 8][4];
        clear(c);
        clear(m);
        Products<T>::template nt<D, P, P>(c, b_in + top * P, c_out);
        Products<T>::template nt<D, P, P>(m, x + top * P, d);
        float own[2] = {0.f, 0.f}, diagonal = 0.f;
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int s = top + row_of(0, i / 2), t = column_of(n) + i % 2;
                if (s == t) diagonal += m[0][n][i];
                m[0][n][i] *= steps.decay(t, s);
                c[0][n][i] *= m[0][n][i];
                own[i / 2] += c[0][n][i];
                c[0][n][i] *= steps.delta[s], m[0][n][i] *= steps.delta[s];
            }
        Products<T>::template rn<P>(db, m, room, c_out);
        passing(c, top, over[warp]);
        for (int distance = 16; distance; distance /= 2) diagonal += __shfl_xor_sync(~0u, diagonal, distance);
        if (lane == 0) parts[2][warp] = diagonal;

        // What leaves with the state.
        __syncthreads();
        float both = 0.f;
        const float* after = leaving + a.state(b, chunk, h);
        const float* before = entering + a.state(b, chunk, h);
        for (int i = threadIdx.x; i < D * D; i += THREADS) {
            const int r = i / D, k = i % D;
            const bool there = r < a.p && k < a.n;
            const float entry = there ? after[(long long)r * a.n + k] : 0.f;
            adjoint[r * P + k] = T(entry);
            if (there) both = fmaf(entry, before[(long long)r * a.n + k], both);
        }
        __syncthreads();
        float w[2], gain[2], given[2] = {0.f, 0.f};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int s = top + row_of(0, half);
            w[half] = steps.leaving(s), gain[half] = w[half] * steps.delta[s];
        }
#pragma unroll
        for (int piece = 0; piece < D; piece += W) {
            float out[1][W / 8][4];
            clear(out);
            Products<T>::template nn<D, P, P>(out, x + top * P, adjoint + piece);
#pragma unroll
            for (int n = 0; n < W / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = piece + column_of(n) + i % 2;
                    given[i / 2] = fmaf(out[0][n][i], widen(b_in[(top + row_of(0, i / 2)) * P + column]), given[i / 2]);
                    float& to = db[0][piece / 8 + n][i];
                    to = fmaf(gain[i / 2], out[0][n][i], to);
                }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int s = top + row_of(0, half);
            const float x_g_b = row_sum(given[half]), pairs = row_sum(own[half]);
            if (lane % 4 == 0) direct[s] = pairs + w[half] * x_g_b, written[s] = gain[half] * x_g_b;
        }
        for (int distance = 16; distance; distance /= 2) both += __shfl_xor_sync(~0u, both, distance);
        if (lane == 0) parts[0][warp] = both;
        __syncthreads();

        float of_rate = 0.f, of_bias = 0.f;
        if (threadIdx.x < CHUNK) {
            const int i = threadIdx.x;
            float dlog = steps.through() * (((parts[0][0] + parts[0][1]) + parts[0][2]) + parts[0][3]);
            for (int k = 0; k < THREADS / 32; k++) dlog += over[k][i];
            for (int k = 0; k < CHUNK; k++) dlog += k < i ? written[k] : read[k];
            const float rate = -expf(a.params[h]), raw = fmaf(rate, dlog, direct[i]) * steps.slope[i];
            if (first + i < a.t) {
                ddt[((long long)b * a.t + first + i) * a.heads + h] = raw;
                of_rate = dlog * rate * steps.delta[i], of_bias = raw;
            }
        }
        __syncthreads(); // parts[0] has been read
        for (int distance = 16; distance; distance /= 2) {
            of_rate += __shfl_xor_sync(~0u, of_rate, distance);
            of_bias += __shfl_xor_sync(~0u, of_bias, distance);
        }
        if (lane == 0) parts[0][warp] = of_rate, parts[1][warp] = of_bias;
        __syncthreads();
        if (threadIdx.x < 3) {
            const float* part = parts[threadIdx.x];
            const long long at = ((long long)b * a.chunks() + chunk) * 3 + threadIdx.x;
            dparams[at * a.heads + h] = ((part[0] + part[1]) + part[2]) + part[3];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = first + top + row_of(0, half);
        if (at >= a.t) continue;
        T* row = dxbc + ((long long)b * a.t + at) * a.channels() + a.groups * a.p + g * a.n;
#pragma unroll
        for (int n = 0; n < D / 8; n++) write2(row, column_of(n), a.n, db[0][n][2 * half], db[0][n][2 * half + 1]);
    }
}

} // namespace ssd

// Up to D entries of x and of B and C, which are filled up with zeros.
#define OPERANDS(T)                                                                                                              \
    const T *xbc, const float *dt, const float *params, const uint32_t *starts, long long xbc_batch, long long xbc_row,          \
        long long dt_batch, long long dt_row, int t, int heads, int groups, int p, int n
#define PROBLEM(T, of_dy)                                                                                                        \
    const ssd::Problem<T> a = {xbc, dt, params, starts, xbc_batch, xbc_row, dt_batch, dt_row, t, heads, groups, p, n,            \
                               tile::whole(xbc, xbc_batch, xbc_row, p, n) && of_dy}
#define KERNELS(D, type, T)                                                                                                      \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_states_##D##_##type(OPERANDS(T), float* sums, float* through) {     \
        PROBLEM(T, true);                                                                                                        \
        ssd::states<false, T, D>(a, nullptr, sums, through);                                                                     \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_##D##_##type(OPERANDS(T), const float* entering, T* y) {            \
        PROBLEM(T, true);                                                                                                        \
        ssd::outputs<T, D>(a, entering, y);                                                                                      \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_back_states_##D##_##type(                                           \
        OPERANDS(T), const T* dy, float* sums, float* through) {                                                                 \
        PROBLEM(T, tile::whole(dy));                                                                                             \
        ssd::states<true, T, D>(a, dy, sums, through);                                                                           \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_back_reads_##D##_##type(                                            \
        OPERANDS(T), const T* dy, const float* entering, T* dxbc, float* reads) {                                                \
        PROBLEM(T, tile::whole(dy));                                                                                             \
        ssd::back_reads<T, D>(a, dy, entering, dxbc, reads);                                                                     \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_back_x_##D##_##type(                                                \
        OPERANDS(T), const T* dy, const float* leaving, T* dxbc) {                                                               \
        PROBLEM(T, tile::whole(dy));                                                                                             \
        ssd::back_x<T, D>(a, dy, leaving, dxbc);                                                                                 \
    }                                                                                                                            \
    extern "C" __launch_bounds__(128, 1) __global__ void ssd_back_b_##D##_##type(                                                \
        OPERANDS(T), const T* dy, const float* entering, const float* leaving, const float* reads, T* dxbc, float* ddt,          \
        float* dparams) {                                                                                                        \
        PROBLEM(T, tile::whole(dy));                                                                                             \
        ssd::back_b<T, D>(a, dy, entering, leaving, reads, dxbc, ddt, dparams);                                                  \
    }
KERNELS(32, f32, float)
KERNELS(64, f32, float)
KERNELS(128, f32, float)
KERNELS(32, bf16, bf16)
KERNELS(64, bf16, bf16)
KERNELS(128, bf16, bf16)
#undef KERNELS
#undef OPERANDS
#undef PROBLEM

extern "C" __global__ void ssd_pass(float* sums, const float* through, const float* begin, float* end, int chunks, int heads, int entries) {
    ssd::pass<false>(sums, through, begin, end, chunks, heads, entries);
}
extern "C" __global__ void ssd_back_pass(float* sums, const float* through, const float* begin, float* end, int chunks, int heads,
                                         int entries) {
    ssd::pass<true>(sums, through, begin, end, chunks, heads, entries);
}
