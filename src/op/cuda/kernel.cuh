// What several operations end with.
#pragma once
#include "device.cuh"

namespace cuda {

/// `parts [R, N]` summed over its rows, in their order; a thread a column.
template <class T> __device__ void sum_rows(const float* parts, T* sum, int rows, int n) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= n) return;
    float total = 0.f;
    for (int row = 0; row < rows; row++) total += parts[size_t(row) * n + column];
    narrow(total, sum[column]);
}

/// The first entry that is no number, if it stands before `found`.
template <class T> __device__ __forceinline__ void first_nan(const T* x, uint32_t* found, long long n) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && widen(x[i]) != widen(x[i])) atomicMin(found, (uint32_t)min(i, 0xfffffffell));
}

} // namespace cuda

extern "C" __global__ void sum_rows_f32(const float* parts, float* sum, int rows, int n) { cuda::sum_rows(parts, sum, rows, n); }
extern "C" __global__ void sum_rows_bf16(const float* parts, bf16* sum, int rows, int n) { cuda::sum_rows(parts, sum, rows, n); }
extern "C" __global__ void first_nan_f32(const float* x, uint32_t* found, long long n) { cuda::first_nan(x, found, n); }
extern "C" __global__ void first_nan_bf16(const bf16* x, uint32_t* found, long long n) { cuda::first_nan(x, found, n); }
