// Packs logical weights into slabs (kernels/layout/gpu_w4.h) on the device, once at load.
#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {
namespace {

constexpr int32_t kPackThreads = 128;

// Logical row of a tile's row; with paired rows 0…7 are gate, 8…15 the matching up rows.
__device__ __forceinline__ int32_t LogicalRow(const PackW4Params& p, int32_t tile, int32_t row) {
  if (!p.pair_rows) return tile * layout::kGpuTileRows + row;
  const int32_t index = tile * 8 + row % 8;
  if (index >= p.rows / 2) return p.rows;
  return row < 8 ? index : p.rows / 2 + index;
}

__device__ uint32_t NibbleWord(const PackW4Params& p, int32_t tile, int32_t slab, int32_t lane,
                               int32_t ks) {
  uint32_t word = 0;
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t k = slab * layout::kGpuSlabColumns + layout::GpuKIndex(ks, lane % 4, i, p.group);
    for (int32_t half_tile = 0; half_tile < 2; ++half_tile) {
      const int32_t row = LogicalRow(p, tile, lane / 4 + 8 * half_tile);
      if (row >= p.rows || k >= p.columns) continue;
      const int32_t nibble = half_tile + 2 * (i / 2) + 4 * (i % 2);
      word |= static_cast<uint32_t>(p.q[static_cast<int64_t>(row) * p.columns + k]) << (4 * nibble);
    }
  }
  return word;
}

// One block a slab: 128 threads write 2 words each of the 256.
__global__ void __launch_bounds__(kPackThreads) PackQuantizedKernel(PackW4Params p) {
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int32_t tile = blockIdx.x / slabs;
  const int32_t slab = blockIdx.x % slabs;
  uint8_t* out = p.slabs + static_cast<int64_t>(blockIdx.x) * layout::GpuSlabBytes(p.group);
  for (int32_t index = threadIdx.x; index < 256; index += kPackThreads) {
    const int32_t ks = index / 128 * 4 + index % 4;
    const int32_t lane = index / 4 % 32;
    reinterpret_cast<uint32_t*>(out)[index] = NibbleWord(p, tile, slab, lane, ks);
  }
  const int32_t groups_here = layout::kGpuSlabColumns / p.group;
  const int32_t groups = p.columns / p.group;
  for (int32_t index = threadIdx.x; index < groups_here * 16; index += kPackThreads) {
    const int32_t row_in_tile = index % 16;
    const int32_t group = slab * groups_here + index / 16;
    const int32_t row = LogicalRow(p, tile, row_in_tile);
    const bool real = row < p.rows && group < groups;
    const int64_t at = static_cast<int64_t>(row) * groups + group;
    uint8_t* constants = out + layout::kGpuSlabNibbleBytes + index / 16 * layout::kGpuGroupBytes;
    const int32_t place = row_in_tile % 8 * 2 + row_in_tile / 8;
    reinterpret_cast<half*>(constants)[place] = real ? p.scales[at] : __float2half(0.0f);
    constants[32 + place] = real ? p.zeros[at] : 0;
  }
}

// One block a slab: fp16 fragments, [k-step][lane][register][2].
__global__ void __launch_bounds__(kPackThreads) PackDenseKernel(PackW4Params p) {
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int32_t tile = blockIdx.x / slabs;
  const int32_t slab = blockIdx.x % slabs;
  half* out = reinterpret_cast<half*>(p.slabs) + static_cast<int64_t>(blockIdx.x) * 2048;
  for (int32_t index = threadIdx.x; index < 2048; index += kPackThreads) {
    const int32_t ks = index / 256;
    const int32_t lane = index / 8 % 32;
    const int32_t element = index % 8;  // register = element / 2
    const int32_t row = LogicalRow(p, tile, lane / 4 + 8 * (element / 2 % 2));
    const int32_t k = slab * layout::kGpuSlabColumns +
                      layout::GpuKIndex(ks, lane % 4, element / 4 * 2 + element % 2, 128);
    const bool real = row < p.rows && k < p.columns;
    out[index] = real ? p.dense[static_cast<int64_t>(row) * p.columns + k] : __float2half(0.0f);
  }
}

}  // namespace

cudaError_t PackW4(const PackW4Params& params, cudaStream_t stream) {
  if (params.group != 0 && params.columns % params.group != 0) return cudaErrorInvalidValue;
  const uint32_t blocks = static_cast<uint32_t>(layout::GpuRowTiles(params.rows)) *
                          static_cast<uint32_t>(layout::GpuSlabs(params.columns));
  if (params.group == 0) {
    PackDenseKernel<<<blocks, kPackThreads, 0, stream>>>(params);
  } else {
    PackQuantizedKernel<<<blocks, kPackThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace nibble::cuda
