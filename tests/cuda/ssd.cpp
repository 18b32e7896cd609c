// The state-space dual from a state that was there before, and back to its gradient, against the recurrence in f64; what src/op/ssd/cuda.rs
// does not launch yet.
#include "../../src/op/ssd/kernel.cuh"
#include "check.h"

struct Case {
    int b, t, heads, groups, p, n;
    std::vector<int> cuts = {};
    /// Rows with gaps, as a view has them.
    int gap = 0;
    /// A state that was there before.
    bool carried = false;
};

template <class T, int D> void run(const Case& c) {
    const int B = c.b, TT = c.t, H = c.heads, G = c.groups, P = c.p, N = c.n, channels = G * (P + N) + H * N, row = channels + c.gap;
    const int chunks = (TT + 63) / 64;
    const auto xbc = random<T>(size_t(B) * TT * row, 1), dy = random<T>(size_t(B) * TT * H * P, 4);
    const auto dt = random<float>(size_t(B) * TT * (H + c.gap), 2, 2.f), params = random<float>(3 * H, 3, 1.5f);
    const auto begin = random<float>(size_t(B) * H * P * N, 5);
    std::vector<uint32_t> starts;
    if (!c.cuts.empty())
        for (int b = 0; b < B; b++)
            for (int t = 0; t < TT; t++) {
                uint32_t start = 0;
                for (int cut : c.cuts)
                    if (cut + b % 2 <= t) start = cut + b % 2;
                starts.push_back(start);
            }
    ssd::Problem<T> a = {};
    a.xbc = xbc.data(), a.dt = dt.data(), a.params = params.data(), a.starts = starts.empty() ? nullptr : starts.data();
    a.xbc_row = row, a.xbc_batch = (long long)TT * row, a.dt_row = H + c.gap, a.dt_batch = (long long)TT * (H + c.gap);
    a.t = TT, a.heads = H, a.groups = G, a.p = P, a.n = N;
    constexpr int E = 16 / sizeof(T);
    a.whole = P % E == 0 && N % E == 0 && row % E == 0;

    using S = ssd::Shared<T, D>;
    const size_t of_states = size_t(B) * chunks * H * P * N;
    std::vector<float> entering(of_states, NAN), leaving(of_states, NAN), through(size_t(B) * chunks * H, NAN), end(begin.size(), NAN),
        dbegin(begin.size(), NAN), reads(size_t(B) * H * TT, NAN), ddt(size_t(B) * TT * H, NAN), dparts(size_t(B) * chunks * 3 * H, NAN);
    std::vector<T> y(dy.size(), T(NAN)), dxbc(size_t(B) * TT * channels, T(NAN));
    const dim3 grid(chunks, H, B), entries((P * N + 255) / 256, H, B);
    const float* from = c.carried ? begin.data() : nullptr;
    emu::launch(grid, 128, S::STATES, [&] { ssd::states<false, T, D>(a, nullptr, entering.data(), through.data()); });
    emu::launch(entries, 256, 0, [&] { ssd::pass<false>(entering.data(), through.data(), from, end.data(), chunks, H, P * N); });
    emu::launch(grid, 128, S::OUTPUTS, [&] { ssd::outputs<T, D>(a, entering.data(), y.data()); });
    emu::launch(grid, 128, S::STATES, [&] { ssd::states<true, T, D>(a, dy.data(), leaving.data(), through.data()); });
    emu::launch(entries, 256, 0, [&] { ssd::pass<true>(leaving.data(), through.data(), nullptr, dbegin.data(), chunks, H, P * N); });
    emu::launch(grid, 128, S::BACK_READS,
                [&] { ssd::back_reads<T, D>(a, dy.data(), entering.data(), dxbc.data(), reads.data()); });
    emu::launch(dim3(chunks, G, B), 128, S::BACK_X, [&] { ssd::back_x<T, D>(a, dy.data(), leaving.data(), dxbc.data()); });
    emu::launch(dim3(chunks, G, B), 128, S::BACK_B, [&] {
        ssd::back_b<T, D>(a, dy.data(), entering.data(), leaving.data(), reads.data(), dxbc.data(), ddt.data(), dparts.data());
    });
    std::vector<float> dparams(3 * H, 0.f);
    for (size_t i = 0; i < dparts.size(); i++) dparams[i % (3 * H)] += dparts[i];

    std::vector<double> y_(y.size()), dxbc_(dxbc.size()), ddt_(ddt.size()), dparams_(3 * H), end_(end.size()), dbegin_(end.size());
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const int g = h / (H / G), of_x = g * P, of_b = G * P + g * N, of_c = G * (P + N) + h * N;
            const double rate = -exp((double)params[h]);
            auto at = [&](int t, int column) { return (double)widen(xbc[(size_t(b) * TT + t) * row + column]); };
            auto d = [&](int t, int p) { return (double)widen(dy[((size_t(b) * TT + t) * H + h) * P + p]); };
            std::vector<double> delta(TT), slope(TT), decay(TT);
            std::vector<std::vector<double>> state(TT + 1, std::vector<double>(P * N));
            if (c.carried)
                for (int i = 0; i < P * N; i++) state[0][i] = begin[(size_t(b) * H + h) * P * N + i];
            for (int t = 0; t < TT; t++) {
                const double raw = (double)dt[(size_t(b) * TT + t) * (H + c.gap) + h] + params[H + h];
                delta[t] = log1p(exp(-fabs(raw))) + fmax(raw, 0), slope[t] = 1 / (1 + exp(-raw));
                decay[t] = !starts.empty() && (int)starts[size_t(b) * TT + t] == t ? 0 : exp(rate * delta[t]);
                for (int p = 0; p < P; p++) {
                    double sum = params[2 * H + h] * at(t, of_x + p);
                    for (int n = 0; n < N; n++) {
                        double& s = state[t + 1][p * N + n];
                        s = decay[t] * state[t][p * N + n] + delta[t] * at(t, of_x + p) * at(t, of_b + n);
                        sum += s * at(t, of_c + n);
                    }
                    y_[((size_t(b) * TT + t) * H + h) * P + p] = sum;
                }
            }
            std::vector<double> adjoint(P * N);
            for (int t = TT - 1; t >= 0; t--) {
                double dlog = 0, ddelta = 0;
                double* dx = &dxbc_[(size_t(b) * TT + t) * channels];
                for (int p = 0; p < P; p++) {
                    dparams_[2 * H + h] += d(t, p) * at(t, of_x + p);
                    dx[of_x + p] += params[2 * H + h] * d(t, p);
                    for (int n = 0; n < N; n++) {
                        double& g = adjoint[p * N + n];
                        g += d(t, p) * at(t, of_c + n);
                        dx[of_c + n] += d(t, p) * state[t + 1][p * N + n];
                        dx[of_x + p] += delta[t] * g * at(t, of_b + n);
                        dx[of_b + n] += delta[t] * g * at(t, of_x + p);
                        ddelta += g * at(t, of_x + p) * at(t, of_b + n);
                        dlog += g * decay[t] * state[t][p * N + n];
                        g *= decay[t];
                    }
                }
                ddelta += rate * dlog;
                ddt_[(size_t(b) * TT + t) * H + h] = ddelta * slope[t];
                dparams_[h] += dlog * rate * delta[t], dparams_[H + h] += ddelta * slope[t];
            }
            for (int i = 0; i < P * N; i++) {
                end_[(size_t(b) * H + h) * P * N + i] = state[TT][i];
                dbegin_[(size_t(b) * H + h) * P * N + i] = adjoint[i];
            }
        }
    char name[200];
    snprintf(name, sizeof name, "%s %d: b %d, t %d, heads %d/%d, p %d, n %d, cuts %zu%s%s", type<T>(), D, B, TT, H, G, P, N, c.cuts.size(),
             c.gap ? ", a view" : "", c.carried ? ", carried on" : "");
    const double bound = sizeof(T) == 4 ? 2e-6 : 1e-2;
    check(name, {{"y", gap(y, y_), bound}, {"dxbc", gap(dxbc, dxbc_), bound}, {"ddt", gap(ddt, ddt_), bound},
                 {"dparams", gap(dparams, dparams_), bound}, {"end", gap(end, end_), bound}, {"dbegin", gap(dbegin, dbegin_), bound}});
}

int main() {
    const std::vector<Case> cases = {
        {1, 64, 2, 2, 16, 8, {}, 0, true},
        {1, 140, 2, 1, 7, 9, {}, 5, true},
        {2, 70, 4, 2, 8, 16, {3, 66}, 0, true},
    };
    for (const Case& c : cases) {
        run<float, 32>(c);
        run<bf16, 32>(c);
    }
    return finish();
}
