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

} // namespace cuda

extern "C" __global__ void sum_rows_f32(const float* parts, float* sum, int rows, int n) { cuda::sum_rows(parts, sum, rows, n); }
extern "C" __global__ void sum_rows_bf16(const float* parts, bf16* sum, int rows, int n) { cuda::sum_rows(parts, sum, rows, n); }
