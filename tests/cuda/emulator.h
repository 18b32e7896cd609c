// CUDA C++ kernels on the CPU: what a test needs so that a `.cuh` compiles with g++ and runs.
//
// Blocks run one after the other, a fiber a thread. A fiber runs until it waits (a barrier, a warp's collective), and those that
// may go on do so in an order drawn anew each time, from `emu::seed`: what a forgotten barrier would let happen, does happen under
// some seed. Shared memory is filled with NaNs before each block, dynamic shared memory has its exact size (the address sanitizer
// sees the bounds), vector types have the device's alignment (the undefined-behaviour sanitizer sees misaligned loads), and an
// asynchronous copy arrives no sooner than it is waited for. A barrier that not all threads reach ends the program with a report, and
// so does a collective that lanes of one mask meet with different ones. tests/cuda/faults.cpp has what has to be seen.
//
// Not modelled: memory order between blocks and within a warp, rounding of the device's own functions and of its products of
// matrices (here f32, in the order of k), limits of registers and shared memory, speed.
#pragma once

#include <link.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Thread-local memory of the program is one piece, which can be found and filled; nothing else here may be thread-local.
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    size_t count() const { return size_t(x) * y * z; }
};

// ---------------------------------------------------------------------------------------------------------------- fibers

namespace emu {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;
/// Bytes of it are NaNs in every float type, and far outside as an index.
constexpr int POISON = 0xff;

/// What the lanes of a warp gave to a collective.
struct Exchange {
    uint32_t words[WARP][8];
    unsigned mask;
    int readers = 0;

    /// What `lane` gave; NaNs of one that gave nothing.
    template <class T> T of(int lane) const {
        static_assert(sizeof(T) <= sizeof words[0]);
        T value;
        if (mask >> lane & 1) memcpy((void*)&value, words[lane], sizeof value);
        else memset((void*)&value, POISON, sizeof value);
        return value;
    }
};

enum class Wait { None, Block, Warp };

struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;
};

/// Where a fiber stands while others run.
#ifdef __x86_64__
// The top of its stack, where the registers stand that a call must keep: all that has to be changed, and quicker than by system calls.
using Context = void*;
void change(Context* from, Context to) asm("emulator_change");
asm(R"(
    .pushsection .text
    .weak emulator_change
emulator_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .popsection
)");
inline void change(Context& from, Context& to) { change(&from, to); }
inline void begin(Context& context, char* stack, void (*function)()) {
    void** top = reinterpret_cast<void**>(stack + STACK);
    memset(top - 8, 0, 8 * sizeof *top);
    top[-2] = reinterpret_cast<void*>(function); // what the change returns to
    context = top - 8;
}
#else
using Context = ucontext_t;
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
inline void begin(Context& context, char* stack, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
}
#endif

struct Fiber {
    Context context;
    char* stack;
    bool ended;
    Wait wait;
    const char* at;     // the name of what it waits in
    unsigned mask;      // of a warp's collective
    uint32_t given[8];
    int vote;           // at a block's barrier
    Exchange* exchange; // of the collective it comes out of
    std::vector<std::vector<Copy>> copies; // asynchronous ones, by group; the last group is open
};

inline uint64_t seed = 1;
inline dim3 grid, block, block_index;
inline std::vector<dim3> thread_index;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline size_t threads;
inline int current;
inline Context home;
inline std::function<void()> kernel;
inline std::unique_ptr<char[]> dynamic_buffer;
inline char* dynamic;
inline std::vector<std::vector<Exchange>> exchanges; // of every warp
inline int votes_and, votes_or, votes_count;

/// Uniform below `n`.
inline size_t draw(size_t n) {
    seed += 0x9e3779b97f4a7c15u;
    uint64_t z = seed;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % n;
}

[[noreturn]] inline void fail(const char* why) {
    fprintf(stderr, "emulator: %s, in block (%u, %u, %u) of (%u, %u, %u)\n", why, block_index.x, block_index.y, block_index.z,
            grid.x, grid.y, grid.z);
    for (size_t i = 0; i < threads; i++) {
        const Fiber& f = *fibers[i];
        if (f.ended) fprintf(stderr, "  thread %zu has ended\n", i);
        else if (f.wait == Wait::Warp) fprintf(stderr, "  thread %zu waits in %s, mask %08x\n", i, f.at, f.mask);
        else fprintf(stderr, "  thread %zu waits in %s\n", i, f.wait == Wait::Block ? f.at : "nothing");
    }
    abort();
}

inline void enter() {
    kernel();
    fibers[current]->ended = true;
    change(fibers[current]->context, home);
}

inline void pause(Wait wait, const char* at) {
    Fiber& f = *fibers[current];
    f.wait = wait;
    f.at = at;
    change(f.context, home);
}

inline void run(int thread) {
    current = thread;
    change(home, fibers[thread]->context);
}

/// Lets the lanes of a warp go that have all met in a collective; true if there were any.
inline bool release_warp(size_t warp) {
    const size_t first = warp * WARP, count = threads - first < WARP ? threads - first : WARP;
    bool released = false;
    for (size_t lane = 0; lane < count; lane++) {
        const Fiber& asking = *fibers[first + lane];
        if (asking.ended || asking.wait != Wait::Warp) continue;
        const unsigned mask = asking.mask;
        if (!(mask >> lane & 1)) fail("a lane that its own mask leaves out");
        unsigned living = 0, arrived = 0;
        for (size_t i = 0; i < count; i++) {
            const Fiber& f = *fibers[first + i];
            if (!(mask >> i & 1) || f.ended) continue;
            living |= 1u << i;
            if (f.wait != Wait::Warp || f.mask != mask) continue;
            if (strcmp(f.at, asking.at)) fail("lanes of one mask in different collectives");
            arrived |= 1u << i;
        }
        if (arrived != living) continue;
        Exchange* exchange = nullptr;
        for (Exchange& e : exchanges[warp])
            if (e.readers == 0) exchange = &e;
        exchange->mask = living;
        for (size_t i = 0; i < count; i++) {
            if (!(living >> i & 1)) continue;
            Fiber& f = *fibers[first + i];
            memcpy(exchange->words[i], f.given, sizeof f.given);
            f.exchange = exchange;
            f.wait = Wait::None;
            exchange->readers++;
        }
        released = true;
    }
    return released;
}

/// Lets all threads go, if all are at the block's barrier.
inline bool release_block() {
    int all = 1, any = 0, count = 0;
    for (size_t i = 0; i < threads; i++) {
        const Fiber& f = *fibers[i];
        if (f.ended || f.wait != Wait::Block) return false;
        all &= f.vote != 0;
        any |= f.vote != 0;
        count += f.vote != 0;
    }
    for (size_t i = 0; i < threads; i++) fibers[i]->wait = Wait::None;
    votes_and = all, votes_or = any, votes_count = count;
    return true;
}

inline void poison_static_shared() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data)
                    memset(info->dlpi_tls_data, POISON, info->dlpi_phdr[i].p_memsz);
            return 1; // the first is the program itself
        },
        nullptr);
}

inline void run_block() {
    for (size_t i = 0; i < threads; i++) {
        Fiber& f = *fibers[i];
        f.ended = false;
        f.wait = Wait::None;
        f.copies.assign(1, {});
        begin(f.context, f.stack, enter);
    }
    std::vector<int> ready;
    for (;;) {
        ready.clear();
        for (size_t i = 0; i < threads; i++)
            if (!fibers[i]->ended && fibers[i]->wait == Wait::None) ready.push_back(int(i));
        for (size_t i = ready.size(); i > 1; i--) std::swap(ready[i - 1], ready[draw(i)]);
        for (int thread : ready) run(thread);
        bool living = false, released = false;
        for (size_t i = 0; i < threads; i++) living |= !fibers[i]->ended;
        if (!living) return;
        for (size_t warp = 0; warp * WARP < threads; warp++) released |= release_warp(warp);
        if (!released && !release_block()) fail("a barrier that not all threads reach");
    }
}

/// `kernel<<<grid, block, shared>>>`, with a call of the kernel as a closure.
template <class F> void launch(dim3 g, dim3 b, size_t shared, F call) {
    grid = g, block = b, threads = b.count(), kernel = call;
    if (threads == 0 || threads > 1024 || g.count() == 0 || g.y > 65535 || g.z > 65535) {
        fprintf(stderr, "emulator: no device takes a grid of (%u, %u, %u) and blocks of (%u, %u, %u)\n", g.x, g.y, g.z, b.x, b.y, b.z);
        abort();
    }
    while (fibers.size() < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
        if (stack == MAP_FAILED) {
            perror("emulator: a stack");
            abort();
        }
        fibers.back()->stack = static_cast<char*>(stack);
    }
    exchanges.assign((threads + WARP - 1) / WARP, std::vector<Exchange>(WARP));
    thread_index.resize(threads);
    for (size_t i = 0; i < threads; i++) thread_index[i] = dim3(i % b.x, i / b.x % b.y, i / b.x / b.y);
    // In an order of its own: blocks know nothing of each other.
    std::vector<size_t> order(g.count());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    for (size_t at : order) {
        block_index = dim3(at % g.x, at / g.x % g.y, at / g.x / g.y);
        dynamic_buffer.reset(new char[shared]); // aligned to 16, its bounds watched
        dynamic = dynamic_buffer.get();
        memset(dynamic, POISON, shared);
        poison_static_shared();
        run_block();
    }
    dynamic_buffer.reset();
}

/// Gives `value` to the others of the mask, and hands what all gave to `read`.
template <class T, class F> auto collective(const char* what, unsigned mask, const T& value, F read) {
    Fiber& f = *fibers[current];
    static_assert(sizeof value <= sizeof f.given);
    memcpy(f.given, &value, sizeof value);
    f.mask = mask;
    pause(Wait::Warp, what);
    auto result = read(*f.exchange);
    f.exchange->readers--;
    return result;
}

inline int lane() { return current % WARP; }

inline int barrier(const char* what, int vote) {
    fibers[current]->vote = vote;
    pause(Wait::Block, what);
    return 0;
}

} // namespace emu

#define threadIdx (emu::thread_index[emu::current])
#define blockIdx (emu::block_index)
#define blockDim (emu::block)
#define gridDim (emu::grid)
constexpr int warpSize = emu::WARP;

// -------------------------------------------------------------------------------------------------------------- barriers

inline void __syncthreads() { emu::barrier("__syncthreads", 0); }
inline int __syncthreads_or(int vote) { return emu::barrier("__syncthreads_or", vote), emu::votes_or; }
inline int __syncthreads_and(int vote) { return emu::barrier("__syncthreads_and", vote), emu::votes_and; }
inline int __syncthreads_count(int vote) { return emu::barrier("__syncthreads_count", vote), emu::votes_count; }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = ~0u) {
    emu::collective("__syncwarp", mask, 0, [](const emu::Exchange&) { return 0; });
}

// --------------------------------------------------------------------------------------------------- collectives of warps

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int lane = emu::lane() / width * width + (from & (width - 1));
    return emu::collective("__shfl_sync", mask, value, [=](const emu::Exchange& e) { return e.of<T>(lane); });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emu::lane(), other = lane ^ bits;
    const int from = other < (lane / width + 1) * width ? other : lane;
    return emu::collective("__shfl_xor_sync", mask, value, [=](const emu::Exchange& e) { return e.of<T>(from); });
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emu::lane(), from = lane % width + int(by) < width ? lane + int(by) : lane;
    return emu::collective("__shfl_down_sync", mask, value, [=](const emu::Exchange& e) { return e.of<T>(from); });
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emu::lane(), from = lane % width >= int(by) ? lane - int(by) : lane;
    return emu::collective("__shfl_up_sync", mask, value, [=](const emu::Exchange& e) { return e.of<T>(from); });
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    return emu::collective("__ballot_sync", mask, int(vote != 0), [](const emu::Exchange& e) {
        unsigned found = 0;
        for (int i = 0; i < emu::WARP; i++)
            if (e.mask >> i & 1 && e.of<int>(i)) found |= 1u << i;
        return found;
    });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }

namespace emu {
template <class T, class F> T reduce(const char* what, unsigned mask, T value, F join) {
    return collective(what, mask, value, [=](const Exchange& e) {
        T total = value;
        for (int i = 0; i < WARP; i++)
            if (e.mask >> i & 1 && i != lane()) total = join(total, e.of<T>(i));
        return total;
    });
}
} // namespace emu
template <class T> T __reduce_add_sync(unsigned mask, T value) {
    static_assert(std::is_integral_v<T>, "of integers only, on the device");
    return emu::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return T(std::make_unsigned_t<T>(a) + b); });
}
template <class T> T __reduce_max_sync(unsigned mask, T value) {
    static_assert(std::is_integral_v<T>, "of integers only, on the device");
    return emu::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T> T __reduce_min_sync(unsigned mask, T value) {
    static_assert(std::is_integral_v<T>, "of integers only, on the device");
    return emu::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; });
}

// --------------------------------------------------------------------------------------------------------------- atomics

template <class T> T atomicAdd(T* at, std::common_type_t<T> value) { return std::exchange(*at, T(*at + value)); }
template <class T> T atomicMax(T* at, std::common_type_t<T> value) { return std::exchange(*at, *at > value ? *at : value); }
template <class T> T atomicMin(T* at, std::common_type_t<T> value) { return std::exchange(*at, *at < value ? *at : value); }
template <class T> T atomicExch(T* at, std::common_type_t<T> value) { return std::exchange(*at, value); }
template <class T> T atomicOr(T* at, std::common_type_t<T> value) { return std::exchange(*at, *at | value); }
template <class T> T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return std::exchange(*at, *at == expected ? value : *at);
}

// ----------------------------------------------------------------------------------------------------------------- types

#define EMULATED_VECTOR2(name, T, bytes)                                                                                         \
    struct alignas(bytes) name {                                                                                                 \
        T x, y;                                                                                                                  \
    };                                                                                                                           \
    inline name make_##name(T x, T y) { return {x, y}; }
#define EMULATED_VECTOR4(name, T, bytes)                                                                                         \
    struct alignas(bytes) name {                                                                                                 \
        T x, y, z, w;                                                                                                            \
    };                                                                                                                           \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR2(float2, float, 8)
EMULATED_VECTOR4(float4, float, 16)
EMULATED_VECTOR2(int2, int, 8)
EMULATED_VECTOR4(int4, int, 16)
EMULATED_VECTOR2(uint2, unsigned, 8)
EMULATED_VECTOR4(uint4, unsigned, 16)
EMULATED_VECTOR4(uchar4, unsigned char, 4)
#undef EMULATED_VECTOR2
#undef EMULATED_VECTOR4

namespace emu {
template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy((void*)&to, &from, sizeof to);
    return to;
}

inline float bf16_to_float(uint16_t half) { return bits<float>(uint32_t(half) << 16); }

/// To the nearest, ties to even.
inline uint16_t float_to_bf16(float x) {
    if (x != x) return 0x7fff;
    const uint32_t u = bits<uint32_t>(x);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent   ? ldexpf(float(1024 + fraction), exponent - 25)
                                    : ldexpf(float(fraction), -24);
    return half >> 15 ? -size : size;
}

/// To the nearest, ties to even.
inline uint16_t float_to_f16(float x) {
    const uint16_t sign = uint16_t(bits<uint32_t>(x) >> 31 << 15);
    const float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < ldexpf(1, -14)) return sign | uint16_t(nearbyintf(ldexpf(size, 24)));
    int exponent;
    const float fraction = frexpf(size, &exponent); // in [1/2, 1)
    // A fraction that is rounded up to 2 carries into the exponent by itself.
    return sign | uint16_t(((exponent + 14) << 10) + int(nearbyintf(ldexpf(fraction, 11))) - 1024);
}
} // namespace emu

struct __nv_bfloat16 {
    uint16_t x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : x(emu::float_to_bf16(value)) {}
    operator float() const { return emu::bf16_to_float(x); }
};
struct __half {
    uint16_t x;
    __half() = default;
    __half(float value) : x(emu::float_to_f16(value)) {}
    operator float() const { return emu::f16_to_float(x); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline float __half2float(__half x) { return x; }
inline __half __ushort_as_half(uint16_t x) { return emu::bits<__half>(x); }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }

// ------------------------------------------------------------------------------------------------------------- functions

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __saturatef(float x) { return x > 0.f ? x < 1.f ? x : 1.f : 0.f; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ------------------------------------------------------------------------------------- products and copies by whole warps

namespace emu {
inline void copy_now(const Copy& c) {
    memcpy(c.to, c.from, c.bytes);
    memset((char*)c.to + c.bytes, 0, c.zeros);
}
} // namespace emu

namespace emu {
/// `mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32`, fragments as the PTX ISA has them: `d += a b`.
template <class F> void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F entry) {
    struct Given {
        uint32_t r[6];
    } given = {{a[0], a[1], a[2], a[3], b[0], b[1]}};
    collective(what, ~0u, given, [&](const Exchange& e) {
        for (int i = 0; i < 4; i++) {
            const int row = lane() / 4 + 8 * (i / 2), col = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                const uint32_t* from_a = e.words[row % 8 * 4 + k % 8 / 2];
                const uint32_t* from_b = e.words[col * 4 + k % 8 / 2];
                d[i] += entry(from_a[row / 8 + 2 * (k / 8)] >> 16 * (k % 2)) * entry(from_b[4 + k / 8] >> 16 * (k % 2));
            }
        }
        return 0;
    });
}
} // namespace emu

inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emu::mma("mma bf16", d, a, b, [](uint32_t x) { return emu::bf16_to_float(uint16_t(x)); });
}
inline void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emu::mma("mma f16", d, a, b, [](uint32_t x) { return emu::f16_to_float(uint16_t(x)); });
}

namespace emu {
/// `COUNT` matrices of 8 x 8 entries of 16 bits; lane `8 m + i` points to row `i` of matrix `m`.
template <int COUNT> void ldmatrix(uint32_t (&r)[COUNT], const void* row, bool transposed) {
    if (uintptr_t(row) % 16) fail("ldmatrix of a row that is not aligned to 16 bytes");
    collective("ldmatrix", ~0u, row, [&](const Exchange& e) {
        for (int m = 0; m < COUNT; m++) {
            uint16_t pair[2];
            for (int i = 0; i < 2; i++) {
                const int along = lane() % 4 * 2 + i, across = lane() / 4;
                const uint16_t* from = e.of<const uint16_t*>(8 * m + (transposed ? along : across));
                pair[i] = from[transposed ? across : along];
            }
            memcpy(&r[m], pair, 4);
        }
        return 0;
    });
}
} // namespace emu
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu::ldmatrix(r, row, false); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emu::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emu::ldmatrix(r, row, true); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emu::ldmatrix(r, row, true); }

/// 16 bytes from global to shared memory, of which those from `bytes` on become zeros.
inline void cp_async_16(void* to, const void* from, int bytes = 16) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16) emu::fail("cp.async between places that are not aligned to 16 bytes");
    emu::fibers[emu::current]->copies.back().push_back({to, from, size_t(bytes), size_t(16 - bytes)});
}
inline void cp_async_4(void* to, const void* from) {
    if (uintptr_t(to) % 4 || uintptr_t(from) % 4) emu::fail("cp.async between places that are not aligned to 4 bytes");
    emu::fibers[emu::current]->copies.back().push_back({to, from, 4, 0});
}
inline void cp_async_commit() { emu::fibers[emu::current]->copies.emplace_back(); }
/// Until all groups but the last `LEFT` have arrived.
template <int LEFT> void cp_async_wait() {
    auto& groups = emu::fibers[emu::current]->copies;
    while (groups.size() > LEFT + 1) {
        for (const emu::Copy& c : groups.front()) emu::copy_now(c);
        groups.erase(groups.begin());
    }
}
