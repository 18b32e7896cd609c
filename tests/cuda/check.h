// What the tests of kernels share.
#pragma once
#include <cstdio>
#include <random>
#include <vector>

template <class T> const char* type();
template <> inline const char* type<float>() { return "f32"; }
template <> inline const char* type<bf16>() { return "bf16"; }
template <> inline const char* type<f16>() { return "f16"; }

/// Entries between −range and range.
template <class T> std::vector<T> random(size_t count, unsigned seed, float range = 1.f) {
    std::mt19937 engine(seed);
    std::uniform_real_distribution<float> entry(-range, range);
    std::vector<T> x(count);
    for (T& x : x) x = T(entry(engine));
    return x;
}

/// max |a − b| / (1 + max |b|), not a number if one is not.
template <class T> double gap(const std::vector<T>& a, const std::vector<double>& b) {
    double off = 0, most = 0;
    for (size_t i = 0; i < a.size(); i++) {
        const double d = std::fabs(widen(a[i]) - b[i]);
        if (!(d <= off)) off = d;
        if (off != off) return off;
        most = std::fmax(most, std::fabs(b[i]));
    }
    return off / (1 + most);
}

struct Found {
    const char* what;
    double error, bound;
};
inline int failures;

inline void check(const char* name, const std::vector<Found>& all) {
    bool good = true;
    for (const Found& f : all) good &= f.error <= f.bound;
    failures += !good;
    printf("%s %s:", good ? "ok  " : "FAIL", name);
    for (const Found& f : all) printf(" %s %.1e", f.what, f.error);
    printf("\n");
    fflush(stdout);
}

inline int finish() {
    if (failures) printf("%d failed\n", failures);
    return failures > 0;
}
