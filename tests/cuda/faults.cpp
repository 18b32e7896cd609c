// Kernels with faults that the emulator has to see, one by the name that is given; without a name, one without faults.
#include "emulator.h"

#include <string>

static std::string fault;
static std::unique_ptr<float[]> global(new float[64]());

/// Every thread takes its neighbour's number by way of shared memory.
__global__ void neighbours(float* out) {
    __shared__ float numbers[64];
    numbers[threadIdx.x] = threadIdx.x;
    if (fault != "forgotten barrier") __syncthreads();
    const float neighbour = numbers[(threadIdx.x + 1) % 64];
    if (neighbour != (threadIdx.x + 1) % 64) emu::fail("a wrong neighbour");
    out[threadIdx.x] = neighbour;
}

__global__ void faulty(float* out) {
    const int i = threadIdx.x;
    float* shared = reinterpret_cast<float*>(emu::dynamic);
    if (fault == "divergent barrier" && i < 40) __syncthreads();
    if (fault == "half a warp") {
        if (i % 2) __syncwarp();
        __syncthreads();
    }
    if (fault == "different collectives") {
        if (i % 2) __syncwarp();
        else __ballot_sync(~0u, 1);
    }
    if (fault == "outside of its own mask") __shfl_sync(0xffff, i, 0);
    if (fault == "behind the array") out[i + 1] = i;
    if (fault == "behind shared memory") shared[i + 1] = i;
    if (fault == "misaligned vector") *reinterpret_cast<float4*>(out + 1) = make_float4(1, 2, 3, 4);
    if (fault == "misaligned copy") cp_async_16(shared, out + 1);
    if (fault == "unwritten shared memory" && !(shared[i] == shared[i])) emu::fail("not a number");
    if (fault == "copy not waited for") {
        shared[i] = 0;
        __syncthreads();
        if (i % 4 == 0) cp_async_16(shared + i, out + i);
        cp_async_commit();
        __syncthreads();
        if (shared[i] != 1) emu::fail("an early copy");
    }
}

int main(int count, char** arguments) {
    if (count > 1) fault = arguments[1];
    for (int i = 0; i < 64; i++) global[i] = 1;
    emu::launch(3, 64, 64 * sizeof(float), [] { neighbours(global.get()); });
    for (int i = 0; i < 64; i++) global[i] = 1;
    emu::launch(1, 64, 64 * sizeof(float), [] { faulty(global.get()); });
    puts("no fault was seen");
}
