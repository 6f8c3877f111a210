// Flash attention for prompts: a block takes up to 128 rows of one sequence and KV head, a row
// being one (token, query head). A producer warp brings keys and values, 128 positions at a time,
// through two stages of shared memory each; two warpgroups of 64 rows each compute, and each has
// its next scores in flight while it takes the exponentials of the last.
#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/attention_prompt.cuh"
#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kGroups = 2;  // warpgroups that compute
constexpr int32_t kConsumers = kGroups * 128;
constexpr int32_t kThreads = kConsumers + 128;
constexpr int32_t kKeys = 128;  // positions of a stage
constexpr int32_t kStageBlocks = kKeys / kKvBlockTokens;
constexpr int32_t kStages = 2;
constexpr int32_t kPanelBytes = 1024;  // eight rows of 128 bytes

template <int32_t kD>
struct Layout {
  static constexpr int32_t kTileBytes = kKvBlockTokens * kD * 2;  // a KV block's keys or values
  static constexpr int32_t kStageBytes = kStageBlocks * kTileBytes;
  static constexpr int32_t kEightRows = kPanelBytes * (kD / 64);
  static constexpr int32_t kQueryBytes = kAttentionPromptRows * kD * 2;
  static constexpr int32_t kKeysAt = kQueryBytes;
  static constexpr int32_t kValuesAt = kKeysAt + kStages * kStageBytes;
  static constexpr int32_t kBarsAt = kValuesAt + kStages * kStageBytes;
  static constexpr int32_t kBytes = kBarsAt + 4 * kStages * 8;

  // The place of eight elements of a row, counted from eight-row groups on.
  static __device__ __forceinline__ int32_t ChunkAt(int32_t row, int32_t chunk) {
    return row / 8 * kEightRows + chunk / 8 * kPanelBytes +
           KvSwizzle(row % 8 * 128 + chunk % 8 * 16, 128);
  }
};

struct Barriers {
  uint64_t *keys_full, *keys_free, *values_full, *values_free;
  __device__ __forceinline__ explicit Barriers(uint8_t* memory) {
    keys_full = reinterpret_cast<uint64_t*>(memory);
    keys_free = keys_full + kStages;
    values_full = keys_free + kStages;
    values_free = values_full + kStages;
  }
  __device__ __forceinline__ void Init() const {
    for (int32_t i = 0; i < kStages; ++i) {
      BarrierInit(keys_full + i, 1);
      BarrierInit(values_full + i, 1);
      BarrierInit(keys_free + i, kConsumers / 32);
      BarrierInit(values_free + i, kConsumers / 32);
    }
    FenceBarrierInit();
  }
};

struct Work {
  AttentionTile tile;
  int32_t group, kv_head;
  int32_t rows;
  int32_t last;         // position of the last token
  int32_t first_block;  // KV blocks [first_block, end_block) are read
  int32_t end_block;
  int32_t begin, end;  // stages of 128 positions

  __device__ __forceinline__ explicit Work(const AttentionParams& p) {
    // Head by head, so that what runs together reads the same keys; tiles come longest first.
    const auto index = static_cast<int32_t>(blockIdx.x);
    kv_head = index / p.tile_count;
    tile = p.tiles[index - kv_head * p.tile_count];
    group = p.heads / p.kv_heads;
    rows = tile.tokens * group;
    last = tile.first_position + tile.tokens - 1;
    const int32_t first_seen = p.window > 0 ? max(0, tile.first_position - p.window + 1) : 0;
    first_block = first_seen / kKvBlockTokens;
    end_block = last / kKvBlockTokens + 1;
    begin = first_seen / kKeys;
    end = last / kKeys + 1;
  }
  // Whether a row must not see some position of a stage.
  [[nodiscard]] __device__ __forceinline__ bool Masked(const AttentionParams& p,
                                                       int32_t stage) const {
    return (stage + 1) * kKeys - 1 > tile.first_position ||
           (p.window > 0 && stage * kKeys <= last - p.window);
  }
};

// One warp: lane i < 8 sees to block i of every stage.
template <int32_t kD>
__device__ __forceinline__ void Produce(const AttentionParams& p, const Work& work, uint8_t* memory,
                                        const Barriers& bars, int32_t lane) {
  using L = Layout<kD>;
  const uint64_t policy = EvictNormalPolicy();
  const int32_t* table = p.block_tables + static_cast<int64_t>(work.tile.slot) * p.table_size;
  const auto exists = [&](int32_t block) {
    return lane < kStageBlocks && block >= work.first_block && block < work.end_block;
  };
  int32_t block = work.begin * kStageBlocks + lane;
  int32_t entry = exists(block) ? table[block] : 0;
  for (int32_t stage = work.begin; stage < work.end; ++stage, block += kStageBlocks) {
    const int32_t count = stage - work.begin;
    const int32_t slot = count % kStages;
    const uint32_t free_phase = (count / kStages & 1) ^ 1;
    const bool copies = exists(block);
    const int32_t bytes = __popc(__ballot_sync(0xffffffffu, copies)) * L::kTileBytes;
    const int64_t at =
        (static_cast<int64_t>(entry) * p.kv_heads + work.kv_head) * (L::kTileBytes / 2);
    entry = exists(block + kStageBlocks) ? table[block + kStageBlocks] : 0;
    const int32_t to = slot * L::kStageBytes + lane * L::kTileBytes;
    BarrierWait(bars.keys_free + slot, free_phase);
    if (lane == 0) BarrierExpect(bars.keys_full + slot, bytes);
    __syncwarp();
    if (copies) {
      BulkCopy(memory + L::kKeysAt + to, p.cache.keys + at, L::kTileBytes, bars.keys_full + slot,
               policy);
    }
    BarrierWait(bars.values_free + slot, free_phase);
    if (lane == 0) BarrierExpect(bars.values_full + slot, bytes);
    __syncwarp();
    if (copies) {
      BulkCopy(memory + L::kValuesAt + to, p.cache.values + at, L::kTileBytes,
               bars.values_full + slot, policy);
    }
  }
}

// A warpgroup's 64 rows of queries into shared memory, zero where there are none.
template <int32_t kD>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p, const Work& work,
                                            uint8_t* queries, int32_t warpgroup, int32_t thread) {
  constexpr int32_t kChunks = kD / 8;
#pragma unroll
  for (int32_t i = 0; i < 64 * kChunks / 128; ++i) {
    const int32_t row = (thread + i * 128) / kChunks, chunk = thread % kChunks;
    const int32_t in_tile = warpgroup * 64 + row;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (in_tile < work.rows) {
      const int32_t token = in_tile / work.group;
      const int32_t head = work.kv_head * work.group + in_tile - token * work.group;
      eight = *reinterpret_cast<const uint4*>(p.q + (work.tile.first_row + token) * p.q_stride +
                                              head * kD + chunk * 8);
    }
    *reinterpret_cast<uint4*>(queries + Layout<kD>::ChunkAt(row, chunk)) = eight;
  }
}

// Values that no row may see but whose weights, zero, they would be multiplied by: positions of the
// stage outside [from, to). They hold anything, NaN even.
template <int32_t kD>
__device__ __forceinline__ void ZeroValues(uint8_t* values, int32_t from, int32_t to) {
  constexpr int32_t kChunks = kD / 8;
  for (int32_t i = threadIdx.x; i < kKeys * kChunks; i += kConsumers) {
    const int32_t row = i / kChunks;
    if (row >= from && row < to) continue;
    *reinterpret_cast<uint4*>(values + Layout<kD>::ChunkAt(row, i % kChunks)) =
        make_uint4(0, 0, 0, 0);
  }
  FenceSharedForCopies();
  NamedBarrier(1, kConsumers);
}

// A warpgroup's 64 rows; lane l of a warp has rows l / 4 and l / 4 + 8 of the warp's sixteen, and
// of every eight columns 2 (l % 4) and the next.
template <int32_t kD>
struct Rows {
  float out[kD / 2];
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  int32_t position[2];
};

template <int32_t kD>
__device__ __forceinline__ void IssueScores(uint32_t queries, uint32_t keys, Rows<kD>* rows) {
  constexpr int32_t kApart = Layout<kD>::kEightRows;
#pragma unroll
  for (int32_t step = 0; step < kD / 16; ++step) {
    const int32_t at = step / 4 * kPanelBytes + step % 4 * 32;
    GroupScores(rows->scores, MatrixOf(queries + at, kApart, 16), MatrixOf(keys + at, kApart, 16),
                step > 0);
  }
  WarpgroupCommit();
}

template <int32_t kD>
__device__ __forceinline__ void IssueValues(uint32_t values, Rows<kD>* rows) {
#pragma unroll
  for (int32_t step = 0; step < kKeys / 16; ++step) {
    WarpgroupMma<kD>::template Add<true>(
        rows->out, rows->weights[step],
        MatrixOf(values + step * Layout<kD>::kTileBytes, Layout<kD>::kEightRows, kPanelBytes));
  }
  WarpgroupCommit();
}

// Hides positions that a row must not see.
template <int32_t kD>
__device__ __forceinline__ void Mask(int32_t window, int32_t first_key, int32_t lane,
                                     Rows<kD>* rows) {
#pragma unroll
  for (int32_t i = 0; i < kKeys / 2; ++i) {
    const int32_t key = first_key + i / 4 * 8 + 2 * (lane % 4) + i % 2;
    const int32_t position = rows->position[i / 2 % 2];
    if (key > position || (window > 0 && key <= position - window)) rows->scores[i] = -INFINITY;
  }
}

// Scores become weights relative to the running maxima. Returns what earlier sums and outputs are
// to be multiplied by.
template <int32_t kD>
__device__ __forceinline__ float2 Exponentials(float to_base_2, Rows<kD>* rows) {
  float keep[2];
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    float most = rows->max[upper];
#pragma unroll
    for (int32_t i = 0; i < kKeys / 4; ++i) {
      most = fmaxf(most, rows->scores[i / 2 * 4 + 2 * upper + i % 2]);
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    // A row that has seen nothing yet: its weights are zero, not NaN.
    const float base = most == -INFINITY ? 0.0f : most * to_base_2;
    keep[upper] = Exp2(rows->max[upper] * to_base_2 - base);
    rows->max[upper] = most;
    float sum[2] = {0, 0};
#pragma unroll
    for (int32_t i = 0; i < kKeys / 4; ++i) {
      float& score = rows->scores[i / 2 * 4 + 2 * upper + i % 2];
      score = Exp2(fmaf(score, to_base_2, -base));
      sum[i % 2] += score;
    }
    rows->sum[upper] = rows->sum[upper] * keep[upper] + (sum[0] + sum[1]);
  }
  return make_float2(keep[0], keep[1]);
}

// Weights as the next product's input; its last one has ended.
template <int32_t kD>
__device__ __forceinline__ void PackWeights(Rows<kD>* rows) {
#pragma unroll
  for (int32_t i = 0; i < kKeys / 4; ++i) {
    rows->weights[i / 4][i % 4] = RealBits(rows->scores[2 * i], rows->scores[2 * i + 1]);
  }
}

// A warpgroup's walk over the stages.
template <int32_t kD>
struct Walk {
  using L = Layout<kD>;
  const AttentionParams& p;
  const Work& work;
  const Barriers& bars;
  uint8_t* memory;
  uint32_t queries;
  float to_base_2;
  int32_t lane;

  [[nodiscard]] __device__ __forceinline__ int32_t Slot(int32_t stage) const {
    return (stage - work.begin) % kStages;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t Phase(int32_t stage) const {
    return (stage - work.begin) / kStages & 1;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t WaitForKeys(int32_t stage) const {
    BarrierWait(bars.keys_full + Slot(stage), Phase(stage));
    return SharedAddress(memory + L::kKeysAt + Slot(stage) * L::kStageBytes);
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t WaitForValues(int32_t stage) const {
    BarrierWait(bars.values_full + Slot(stage), Phase(stage));
    uint8_t* values = memory + L::kValuesAt + Slot(stage) * L::kStageBytes;
    const int32_t from = max(0, work.first_block * kKvBlockTokens - stage * kKeys);
    const int32_t to = min(kKeys, work.last + 1 - stage * kKeys);
    if (from > 0 || to < kKeys) ZeroValues<kD>(values, from, to);
    return SharedAddress(values);
  }
  __device__ __forceinline__ void Free(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) BarrierArrive(barrier);
  }

  __device__ __forceinline__ void First(Rows<kD>* rows) const {
    const uint32_t keys = WaitForKeys(work.begin);
    WarpgroupFence();
    IssueScores<kD>(queries, keys, rows);
    WarpgroupWait<0>();
    PinRegisters(rows->scores);
    Free(bars.keys_free + Slot(work.begin));
    if (work.Masked(p, work.begin)) Mask<kD>(p.window, work.begin * kKeys, lane, rows);
    static_cast<void>(Exponentials<kD>(to_base_2, rows));
    PackWeights<kD>(rows);
  }
  // Scores of a stage while the values of the one before are added.
  template <bool kMasked>
  __device__ __forceinline__ void Next(int32_t stage, Rows<kD>* rows) const {
    const uint32_t keys = WaitForKeys(stage);
    const uint32_t values = WaitForValues(stage - 1);
    PinRegisters(rows->scores);
    PinRegisters(rows->out);
    WarpgroupFence();
    IssueScores<kD>(queries, keys, rows);
    IssueValues<kD>(values, rows);
    WarpgroupWait<1>();
    PinRegisters(rows->scores);
    Free(bars.keys_free + Slot(stage));
    if constexpr (kMasked) Mask<kD>(p.window, stage * kKeys, lane, rows);
    const float2 keep = Exponentials<kD>(to_base_2, rows);
    WarpgroupWait<0>();
    PinRegisters(rows->out);
    PinRegisters(rows->scores);  // not packed before: the product has read its weights only now
    Free(bars.values_free + Slot(stage - 1));
#pragma unroll
    for (int32_t i = 0; i < kD / 2; ++i) rows->out[i] *= i / 2 % 2 == 0 ? keep.x : keep.y;
    PackWeights<kD>(rows);
  }
  __device__ __forceinline__ void Last(Rows<kD>* rows) const {
    const uint32_t values = WaitForValues(work.end - 1);
    PinRegisters(rows->out);
    WarpgroupFence();
    IssueValues<kD>(values, rows);
    WarpgroupWait<0>();
    PinRegisters(rows->out);
  }
};

// Chunk `chunk` of a head's as the next product takes them: pairs from four places.
template <int32_t kD>
__device__ __forceinline__ void WriteOrdered(const AttentionParams& p, int32_t token, int32_t head,
                                             int32_t chunk, const uint8_t* results, int32_t row) {
  uint32_t pairs[4];
#pragma unroll
  for (int32_t c = 0; c < 4; ++c) {
    const int32_t k = layout::GpuKIndex(chunk / 2, c, chunk % 2 * 2, p.ordered_group);
    pairs[c] =
        *reinterpret_cast<const uint32_t*>(results + Layout<kD>::ChunkAt(row, k / 8) + k % 8 * 2);
  }
  const int32_t first = layout::GpuKIndex(chunk / 2, 0, chunk % 2 * 2, p.ordered_group);
  const int64_t at =
      layout::GpuOrderedIndex(token, head * kD + first, p.ordered_group, p.ordered_tokens);
  *reinterpret_cast<uint4*>(p.ordered + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Results by way of the warpgroup's queries, which nobody needs any more: 16 bytes a thread.
template <int32_t kD>
__device__ __forceinline__ void WriteOut(const AttentionParams& p, const Work& work,
                                         const Rows<kD>& rows, uint8_t* queries, int32_t warpgroup,
                                         int32_t thread) {
  const int32_t lane = thread % 32;
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    float sum = rows.sum[upper];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = 1.0f / sum;
    const int32_t row = thread / 32 * 16 + upper * 8 + lane / 4;
#pragma unroll
    for (int32_t chunk = 0; chunk < kD / 8; ++chunk) {
      const Real16x2 pair = ToReals(rows.out[chunk * 4 + 2 * upper] * inverse,
                                    rows.out[chunk * 4 + 2 * upper + 1] * inverse);
      *reinterpret_cast<Real16x2*>(queries + Layout<kD>::ChunkAt(row, chunk) + lane % 4 * 4) = pair;
    }
  }
  NamedBarrier(2 + warpgroup, 128);
  constexpr int32_t kChunks = kD / 8;
#pragma unroll
  for (int32_t i = 0; i < 64 * kChunks / 128; ++i) {
    const int32_t row = (thread + i * 128) / kChunks, chunk = thread % kChunks;
    const int32_t in_tile = warpgroup * 64 + row;
    if (in_tile >= work.rows) continue;
    const int32_t token = in_tile / work.group;
    const int32_t head = work.kv_head * work.group + in_tile - token * work.group;
    if (p.ordered != nullptr) {
      WriteOrdered<kD>(p, work.tile.first_row + token, head, chunk, queries, row);
      continue;
    }
    const int64_t at = static_cast<int64_t>(work.tile.first_row + token) * p.heads + head;
    *reinterpret_cast<uint4*>(p.out + at * kD + chunk * 8) =
        *reinterpret_cast<const uint4*>(queries + Layout<kD>::ChunkAt(row, chunk));
  }
}

template <int32_t kD>
__device__ __forceinline__ void Consume(const AttentionParams& p, const Work& work, uint8_t* memory,
                                        const Barriers& bars) {
  const int32_t warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  uint8_t* queries = memory + warpgroup * 64 * kD * 2;
  LoadQueries<kD>(p, work, queries, warpgroup, thread);
  FenceSharedForCopies();
  NamedBarrier(2 + warpgroup, 128);
  Rows<kD> rows;
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    const int32_t row = warpgroup * 64 + thread / 32 * 16 + upper * 8 + thread % 32 / 4;
    rows.position[upper] = work.tile.first_position + min(row, work.rows - 1) / work.group;
  }
#pragma unroll
  for (float& value : rows.out) value = 0;
  const Walk<kD> walk{.p = p,
                      .work = work,
                      .bars = bars,
                      .memory = memory,
                      .queries = SharedAddress(queries),
                      .to_base_2 = p.scale * 1.4426950408889634f,
                      .lane = thread % 32};
  walk.First(&rows);
  for (int32_t stage = work.begin + 1; stage < work.end; ++stage) {
    if (work.Masked(p, stage)) {
      walk.template Next<true>(stage, &rows);
    } else {
      walk.template Next<false>(stage, &rows);
    }
  }
  walk.Last(&rows);
  WriteOut<kD>(p, work, rows, queries, warpgroup, thread);
}

template <int32_t kD>
__global__ void __launch_bounds__(kThreads, 1)
    AttendPromptKernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Barriers bars(memory + Layout<kD>::kBarsAt);
  if (threadIdx.x == 0) bars.Init();
  __syncthreads();
  WaitForPreviousKernel();
  LetNextKernelStart();
  const Work work(p);
  if (threadIdx.x >= kConsumers) {
    GiveRegisters<24>();
    if (threadIdx.x < kConsumers + 32) Produce<kD>(p, work, memory, bars, threadIdx.x % 32);
  } else {
    TakeRegisters<240>();
    Consume<kD>(p, work, memory, bars);
  }
}

template <int32_t kD>
cudaError_t Launch(const AttentionParams& params, const LaunchOptions& options) {
  const auto kernel = AttendPromptKernel<kD>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kD>::kBytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(kernel,
                      {.grid = dim3(static_cast<uint32_t>(params.tile_count * params.kv_heads)),
                       .block = dim3(kThreads),
                       .shared_bytes = Layout<kD>::kBytes,
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

}  // namespace

cudaError_t AttendPrompt(const AttentionParams& params, const LaunchOptions& options) {
  switch (params.head_dim) {
    case 64:
      return Launch<64>(params, options);
    case 128:
      return Launch<128>(params, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
