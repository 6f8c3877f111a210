// Flash attention with mma.m16n8k16 and cp.async (Ampere and later). A block has sixteen rows, a
// row being one (token, query head) of a sequence and KV head. Its warps take KV blocks of 16
// positions in turn, each through two stages of its own in shared memory, and meet at the end.
#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/attention_portable.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kWarps = 4;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kStages = 2;
constexpr float kNever = -1e30f;

// The block's rows: tokens of one sequence, `group` query heads each.
struct Rows {
  int32_t first_row, tokens, first_position, slot;
};

template <int32_t kD>
constexpr int32_t kPieceBytes = kKvBlockTokens* kD * 2;  // keys or values of a KV block and head
template <int32_t kD>
constexpr int32_t kSharedBytes = kWarps* kStages * 2 * kPieceBytes<kD>;

// No tokens: there is nothing to do.
__device__ __forceinline__ Rows RowsOfBlock(const AttentionParams& p, int32_t pieces_of_tile) {
  const int32_t tokens_max = AttentionTileTokens(p.heads, p.kv_heads);
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  if (index < p.unit_count) {
    const AttentionUnit& unit = p.units[index];
    const int32_t tokens = unit.part == 0 ? unit.tokens : 0;
    return {unit.first_row, tokens, unit.first_position, unit.slot};
  }
  const AttentionTile& tile = p.tiles[(index - p.unit_count) / pieces_of_tile];
  const int32_t first = (index - p.unit_count) % pieces_of_tile * tokens_max;
  return {tile.first_row + first, min(tile.tokens - first, tokens_max), tile.first_position + first,
          tile.slot};
}

__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int32_t kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// One warp's part: rows lane / 4 and the eighth behind it.
template <int32_t kD>
struct WarpState {
  uint32_t q[kD / 16][4];
  float out[kD / 8][4] = {};
  float max[2] = {kNever, kNever};
  float sum[2] = {0, 0};  // of this lane's positions
  int32_t position[2];
};

template <int32_t kD>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p, const Rows& rows,
                                            int32_t lane, WarpState<kD>* state) {
  const int32_t group = p.heads / p.kv_heads;
  const int32_t count = rows.tokens * group;
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    const int32_t row = min(lane / 4 + 8 * i, count - 1);
    const int32_t head = static_cast<int32_t>(blockIdx.y) * group + row % group;
    state->position[i] = rows.first_position + row / group;
    const Real16* q = p.q + (rows.first_row + row / group) * p.q_stride + head * kD + lane % 4 * 2;
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      state->q[step][i] = *reinterpret_cast<const uint32_t*>(q + step * 16);
      state->q[step][2 + i] = *reinterpret_cast<const uint32_t*>(q + step * 16 + 8);
    }
  }
}

// Keys and values of a KV block into a warp's stage.
template <int32_t kD>
__device__ __forceinline__ void CopyBlock(const AttentionParams& p, const Rows& rows, int32_t block,
                                          int32_t lane, uint32_t stage) {
  const int64_t id = p.block_tables[static_cast<int64_t>(rows.slot) * p.table_size + block];
  const int64_t at = (id * p.kv_heads + blockIdx.y) * (kPieceBytes<kD> / 2);
#pragma unroll
  for (int32_t byte = 0; byte < kPieceBytes<kD>; byte += 512) {
    const int32_t here = byte + lane * 16;
    if (here < kPieceBytes<kD>) {
      CopyAsync16(stage + here, p.cache.keys + at + here / 2);
      CopyAsync16(stage + kPieceBytes<kD> + here, p.cache.values + at + here / 2);
    }
  }
}

// Values behind the last position are somebody else's: a weight of zero does not hide a NaN.
template <int32_t kD>
__device__ __forceinline__ void ClearValuesBehind(int32_t last, uint8_t* values, int32_t lane) {
  for (int32_t i = lane; i < kKvBlockTokens * (kD / 8); i += 32) {
    if (i / (kD / 8) <= last) continue;
    const int32_t at = 2 * KvOffset(i / (kD / 8), i % (kD / 8) * 8, kD);
    *reinterpret_cast<uint4*>(values + at) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

template <int32_t kD>
__device__ __forceinline__ void Scores(const WarpState<kD>& state, uint32_t keys, int32_t lane,
                                       float (&s)[2][4]) {
#pragma unroll
  for (int32_t step = 0; step < kD / 16; ++step) {
    const int32_t position = lane / 16 * 8 + lane % 8;
    const int32_t element = step * 16 + lane / 8 % 2 * 8;
    uint32_t b[4];
    LoadMatrices(keys + 2 * KvOffset(position, element, kD), b);
    Mma(s[0], state.q[step], b[0], b[1]);
    Mma(s[1], state.q[step], b[2], b[3]);
  }
}

// Takes the scores of 16 positions into the maxima and sums; leaves the weights in `a`.
template <int32_t kD>
__device__ __forceinline__ void Softmax(const AttentionParams& p, int32_t first_key, int32_t lane,
                                        float (&s)[2][4], WarpState<kD>* state, uint32_t (&a)[4]) {
  const float to_base_2 = p.scale * 1.4426950408889634f;
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    bool seen[2][2];
    float most = kNever;
#pragma unroll
    for (int32_t t = 0; t < 2; ++t) {
#pragma unroll
      for (int32_t j = 0; j < 2; ++j) {
        const int32_t key = first_key + 8 * t + lane % 4 * 2 + j;
        seen[t][j] =
            key <= state->position[i] && (p.window == 0 || key > state->position[i] - p.window);
        float& score = s[t][2 * i + j];
        score *= to_base_2;
        if (seen[t][j]) most = fmaxf(most, score);
      }
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float max = fmaxf(state->max[i], most);
    const float keep = exp2f(state->max[i] - max);
    state->max[i] = max;
    state->sum[i] *= keep;
#pragma unroll
    for (int32_t n = 0; n < kD / 8; ++n) {
      state->out[n][2 * i] *= keep;
      state->out[n][2 * i + 1] *= keep;
    }
#pragma unroll
    for (int32_t t = 0; t < 2; ++t) {
#pragma unroll
      for (int32_t j = 0; j < 2; ++j) {
        float& weight = s[t][2 * i + j];
        weight = seen[t][j] ? exp2f(weight - max) : 0.0f;
        state->sum[i] += weight;
      }
      a[2 * t + i] = RealBits(s[t][2 * i], s[t][2 * i + 1]);
    }
  }
}

template <int32_t kD>
__device__ __forceinline__ void AddValues(uint32_t values, int32_t lane, const uint32_t (&a)[4],
                                          WarpState<kD>* state) {
#pragma unroll
  for (int32_t n = 0; n < kD / 16; ++n) {
    const int32_t position = lane / 8 % 2 * 8 + lane % 8;
    uint32_t b[4];
    LoadTransposed(values + 2 * KvOffset(position, n * 16 + lane / 16 * 8, kD), b);
    Mma(state->out[2 * n], a, b[0], b[1]);
    Mma(state->out[2 * n + 1], a, b[2], b[3]);
  }
}

// The warps' parts into one result. Shared memory: maxima and sums of every warp's rows, then
// their outputs.
template <int32_t kD>
__device__ void Meet(const AttentionParams& p, const Rows& rows, const WarpState<kD>& state,
                     uint8_t* shared) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* max = reinterpret_cast<float*>(shared);
  float* sum = max + kWarps * 16;
  float* out = sum + kWarps * 16;
  __syncthreads();  // the stages are free
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    const int32_t row = warp * 16 + lane / 4 + 8 * i;
    float all = state.sum[i];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    if (lane % 4 == 0) {
      max[row] = state.max[i];
      sum[row] = all;
    }
#pragma unroll
    for (int32_t n = 0; n < kD / 8; ++n) {
      float* to = out + row * kD + n * 8 + lane % 4 * 2;
      to[0] = state.out[n][2 * i];
      to[1] = state.out[n][2 * i + 1];
    }
  }
  __syncthreads();
  const int32_t group = p.heads / p.kv_heads;
  for (int32_t at = threadIdx.x; at < rows.tokens * group * kD; at += kThreads) {
    const int32_t row = at / kD, element = at % kD;
    float most = kNever;
    for (int32_t w = 0; w < kWarps; ++w) most = fmaxf(most, max[w * 16 + row]);
    float value = 0, weight = 0;
    for (int32_t w = 0; w < kWarps; ++w) {
      const float factor = exp2f(max[w * 16 + row] - most);
      value += factor * out[(w * 16 + row) * kD + element];
      weight += factor * sum[w * 16 + row];
    }
    const int64_t token = rows.first_row + row / group;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * group + row % group;
    p.out[(token * p.heads + head) * kD + element] = ToReal(value / weight);
  }
}

template <int32_t kD>
__global__ void __launch_bounds__(kThreads)
    PortableKernel(const __grid_constant__ AttentionParams p, int32_t pieces_of_tile) {
  extern __shared__ __align__(128) uint8_t shared[];
  const Rows rows = RowsOfBlock(p, pieces_of_tile);
  if (rows.tokens <= 0) return;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpState<kD> state;
  LoadQueries<kD>(p, rows, lane, &state);
  const int32_t last = rows.first_position + rows.tokens - 1;
  const int32_t end = last / kKvBlockTokens + 1;
  const int32_t first_seen = p.window == 0 ? 0 : max(0, rows.first_position - p.window + 1);
  uint8_t* stages = shared + warp * kStages * 2 * kPieceBytes<kD>;
  int32_t stage = 0;
  int32_t block = first_seen / kKvBlockTokens + warp;
  if (block < end) CopyBlock<kD>(p, rows, block, lane, SharedAddress(stages));
  CommitCopies();
  for (; block < end; block += kWarps) {
    uint8_t* here = stages + stage * 2 * kPieceBytes<kD>;
    stage ^= 1;
    if (block + kWarps < end) {
      CopyBlock<kD>(p, rows, block + kWarps, lane,
                    SharedAddress(stages + stage * 2 * kPieceBytes<kD>));
    }
    CommitCopies();
    WaitForCopies<1>();
    __syncwarp();
    if (block + 1 == end) {
      ClearValuesBehind<kD>(last % kKvBlockTokens, here + kPieceBytes<kD>, lane);
    }
    float s[2][4] = {};
    uint32_t weights[4];
    Scores<kD>(state, SharedAddress(here), lane, s);
    Softmax<kD>(p, block * kKvBlockTokens, lane, s, &state, weights);
    AddValues<kD>(SharedAddress(here + kPieceBytes<kD>), lane, weights, &state);
    __syncwarp();  // before the stage is written again
  }
  Meet<kD>(p, rows, state, shared);
}

template <int32_t kD>
cudaError_t Launch(const AttentionParams& params, cudaStream_t stream) {
  // What the meeting of the warps needs is more than the stages of small heads.
  constexpr int32_t kMeeting = (2 * kWarps * 16 + kWarps * 16 * kD) * 4;
  constexpr int32_t kBytes = kMeeting > kSharedBytes<kD> ? kMeeting : kSharedBytes<kD>;
  const cudaError_t error =
      cudaFuncSetAttribute(PortableKernel<kD>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int32_t tokens = AttentionTileTokens(params.heads, params.kv_heads);
  const int32_t pieces =
      (AttentionPromptTokens(params.heads, params.kv_heads) + tokens - 1) / tokens;
  const int32_t blocks = params.unit_count + params.tile_count * pieces;
  if (blocks == 0) return cudaSuccess;
  PortableKernel<kD><<<dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(params.kv_heads)),
                       kThreads, kBytes, stream>>>(params, pieces);
  return cudaGetLastError();
}

}  // namespace

cudaError_t AttentionPortable(const AttentionParams& params, const LaunchOptions& options) {
  switch (params.head_dim) {
    case 16:
      return Launch<16>(params, options.stream);
    case 32:
      return Launch<32>(params, options.stream);
    case 64:
      return Launch<64>(params, options.stream);
    case 128:
      return Launch<128>(params, options.stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
