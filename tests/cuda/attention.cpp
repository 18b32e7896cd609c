// Attention forward and backward against loops in f64.
#include "../../src/op/attention/kernel.cuh"
#include "check.h"

struct Case {
    int b, t, s, heads, groups, k, v;
    int window = 0, sinks = 0;
    /// Where documents begin, in every row (moved by one in odd ones).
    std::vector<int> cuts = {};
    /// Keys and values side by side in rows with gaps, as a view has them.
    bool view = false;
};

template <class T, int KD, int VD, int FMT, int FN, int QMT, int QN, int KVN, int STAGES> void run(const Case& c) {
    const int B = c.b, TT = c.t, S = c.s, H = c.heads, G = c.groups, K = c.k, V = c.v, past = S - TT;
    const int width = c.view ? K + V + 3 : 0;
    std::vector<T> q = random<T>(size_t(B) * TT * H * K, 1), dy = random<T>(size_t(B) * TT * H * V, 4);
    std::vector<T> k = random<T>(size_t(B) * S * G * (c.view ? width : K), 2), v = random<T>(c.view ? 0 : size_t(B) * S * G * V, 3);
    std::vector<uint32_t> starts;
    if (!c.cuts.empty())
        for (int b = 0; b < B; b++)
            for (int t = 0; t < TT; t++) {
                uint32_t start = 0;
                for (int cut : c.cuts)
                    if (cut + b % 2 <= t) start = cut + b % 2;
                starts.push_back(start);
            }
    attention::Problem a = {};
    a.q = q.data(), a.k = k.data(), a.v = c.view ? k.data() + K + 1 : v.data();
    const long long of_k = c.view ? width : K, of_v = c.view ? width : V;
    a.k_strides[0] = S * G * of_k, a.k_strides[1] = G * of_k, a.k_strides[2] = of_k;
    a.v_strides[0] = S * G * of_v, a.v_strides[1] = G * of_v, a.v_strides[2] = of_v;
    a.starts = starts.empty() ? nullptr : starts.data();
    a.t = TT, a.s = S, a.heads = H, a.groups = G, a.k_dim = K, a.v_dim = V;
    a.window = c.window, a.sinks = c.sinks, a.scale = 1.3f / sqrtf(K);
    constexpr int E = 16 / sizeof(T);
    a.whole_k = !c.view && K % E == 0, a.whole_v = !c.view && V % E == 0;

    std::vector<T> y(size_t(B) * TT * H * V), dq(q.size()), dk(size_t(B) * S * G * K), dv(size_t(B) * S * G * V);
    std::vector<float> sums(size_t(B) * TT * H), along(sums.size());
    for (auto* x : {&y, &dq, &dk, &dv}) std::fill(x->begin(), x->end(), T(NAN));
    emu::launch(dim3((TT + 64 * FMT - 1) / (64 * FMT), H, B), 128, attention::Shared<T, KD, VD, FMT, FN, STAGES>::FORWARD,
                [&] { attention::forward<T, KD, VD, FMT, FN, STAGES>(a, y.data(), sums.data()); });
    emu::launch(dim3((B * TT * H + 3) / 4), 128, 0,
                [&] { attention::along<T>(y.data(), dy.data(), along.data(), TT, H, V, B * TT * H); });
    emu::launch(dim3((TT + 64 * QMT - 1) / (64 * QMT), H, B), 128, attention::Shared<T, KD, VD, QMT, QN, STAGES>::DQ,
                [&] { attention::dq<T, KD, VD, QMT, QN, STAGES>(a, dy.data(), sums.data(), along.data(), dq.data()); });
    emu::launch(dim3((S + 63) / 64, G, B), 128, attention::Shared<T, KD, VD, 1, KVN, STAGES>::DKV,
                [&] { attention::dkv<T, KD, VD, KVN, STAGES>(a, dy.data(), sums.data(), along.data(), dk.data(), dv.data()); });

    std::vector<double> y_(y.size()), sums_(sums.size()), dq_(dq.size()), dk_(dk.size()), dv_(dv.size());
    const T* value = (const T*)a.v;
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < TT; t++) {
                const int g = h / (H / G), at = past + t, start = starts.empty() ? 0 : starts[b * TT + t];
                const int near = c.window ? std::max(start, at + 1 - c.window) : start;
                const int far = c.window ? std::min(start + c.sinks, near) : start;
                std::vector<double> w(S, 0.), dw(S, 0.);
                double total = 0, inner = 0;
                const size_t row = (size_t(b) * TT + t) * H + h;
                auto key = [&](int j) { return &k[b * a.k_strides[0] + j * a.k_strides[1] + g * a.k_strides[2]]; };
                auto val = [&](int j) { return &value[b * a.v_strides[0] + j * a.v_strides[1] + g * a.v_strides[2]]; };
                for (int j = 0; j <= at; j++) {
                    if (!(j >= near || (j >= start && j < far))) continue;
                    double score = 0;
                    for (int i = 0; i < K; i++) score += (double)widen(q[row * K + i]) * widen(key(j)[i]);
                    total += w[j] = exp(score * a.scale);
                }
                sums_[(size_t(b) * H + h) * TT + t] = log(total);
                for (int j = 0; j <= at; j++) {
                    w[j] /= total;
                    for (int i = 0; i < V; i++) {
                        y_[row * V + i] += w[j] * widen(val(j)[i]);
                        dw[j] += (double)widen(dy[row * V + i]) * widen(val(j)[i]);
                        dv_[((size_t(b) * S + j) * G + g) * V + i] += w[j] * widen(dy[row * V + i]);
                    }
                    inner += w[j] * dw[j];
                }
                for (int j = 0; j <= at; j++)
                    for (int i = 0; i < K; i++) {
                        const double ds = a.scale * w[j] * (dw[j] - inner);
                        dq_[row * K + i] += ds * widen(key(j)[i]);
                        dk_[((size_t(b) * S + j) * G + g) * K + i] += ds * widen(q[row * K + i]);
                    }
            }
    char name[200];
    snprintf(name, sizeof name, "%s %d/%d: b %d, t %d of %d, heads %d/%d, k %d, v %d, window %d+%d, cuts %zu%s", type<T>(), KD, VD, B, TT, S, H, G, K,
             V, c.window, c.sinks, c.cuts.size(), c.view ? ", a view" : "");
    const double bound = sizeof(T) == 4 ? 2e-6 : 8e-3;
    check(name, {{"y", gap(y, y_), bound}, {"sums", gap(sums, sums_), 2e-6},
                 {"dq", gap(dq, dq_), bound}, {"dk", gap(dk, dk_), bound}, {"dv", gap(dv, dv_), bound}});
}

int main() {
    std::vector<Case> small = {
        {1, 1, 1, 1, 1, 2, 3},
        {2, 7, 7, 4, 2, 6, 5},
        {1, 130, 130, 2, 1, 16, 8},
        {2, 3, 40, 4, 1, 5, 8},
        {1, 1, 90, 8, 1, 12, 8},
        {2, 90, 90, 2, 1, 6, 6, 0, 0, {0, 1, 40, 64, 88}},
        {1, 9, 190, 4, 2, 6, 5, 7, 3},
        {1, 200, 200, 1, 1, 6, 5, 20, 2},
        {1, 150, 150, 1, 1, 6, 5, 1, 0},
        {2, 150, 150, 2, 2, 8, 8, 30, 3, {0, 70, 71, 140}},
        {1, 70, 70, 2, 2, 16, 16, 100, 2},
        {2, 20, 75, 4, 2, 6, 5, 0, 0, {}, true},
    };
    for (const Case& c : small) {
        run<float, 32, 32, 1, 32, 1, 32, 32, 1>(c);
        run<bf16, 32, 32, 2, 64, 2, 64, 64, 2>(c);
    }
    Case big = {1, 150, 150, 2, 1, 64, 64, 0, 0, {0, 33, 100}}, odd = {1, 75, 140, 1, 1, 50, 40}, large = {1, 100, 100, 1, 1, 128, 128, 0, 0, {0, 65}},
         latent = {1, 100, 100, 1, 1, 192, 128, 0, 0, {0, 20}};
    run<float, 64, 64, 1, 32, 1, 32, 32, 1>(big);
    run<bf16, 64, 64, 2, 64, 2, 32, 64, 2>(big);
    run<float, 64, 64, 1, 32, 1, 32, 32, 1>(odd);
    run<bf16, 64, 64, 2, 64, 2, 32, 64, 2>(odd);
    run<float, 128, 128, 1, 32, 1, 32, 32, 1>(large);
    run<bf16, 128, 128, 2, 32, 2, 32, 64, 2>(large);
    run<float, 192, 128, 1, 32, 1, 32, 32, 1>(latent);
    run<bf16, 192, 128, 2, 32, 1, 64, 32, 2>(latent);
    return finish();
}
