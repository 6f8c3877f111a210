// Packs weights into slabs (kernels/layout/gpu_w4.h) on the device, once at load.
#include "kernels/cuda/w4_pack.h"

#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {
namespace {

constexpr int32_t kPackThreads = 128;

// Logical values as they are.
struct LogicalSource {
  const uint8_t* q;
  const uint8_t* zeros;
  const half* scales;
  int32_t columns, groups;

  __device__ uint32_t Weight(int32_t row, int32_t k) const {
    return q[static_cast<int64_t>(row) * columns + k];
  }
  __device__ uint8_t Zero(int32_t row, int32_t group) const {
    return zeros[static_cast<int64_t>(row) * groups + group];
  }
  __device__ half Scale(int32_t row, int32_t group) const {
    return scales[static_cast<int64_t>(row) * groups + group];
  }
  __device__ void Check(half /*scale*/) const {}
};

// `exponent`: a number's bits of it, all set where the number is not finite.
__device__ __forceinline__ bool Finite(uint16_t bits, uint16_t exponent) {
  return (bits & exponent) != exponent;
}
constexpr uint16_t kHalfExponent = 0x7c00, kBfloat16Exponent = 0x7f80;

// Logical values out of AutoAWQ's gemm layout.
struct GemmSource {
  GemmPart parts[kGemmPartsMax];
  int32_t* not_finite;

  // The part that holds the row, which becomes one of the part's.
  __device__ __forceinline__ const GemmPart& PartOf(int32_t* row) const {
    int32_t part = 0;
    while (part + 1 < kGemmPartsMax && *row >= parts[part].rows) *row -= parts[part++].rows;
    return parts[part];
  }
  static __device__ __forceinline__ uint32_t Nibble(uint32_t word, int32_t row) {
    return word >> (4 * (row % 2 * 4 + row % 8 / 2)) & 15;
  }
  __device__ uint32_t Weight(int32_t row, int32_t k) const {
    const GemmPart& part = PartOf(&row);
    return Nibble(part.qweight[static_cast<int64_t>(k) * (part.rows / 8) + row / 8], row);
  }
  __device__ uint8_t Zero(int32_t row, int32_t group) const {
    const GemmPart& part = PartOf(&row);
    const int64_t word = static_cast<int64_t>(group) * (part.rows / 8) + row / 8;
    return static_cast<uint8_t>(Nibble(part.qzeros[word], row));
  }
  __device__ half Scale(int32_t row, int32_t group) const {
    const GemmPart& part = PartOf(&row);
    return part.scales[static_cast<int64_t>(group) * part.rows + row];
  }
  __device__ void Check(half scale) const {
    if (!Finite(__half_as_ushort(scale), kHalfExponent)) *not_finite = 1;
  }
};

// Of the slabs.
struct PackShape {
  int32_t rows, columns, group;
  bool pair_rows;
  uint8_t* slabs;
};

// Logical row of a tile's row; with paired rows 0…7 are gate, 8…15 the matching up rows.
template <typename Shape>
__device__ __forceinline__ int32_t LogicalRow(const Shape& p, int32_t tile, int32_t row) {
  if (!p.pair_rows) return tile * layout::kGpuTileRows + row;
  const int32_t index = tile * 8 + row % 8;
  if (index >= p.rows / 2) return p.rows;
  return row < 8 ? index : p.rows / 2 + index;
}

template <typename Source>
__device__ uint32_t NibbleWord(const PackShape& p, const Source& source, int32_t tile, int32_t slab,
                               int32_t lane, int32_t ks) {
  uint32_t word = 0;
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t k = slab * layout::kGpuSlabColumns + layout::GpuKIndex(ks, lane % 4, i, p.group);
    for (int32_t half_tile = 0; half_tile < 2; ++half_tile) {
      const int32_t row = LogicalRow(p, tile, lane / 4 + 8 * half_tile);
      if (row >= p.rows || k >= p.columns) continue;
      const int32_t nibble = half_tile + 2 * (i / 2) + 4 * (i % 2);
      word |= source.Weight(row, k) << (4 * nibble);
    }
  }
  return word;
}

// One block a slab: 128 threads write 2 words each of the 256.
template <typename Source>
__global__ void __launch_bounds__(kPackThreads)
    PackQuantizedKernel(const __grid_constant__ PackShape p,
                        const __grid_constant__ Source source) {
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int32_t tile = blockIdx.x / slabs;
  const int32_t slab = blockIdx.x % slabs;
  uint8_t* out = p.slabs + static_cast<int64_t>(blockIdx.x) * layout::GpuSlabBytes(p.group);
  for (int32_t index = threadIdx.x; index < 256; index += kPackThreads) {
    const int32_t ks = index / 128 * 4 + index % 4;
    const int32_t lane = index / 4 % 32;
    reinterpret_cast<uint32_t*>(out)[index] = NibbleWord(p, source, tile, slab, lane, ks);
  }
  const int32_t groups_here = layout::kGpuSlabColumns / p.group;
  const int32_t groups = p.columns / p.group;
  for (int32_t index = threadIdx.x; index < groups_here * 16; index += kPackThreads) {
    const int32_t row_in_tile = index % 16;
    const int32_t group = slab * groups_here + index / 16;
    const int32_t row = LogicalRow(p, tile, row_in_tile);
    const bool real = row < p.rows && group < groups;
    uint8_t* constants = out + layout::kGpuSlabNibbleBytes + index / 16 * layout::kGpuGroupBytes;
    const int32_t place = row_in_tile % 8 * 2 + row_in_tile / 8;
    const half scale = real ? source.Scale(row, group) : __float2half(0.0f);
    source.Check(scale);
    reinterpret_cast<half*>(constants)[place] = scale;
    constants[32 + place] = real ? source.Zero(row, group) : 0;
  }
}

// One block a slab: fragments, [k-step][lane][register][2].
__global__ void __launch_bounds__(kPackThreads)
    PackDenseKernel(const __grid_constant__ PackW4Params p) {
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int32_t tile = blockIdx.x / slabs;
  const int32_t slab = blockIdx.x % slabs;
  auto* out = reinterpret_cast<Real16*>(p.slabs) + static_cast<int64_t>(blockIdx.x) * 2048;
  for (int32_t index = threadIdx.x; index < 2048; index += kPackThreads) {
    const int32_t ks = index / 256;
    const int32_t lane = index / 8 % 32;
    const int32_t element = index % 8;  // register = element / 2
    const int32_t row = LogicalRow(p, tile, lane / 4 + 8 * (element / 2 % 2));
    const int32_t k = slab * layout::kGpuSlabColumns +
                      layout::GpuKIndex(ks, lane % 4, element / 4 * 2 + element % 2, 128);
    const bool real = row < p.rows && k < p.columns;
    out[index] = real ? p.dense[static_cast<int64_t>(row) * p.columns + k] : Real16{0};
  }
}

__global__ void __launch_bounds__(kPackThreads)
    CheckFiniteKernel(const Real16* values, int64_t count, uint16_t exponent, int32_t* not_finite) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < count;
       i += stride) {
    if (!Finite(values[i].bits, exponent)) *not_finite = 1;
  }
}

uint32_t SlabCount(int32_t rows, int32_t columns) {
  return static_cast<uint32_t>(layout::GpuRowTiles(rows)) *
         static_cast<uint32_t>(layout::GpuSlabs(columns));
}

}  // namespace

int64_t W4DecodeBytes(int32_t rows, int32_t columns, int32_t group) {
  if (group != 0) return layout::GpuW4Bytes(rows, columns, group);
  constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;
  return static_cast<int64_t>(layout::GpuRowTiles(rows)) * layout::GpuSlabs(columns) *
         kDenseSlabBytes;
}

cudaError_t PackW4(const PackW4Params& params, cudaStream_t stream) {
  if (params.group != 0 && params.columns % params.group != 0) return cudaErrorInvalidValue;
  const uint32_t blocks = SlabCount(params.rows, params.columns);
  if (params.group == 0) {
    PackDenseKernel<<<blocks, kPackThreads, 0, stream>>>(params);
  } else {
    PackQuantizedKernel<<<blocks, kPackThreads, 0, stream>>>(
        PackShape{params.rows, params.columns, params.group, params.pair_rows, params.slabs},
        LogicalSource{params.q, params.zeros, params.scales, params.columns,
                      params.columns / params.group});
  }
  return cudaGetLastError();
}

cudaError_t PackGemm(const PackGemmParams& params, cudaStream_t stream) {
  if (params.columns % params.group != 0) return cudaErrorInvalidValue;
  GemmSource source{.not_finite = params.not_finite};
  for (int32_t part = 0; part < kGemmPartsMax; ++part) source.parts[part] = params.parts[part];
  PackQuantizedKernel<<<SlabCount(params.rows, params.columns), kPackThreads, 0, stream>>>(
      PackShape{params.rows, params.columns, params.group, params.pair_rows, params.slabs}, source);
  return cudaGetLastError();
}

cudaError_t CheckFinite(const Real16* values, int64_t count, int32_t* not_finite,
                        const LaunchOptions& options) {
  constexpr uint32_t kBlocks = 1024;
  const uint16_t exponent = options.element == Element::kHalf ? kHalfExponent : kBfloat16Exponent;
  CheckFiniteKernel<<<kBlocks, kPackThreads, 0, options.stream>>>(values, count, exponent,
                                                                  not_finite);
  return cudaGetLastError();
}

}  // namespace nibble::cuda
