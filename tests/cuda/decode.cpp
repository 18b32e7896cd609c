// What decodes, against loops in f64: attention over pages, latents over pages, steps of Mamba2, of sequences with one new token and
// with several.
#include "../../src/op/mamba2_step/kernel.cuh"
#include "../../src/op/paged_attention/kernel.cuh"
#include "check.h"

using paged_attention::int8;

/// A row as `mixer/memory.rs` writes it; `read` gets what it then is.
template <class KEPT> int row_bytes(int dim);
template <> int row_bytes<float>(int dim) { return 4 * dim; }
template <> int row_bytes<f16>(int dim) { return (2 * dim + 3) / 4 * 4; }
template <> int row_bytes<int8>(int dim) { return 4 * ((dim + 31) / 32) + (dim + 3) / 4 * 4; }
template <class KEPT> void write(uint8_t* to, const float* row, double* read, int dim) {
    if constexpr (std::is_same_v<KEPT, int8>) {
        for (int first = 0; first < dim; first += 32) {
            float most = 0, scale;
            for (int i = first; i < std::min(first + 32, dim); i++) most = fmaxf(most, fabsf(row[i]));
            scale = most / 127;
            memcpy(to + first / 8, &scale, 4);
            for (int i = first; i < std::min(first + 32, dim); i++) {
                const int8_t code = (int8_t)rintf(row[i] * (127 / most));
                to[4 * ((dim + 31) / 32) + i] = (uint8_t)code;
                read[i] = (double)scale * code;
            }
        }
    } else {
        for (int i = 0; i < dim; i++) {
            KEPT x = KEPT(row[i]);
            memcpy(to + i * sizeof(KEPT), &x, sizeof(KEPT));
            read[i] = widen(x);
        }
    }
}

template <class KEPT, class Q, int KD, int VD, int MT, bool LATENT>
void attention(const char* kind, std::vector<int> lengths, int heads, int groups, int k, int v, int splits, int fresh = 1) {
    // Every sequence has up to `fresh` new tokens, the last of which sees all of it.
    const int S = lengths.size(), planes = LATENT ? 1 : 2 * groups, dim = k, row = row_bytes<KEPT>(dim), before = 48;
    if (!LATENT) v = k;
    const int width = (*std::max_element(lengths.begin(), lengths.end()) + 31) / 32 + 1;
    const int unit = 16, page_units = (before + planes * 32 * row + 31) / 16, together = std::max(1, 16 * MT * groups / heads);
    std::vector<uint8_t> pages(size_t(S) * width * page_units * unit, 0xff); // NaNs where nothing has been written
    std::vector<uint32_t> table(S * width, 0), seen, owners, tiles;
    for (int s = 0; s < S; s++) {
        const int count = std::min(fresh, lengths[s]), first = seen.size();
        for (int t = 0; t < count; t++) seen.push_back(lengths[s] - count + t + 1), owners.push_back(s);
        for (int t = 0; t < count; t += together)
            for (int x : {s, first + t, std::min(together, count - t)}) tiles.push_back(x);
    }
    const int N = seen.size();
    std::vector<double> kept(size_t(S) * width * 32 * planes * dim);
    const auto entries = random<float>(kept.size(), 1);
    const auto q = random<Q>(size_t(N) * heads * k, 2, 3.f);
    for (int n = 0; n < S; n++)
        for (int p = 0; p < lengths[n]; p++) {
            const uint32_t page = table[n * width + p / 32] = (p / 32 * S + n) * 9973 % (S * width) * page_units;
            for (int plane = 0; plane < planes; plane++) {
                const size_t at = ((size_t(n) * width * 32 + p) * planes + plane) * dim;
                write<KEPT>(&pages[size_t(page) * unit + before + (plane * 32 + p % 32) * row], &entries[at], &kept[at], dim);
            }
        }
    // The same pages, as the kernel writes them: a row's beginning from one array, its end from another.
    {
        std::vector<uint8_t> written(pages.size(), 0xff);
        std::vector<uint32_t> whose, until;
        std::vector<float> a, b;
        const int b_dim = dim / 3;
        for (int s = 0; s < S; s++)
            for (int p = 0; p < lengths[s]; p++) {
                whose.push_back(s), until.push_back(p + 1);
                for (int plane = 0; plane < planes; plane++) {
                    const float* row = &entries[((size_t(s) * width * 32 + p) * planes + plane) * dim];
                    a.insert(a.end(), row, row + dim - b_dim), b.insert(b.end(), row + dim - b_dim, row + dim);
                }
            }
        emu::launch(dim3(whose.size(), planes), 32, 0, [&] {
            paged_attention::write<KEPT>(written.data(), table.data(), whose.data(), until.data(), a.data(), b.data(), width, unit, before, row, 0,
                                         dim - b_dim, b_dim);
        });
        if (written != pages) check("rows of pages as the kernel writes them", {{kind, 1, 0}});
    }
    const paged_attention::Cache c = {pages.data(), table.data(), tiles.data(), seen.data(), width, unit, before, row, LATENT ? 0 : groups};
    const float scale = 1 / sqrtf(k);
    const int across = (heads / groups + 16 * MT - 1) / (16 * MT);
    std::vector<float> parts(size_t(N) * heads * splits * v, NAN), sums(size_t(N) * heads * splits * 2, NAN);
    std::vector<Q> y(size_t(N) * heads * v, Q(NAN));
    const int warps = splits % 2 ? 4 : 2, shared = paged_attention::Shared<KEPT, KD, VD, MT, LATENT>::all(warps);
    emu::launch(dim3(splits, groups * across, tiles.size() / 3), 32 * warps, shared, [&] {
        paged_attention::split<KEPT, Q, KD, VD, MT, LATENT>(c, q.data(), heads, groups, k, v, scale, parts.data(), sums.data());
    });
    emu::launch(dim3(N * heads), 64, 0, [&] { paged_attention::combine(parts.data(), sums.data(), y.data(), splits, v); });
    std::vector<double> y_(y.size());
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++) {
            const int g = h / (heads / groups);
            std::vector<double> w(seen[n]);
            double total = 0;
            auto entry = [&](int p, int plane, int i) { return kept[((size_t(owners[n]) * width * 32 + p) * planes + plane) * dim + i]; };
            for (int p = 0; p < (int)seen[n]; p++) {
                double score = 0;
                for (int i = 0; i < k; i++) score += widen(q[(size_t(n) * heads + h) * k + i]) * entry(p, g, i);
                total += w[p] = exp(scale * score);
            }
            for (int p = 0; p < (int)seen[n]; p++)
                for (int i = 0; i < v; i++) y_[(size_t(n) * heads + h) * v + i] += w[p] / total * entry(p, LATENT ? 0 : groups + g, i);
        }
    char name[200];
    snprintf(name, sizeof name, "%s %s %s: %d new tokens, heads %d/%d, k %d, v %d, %d splits, %d warps", LATENT ? "latents" : "pages", kind, type<Q>(), N,
             heads, groups, k, v, splits, warps);
    check(name, {{"y", gap(y, y_), std::is_same_v<KEPT, float> ? 1e-6 : sizeof(Q) == 4 ? 1.5e-3 : 5e-3}});
}

/// Sequence s has s + 1 new tokens in every step where `several`, else one.
template <class T> void mamba2(int S, int H, int G, int kv, int P, int N, int W, int steps, bool several = false) {
    const int C = G * (P + N) + H * N, projected = kv * (P + N) + H * N, PT = (P + 15) / 16, NT = (N + 15) / 16, kept = PT * NT * 256;
    const long long unit = 16, before = 8, units = (4 * (before + (W - 1) * C + (long long)H * kept + 4) + unit - 1) / unit, entries = units * unit / 4;
    const auto taps = random<float>(W * C, 1), bias = random<float>(C, 2), params = random<float>(3 * H, 3), norm = random<float>(H * P, 4);
    std::vector<float> states((S + 1) * entries, 0.f);
    std::vector<uint32_t> slots, ends = {0}, owners;
    for (int s = 0; s < S; s++) {
        slots.push_back((S - s) * units);
        ends.push_back(ends.back() + (several ? s + 1 : 1));
        for (uint32_t t = ends[s]; t < ends[s + 1]; t++) owners.push_back(s);
    }
    const int R = owners.size();
    std::vector<std::vector<double>> inputs(S, std::vector<double>((W - 1) * C)), state(S, std::vector<double>(H * P * N));
    double worst = 0;
    std::vector<T> y(R * H * P);
    std::vector<double> y_(y.size());
    for (int step = 0; step < steps; step++) {
        const auto z = random<T>(R * H * P, 10 + step), xbc = random<T>(R * projected, 100 + step), dt = random<T>(R * H, 1000 + step);
        mamba2_step::Problem<T> a = {z.data(),    xbc.data(),  dt.data(), taps.data(), bias.data(), params.data(), norm.data(), (uint8_t*)states.data(),
                                     slots.data(), ends.data(), unit,      4 * before,  H,           G,             kv,          P,
                                     N,            W,           1e-5f};
        const int rep = H / G, warps = std::min(rep, 16);
        emu::launch(dim3(G, S), 32 * warps, 4 * (P + N + rep * N + warps * (128 + P)), [&] { mamba2_step::step(a, y.data()); });
        for (int r = 0; r < R; r++) {
            const int s = owners[r];
            std::vector<double> mixed(C);
            for (int c = 0; c < C; c++) {
                int at = c;
                if (c < G * P) at = c / P / (G / kv) * P + c % P;
                else if (c < G * (P + N)) at = kv * P + (c - G * P) / N / (G / kv) * N + (c - G * P) % N;
                else at = kv * (P + N) + c - G * (P + N);
                const double now = widen(xbc[r * projected + at]);
                double sum = bias[c] + taps[(W - 1) * C + c] * now;
                for (int w = 0; w + 1 < W; w++) sum += taps[w * C + c] * inputs[s][w * C + c];
                for (int w = 0; w + 1 < W; w++) inputs[s][w * C + c] = w + 2 < W ? inputs[s][(w + 1) * C + c] : now;
                mixed[c] = sum / (1 + exp(-sum));
            }
            for (int h = 0; h < H; h++) {
                const int g = h / (H / G);
                const double delta = log1p(exp((double)widen(dt[r * H + h]) + params[H + h])), decay = exp(-exp((double)params[h]) * delta);
                double squares = 0;
                for (int p = 0; p < P; p++) {
                    double sum = params[2 * H + h] * mixed[g * P + p];
                    for (int n = 0; n < N; n++) {
                        double& v = state[s][(h * P + p) * N + n];
                        v = decay * v + delta * mixed[g * P + p] * mixed[G * P + g * N + n];
                        sum += v * mixed[G * (P + N) + h * N + n];
                    }
                    const double gate = widen(z[(r * H + h) * P + p]);
                    squares += pow(y_[(r * H + h) * P + p] = sum * gate / (1 + exp(-gate)), 2);
                }
                for (int p = 0; p < P; p++) y_[(r * H + h) * P + p] *= norm[h * P + p] / sqrt(squares / P + 1e-5);
            }
        }
        worst = fmax(worst, gap(y, y_));
    }
    double off = 0;
    for (int s = 0; s < S; s++)
        for (int h = 0; h < H; h++)
            for (int n = 0; n < N; n++)
                for (int p = 0; p < P; p++) {
                    const long long at = slots[s] / units * entries + before + (W - 1) * C + (long long)h * kept + (n / 16 * PT + p / 16) * 256 + n % 16 * 16 + p % 16;
                    off = fmax(off, fabs(states[at] - state[s][(h * P + p) * N + n]));
                }
    char name[200];
    snprintf(name, sizeof name, "mamba2 %s: %d sequences, heads %d/%d (%d projected), p %d, n %d, %d taps, %d steps", type<T>(), S, H, G, kv, P, N, W, steps);
    check(name, {{"y", worst, sizeof(T) == 4 ? 2e-6 : 4e-3}, {"state", off, 2e-6}});
}

template <class KEPT, class Q> void all(const char* kind) {
    attention<KEPT, Q, 64, 64, 1, false>(kind, {1, 70, 200}, 8, 2, 64, 64, 3);
    attention<KEPT, Q, 64, 64, 1, false>(kind, {33, 5}, 20, 1, 20, 20, 2);
    attention<KEPT, Q, 64, 64, 1, false>(kind, {300}, 2, 2, 6, 6, 1);
    attention<KEPT, Q, 128, 128, 1, false>(kind, {100}, 4, 2, 128, 128, 2);
    attention<KEPT, Q, 160, 128, 2, true>(kind, {1, 400, 37}, 32, 1, 160, 128, 3);
    attention<KEPT, Q, 160, 128, 2, true>(kind, {65}, 9, 1, 24, 16, 2);
    attention<KEPT, Q, 160, 128, 2, true>(kind, {80}, 40, 1, 70, 65, 1);
    attention<KEPT, Q, 224, 160, 2, true>(kind, {130}, 16, 1, 224, 160, 2);
    attention<KEPT, Q, 64, 64, 1, false>(kind, {67, 3, 33, 130}, 8, 2, 64, 64, 3, 7);
    attention<KEPT, Q, 64, 64, 1, false>(kind, {40}, 3, 1, 20, 20, 2, 40);
    attention<KEPT, Q, 160, 128, 2, true>(kind, {70, 34}, 12, 1, 24, 16, 2, 9);
}

int main() {
    all<float, float>("f32");
    all<f16, float>("f16");
    all<f16, bf16>("f16");
    all<int8, float>("int8");
    mamba2<float>(3, 4, 2, 2, 16, 16, 4, 6);
    mamba2<float>(2, 4, 4, 2, 5, 20, 4, 5);
    mamba2<float>(1, 2, 1, 1, 70, 33, 2, 3);
    mamba2<float>(1, 1, 1, 1, 150, 3, 1, 3);
    mamba2<float>(2, 8, 2, 2, 64, 64, 4, 3);
    mamba2<float>(3, 4, 2, 1, 16, 20, 4, 3, true);
    mamba2<bf16>(2, 8, 2, 2, 40, 64, 4, 3);
    return finish();
}
