#include "kernels/cuda/w4_large.h"

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kRowUnit = 128;        // of a slice
constexpr int32_t kStagedColumns = 136;  // a slab's, and what keeps rows in different banks

struct DequantizeParams {
  const uint8_t* slabs;
  int32_t rows;  // of the slice
  int32_t columns;
  half* out;  // [rows, columns]
};

__device__ __forceinline__ uint32_t Halves(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Values of one row in a nibble word: nibbles 2 * i / 2 …, as kernels/layout/gpu_w4.h has them.
__device__ __forceinline__ uint2 RowOf(uint32_t word, int32_t upper, float zero, float scale) {
  const uint32_t w = word >> (4 * upper);
  const auto value = [&](int32_t nibble) {
    return (static_cast<float>(w >> (4 * nibble) & 15) - zero) * scale;
  };
  return make_uint2(Halves(value(0), value(4)), Halves(value(2), value(6)));
}

// One warp a slab: a lane holds 32 columns of rows r and r + 8. They go through shared memory, so
// that a warp writes whole rows.
template <int32_t kGroup>
__global__ void __launch_bounds__(kThreads)
    DequantizeKernel(const __grid_constant__ DequantizeParams p) {
  __shared__ __align__(16) half staged[kWarps][layout::kGpuTileRows][kStagedColumns];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t tile = static_cast<int32_t>(index / slabs);
  const int32_t slab = static_cast<int32_t>(index % slabs);
  if (tile >= layout::GpuRowTiles(p.rows)) return;
  const uint8_t* from = p.slabs + index * layout::GpuSlabBytes(kGroup);
  uint4 words[2];
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    words[i] = __ldg(reinterpret_cast<const uint4*>(from + i * 512 + lane * 16));
  }
#pragma unroll
  for (int32_t step = 0; step < 8; step += 2) {
    const int32_t group = step * 16 / kGroup;
    const uint8_t* constants = from + layout::kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
    const half2 scales = __ldg(reinterpret_cast<const half2*>(constants + lane / 4 * 4));
    const uint32_t zeros = __ldg(reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2));
    const uint4& four = words[step / 4];
    const uint32_t first = step % 4 == 0 ? four.x : four.z;
    const uint32_t second = step % 4 == 0 ? four.y : four.w;
    const int32_t k = layout::GpuKIndex(step, lane % 4, 0, kGroup);
#pragma unroll
    for (int32_t upper = 0; upper < 2; ++upper) {
      const float scale = upper == 0 ? __low2float(scales) : __high2float(scales);
      const float zero = static_cast<float>(upper == 0 ? zeros & 0xff : zeros >> 8);
      const uint2 low = RowOf(first, upper, zero, scale), high = RowOf(second, upper, zero, scale);
      *reinterpret_cast<uint4*>(&staged[threadIdx.x / 32][lane / 4 + 8 * upper][k]) =
          make_uint4(low.x, low.y, high.x, high.y);
    }
  }
  __syncwarp();
  const int32_t column = slab * layout::kGpuSlabColumns + lane % 16 * 8;
#pragma unroll
  for (int32_t r = lane / 16; r < layout::kGpuTileRows; r += 2) {
    const int32_t row = tile * layout::kGpuTileRows + r;
    if (row >= p.rows || column >= p.columns) continue;
    *reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(row) * p.columns + column) =
        *reinterpret_cast<const uint4*>(&staged[threadIdx.x / 32][r][lane % 16 * 8]);
  }
}

template <int32_t kGroup>
cudaError_t Dequantize(const DequantizeParams& params, cudaStream_t stream) {
  const int64_t warps =
      static_cast<int64_t>(layout::GpuRowTiles(params.rows)) * layout::GpuSlabs(params.columns);
  return LaunchKernel(DequantizeKernel<kGroup>,
                      {.grid = dim3(static_cast<uint32_t>((warps + kWarps - 1) / kWarps)),
                       .block = dim3(kThreads),
                       .stream = stream},
                      params);
}

cudaError_t DequantizeSlice(const W4BatchParams& params, int32_t first_row, int32_t rows, half* out,
                            cudaStream_t stream) {
  const DequantizeParams slice{
      params.slabs + W4DecodeBytes(first_row, params.columns, params.group), rows, params.columns,
      out};
  switch (params.group) {
    case 32:
      return Dequantize<32>(slice, stream);
    case 64:
      return Dequantize<64>(slice, stream);
    default:
      return Dequantize<128>(slice, stream);
  }
}

// y[token * stride + row] (+)= W x of a slice.
cublasStatus_t Multiply(const W4BatchParams& params, const LargeScratch& scratch, int32_t rows,
                        void* y, cudaDataType type, int32_t stride) {
  const float one = 1, old = params.output == DecodeOutput::kAddResidual ? 1 : 0;
  return cublasGemmEx(scratch.handle, CUBLAS_OP_T, CUBLAS_OP_N, rows, params.tokens, params.columns,
                      &one, scratch.weights, CUDA_R_16F, params.columns, params.x, CUDA_R_16F,
                      params.columns, &old, y, type, stride, CUBLAS_COMPUTE_32F,
                      CUBLAS_GEMM_DEFAULT);
}

}  // namespace

cublasStatus_t W4Large(const W4BatchParams& params, const LargeScratch& scratch,
                       cudaStream_t stream) {
  const int64_t fits = kLargeScratchBytes / (2 * params.columns) / kRowUnit * kRowUnit;
  if (params.group == 0 || params.bias != nullptr || fits == 0) return CUBLAS_STATUS_INVALID_VALUE;
  const int32_t slice = fits < kLargeSliceRowsMax ? static_cast<int32_t>(fits) : kLargeSliceRowsMax;
  for (int32_t first = 0; first < params.rows; first += slice) {
    const int32_t rows = params.rows - first < slice ? params.rows - first : slice;
    if (DequantizeSlice(params, first, rows, scratch.weights, stream) != cudaSuccess) {
      return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (params.output == DecodeOutput::kSiluMul) {
      status = Multiply(params, scratch, rows, scratch.gate_up, CUDA_R_16F, rows);
      const cudaError_t error = SiluMul({.gate_up = scratch.gate_up,
                                         .tokens = params.tokens,
                                         .ffn = rows / 2,
                                         .out = params.y_half + first / 2,
                                         .out_stride = params.rows / 2},
                                        {.stream = stream});
      if (error != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
    } else if (params.output == DecodeOutput::kHalf) {
      status = Multiply(params, scratch, rows, params.y_half + first, CUDA_R_16F, params.rows);
    } else {
      float* y = params.output == DecodeOutput::kFloat ? params.y_float : params.residual_out;
      status = Multiply(params, scratch, rows, y + first, CUDA_R_32F, params.rows);
    }
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace nibble::cuda
