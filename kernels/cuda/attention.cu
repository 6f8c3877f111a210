#include "kernels/cuda/attention.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kWarps = 4;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kBlockTokens = 16;
constexpr float kNever = -1e30f;  // below every score; finite, so that differences stay numbers

// The order of head_dim inside a fragment is free as long as queries and keys share it: lane column
// c holds eight elements side by side for every two k-steps, so that keys load as 16-byte vectors.
template <int32_t kD>
struct Fragment {
  // First of the four elements of lane column c at a k-step.
  static __device__ __forceinline__ int32_t Element(int32_t step, int32_t c) {
    if constexpr (kD == 16) return 4 * c;
    return step / 2 * 32 + 8 * c + step % 2 * 4;
  }
};

// What a block works on.
struct Work {
  AttentionTile tile;
  int32_t group;  // query heads of a KV head
  int32_t kv_head;
  int32_t rows;  // of the tile that exist
  int32_t last;  // position of the tile's last token
  int32_t begin_block, end_block;
  int32_t splits;  // that have work: short sequences are not worth a meeting
};

__device__ __forceinline__ Work MakeWork(const AttentionParams& p) {
  Work work;
  work.tile = p.tiles[blockIdx.x];
  work.group = p.heads / p.kv_heads;
  work.kv_head = static_cast<int32_t>(blockIdx.y);
  work.rows = work.tile.tokens * work.group;
  work.last = work.tile.first_position + work.tile.tokens - 1;
  const int32_t first_seen = p.window > 0 ? max(0, work.tile.first_position - p.window + 1) : 0;
  const int32_t begin = first_seen / kBlockTokens;
  const int32_t count = work.last / kBlockTokens + 1 - begin;
  work.splits = min(p.splits, (count + kWarps - 1) / kWarps);
  const int32_t share = (count + work.splits - 1) / work.splits;
  work.splits = (count + share - 1) / share;
  work.begin_block = begin + share * static_cast<int32_t>(blockIdx.z);
  work.end_block = min(begin + count, work.begin_block + share);
  return work;
}

template <int32_t kD>
struct RowState {
  float out[kD / 8][4];  // accumulator tiles: rows r, r + 8
  float max[2];
  float sum[2];
};

template <int32_t kD>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p, const Work& work,
                                            int32_t lane, uint32_t (&q)[kD / 16][4]) {
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    const int32_t row = lane / 4 + 8 * upper;
    const bool exists = row < work.rows;
    const int32_t token = exists ? row / work.group : 0;
    const int32_t head = work.kv_head * work.group + (exists ? row % work.group : 0);
    const half* source = p.q + (work.tile.first_row + token) * p.q_stride + head * kD;
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      const uint2 four =
          *reinterpret_cast<const uint2*>(source + Fragment<kD>::Element(step, lane % 4));
      q[step][upper] = exists ? four.x : 0;
      q[step][2 + upper] = exists ? four.y : 0;
    }
  }
}

// Keys and values of one KV block and head, as fragments.
template <int32_t kD>
struct KvFragments {
  // Column n of key tile t is position 4 * (n / 2) + 2 * t + n % 2: then a lane's scores are of
  // four positions side by side, as its values are.
  uint2 keys[2][kD / 16];
  uint2 values[kD / 8];

  static __device__ __forceinline__ int32_t KeyPosition(int32_t t, int32_t lane) {
    return lane / 8 * 4 + 2 * t + lane / 4 % 2;
  }
  __device__ __forceinline__ void Load(const KvLayer& cache, int64_t at, int32_t lane) {
#pragma unroll
    for (int32_t t = 0; t < 2; ++t) {
      const half* key = cache.keys + at + KeyPosition(t, lane) * kD;
      if constexpr (kD == 16) {
        keys[t][0] = *reinterpret_cast<const uint2*>(key + 4 * (lane % 4));
      } else {
#pragma unroll
        for (int32_t pair = 0; pair < kD / 32; ++pair) {
          const uint4 eight = *reinterpret_cast<const uint4*>(key + pair * 32 + 8 * (lane % 4));
          keys[t][2 * pair] = make_uint2(eight.x, eight.y);
          keys[t][2 * pair + 1] = make_uint2(eight.z, eight.w);
        }
      }
    }
#pragma unroll
    for (int32_t column = 0; column < kD / 8; ++column) {
      values[column] = *reinterpret_cast<const uint2*>(
          cache.values + at + (column * 8 + lane / 4) * kBlockTokens + 4 * (lane % 4));
    }
  }
};

// Scores of the tile's rows against the 16 positions of a KV block.
template <int32_t kD>
__device__ __forceinline__ void Scores(const KvFragments<kD>& kv, const uint32_t (&q)[kD / 16][4],
                                       float (&s)[2][4]) {
#pragma unroll
  for (int32_t t = 0; t < 2; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) s[t][i] = 0;
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      MmaF16(s[t], q[step], kv.keys[t][step].x, kv.keys[t][step].y);
    }
  }
}

// Hides positions that a row must not see and takes the scores into the running maximum and sum.
template <int32_t kD>
__device__ __forceinline__ void Softmax(const AttentionParams& p, const Work& work,
                                        int32_t first_key, int32_t lane, float (&s)[2][4],
                                        RowState<kD>* state) {
  const float to_base_2 = p.scale * 1.4426950408889634f;
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    const int32_t row = lane / 4 + 8 * upper;
    const int32_t position = work.tile.first_position + min(row, work.rows - 1) / work.group;
    float most = kNever;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t key = first_key + 4 * (lane % 4) + i;
      float& score = s[i / 2][2 * upper + i % 2];
      const bool seen = key <= position && (p.window == 0 || key > position - p.window);
      score = seen ? score * to_base_2 : kNever;
      most = fmaxf(most, score);
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float max = fmaxf(state->max[upper], most);
    const float keep = exp2f(state->max[upper] - max);
    state->max[upper] = max;
    float sum = 0;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      float& score = s[i / 2][2 * upper + i % 2];
      // NaN stays NaN: it must reach this sequence's logits.
      score = score <= kNever ? 0.0f : exp2f(score - max);
      sum += score;
    }
    state->sum[upper] = state->sum[upper] * keep + sum;
#pragma unroll
    for (int32_t column = 0; column < kD / 8; ++column) {
      state->out[column][2 * upper] *= keep;
      state->out[column][2 * upper + 1] *= keep;
    }
  }
}

__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Positions of a KV block past the sequence's end hold what an earlier sequence left there.
__device__ __forceinline__ uint2 KeepFirst(uint2 four, int32_t count) {
  if (count < 4) four.y &= count == 3 ? 0x0000ffffu : 0u;
  if (count < 2) four.x &= count == 1 ? 0x0000ffffu : 0u;
  return four;
}

template <int32_t kD>
__device__ __forceinline__ void AddValues(const KvFragments<kD>& kv, int32_t lane, int32_t valid,
                                          const float (&s)[2][4], RowState<kD>* state) {
  const uint32_t p[4] = {PackHalves(s[0][0], s[0][1]), PackHalves(s[0][2], s[0][3]),
                         PackHalves(s[1][0], s[1][1]), PackHalves(s[1][2], s[1][3])};
  const int32_t first = 4 * (lane % 4);
#pragma unroll
  for (int32_t column = 0; column < kD / 8; ++column) {
    uint2 four = kv.values[column];
    if (valid < kBlockTokens) four = KeepFirst(four, max(0, valid - first));
    MmaF16(state->out[column], p, four.x, four.y);
  }
}

// One part's rows: out [16][kD], then max [16], then sum [16].
template <int32_t kD>
constexpr int32_t kPartFloats = kAttentionRows*(kD + 2);

template <int32_t kD>
__device__ __forceinline__ void StorePart(const RowState<kD>& state, int32_t lane, float* part) {
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    const int32_t row = lane / 4 + 8 * upper;
#pragma unroll
    for (int32_t column = 0; column < kD / 8; ++column) {
      *reinterpret_cast<float2*>(part + row * kD + column * 8 + lane % 4 * 2) =
          make_float2(state.out[column][2 * upper], state.out[column][2 * upper + 1]);
    }
    if (lane % 4 == 0) {
      part[kAttentionRows * kD + row] = state.max[upper];
      part[kAttentionRows * (kD + 1) + row] = state.sum[upper];
    }
  }
}

struct Merged {
  float max = kNever;
  float sum = 0;
};

// One output element over the parts, in their order: not divided by the sum yet.
template <int32_t kD>
__device__ __forceinline__ float MergeParts(const float* parts, int32_t count, int32_t row,
                                            int32_t column, Merged* merged) {
  for (int32_t i = 0; i < count; ++i) {
    merged->max = fmaxf(merged->max, parts[i * kPartFloats<kD> + kAttentionRows * kD + row]);
  }
  float out = 0;
  for (int32_t i = 0; i < count; ++i) {
    const float* part = parts + i * kPartFloats<kD>;
    const float weight = exp2f(part[kAttentionRows * kD + row] - merged->max);
    merged->sum += weight * part[kAttentionRows * (kD + 1) + row];
    out += weight * part[row * kD + column];
  }
  return out;
}

template <int32_t kD>
__device__ __forceinline__ void WriteOut(const AttentionParams& p, const Work& work,
                                         const float* parts, int32_t count) {
  for (int32_t i = threadIdx.x; i < work.rows * kD; i += kThreads) {
    const int32_t row = i / kD, column = i % kD;
    Merged merged;
    const float out = MergeParts<kD>(parts, count, row, column, &merged);
    const int64_t token = work.tile.first_row + row / work.group;
    const int32_t head = work.kv_head * work.group + row % work.group;
    p.out[(token * p.heads + head) * kD + column] = __float2half(out / merged.sum);
  }
}

// With splits: leaves this block's part in the scratch memory; the last block adds all parts up.
template <int32_t kD>
__device__ __forceinline__ void FinishSplit(const AttentionParams& p, const Work& work,
                                            const float* shared_parts) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.kv_heads + work.kv_head;
  float* parts = p.scratch + place * p.splits * kPartFloats<kD>;
  float* mine = parts + blockIdx.z * kPartFloats<kD>;
  for (int32_t i = threadIdx.x; i < work.rows * kD; i += kThreads) {
    const int32_t row = i / kD, column = i % kD;
    Merged merged;
    mine[i] = MergeParts<kD>(shared_parts, kWarps, row, column, &merged);
    if (column == 0) {
      mine[kAttentionRows * kD + row] = merged.max;
      mine[kAttentionRows * (kD + 1) + row] = merged.sum;
    }
  }
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.arrivals + place, 1) == work.splits - 1;
    if (last) p.arrivals[place] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  WriteOut<kD>(p, work, parts, work.splits);
}

// Cosines and sines of a position for a lane's elements of the first half of a head. The second
// half's elements, which they are rotated with, are the same lane's too.
template <int32_t kD>
struct Angles {
  static constexpr int32_t kSteps = kD / 32;
  float2 cos[kSteps][2], sin[kSteps][2];

  __device__ __forceinline__ void Load(const AttentionRotation& rotation, int32_t position,
                                       int32_t lane) {
#pragma unroll
    for (int32_t step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int32_t pair = 0; pair < 2; ++pair) {
        const int64_t at = static_cast<int64_t>(position) * (kD / 2) +
                           Fragment<kD>::Element(step, lane % 4) + 2 * pair;
        cos[step][pair] = *reinterpret_cast<const float2*>(rotation.cos + at);
        sin[step][pair] = *reinterpret_cast<const float2*>(rotation.sin + at);
      }
    }
  }
};

__device__ __forceinline__ float2 Widen(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const half2*>(&bits));
}

// One row of a head: x[step][pair], normed where there is a norm, and rotated.
template <int32_t kD>
__device__ __forceinline__ void Rotate(const Angles<kD>& angles, const half* norm, float epsilon,
                                       int32_t lane, uint2 (&x)[kD / 16]) {
  float inverse = 1;
  if (norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      const float2 a = Widen(x[step].x), b = Widen(x[step].y);
      squares += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    inverse = rsqrtf(squares / static_cast<float>(kD) + epsilon);
  }
#pragma unroll
  for (int32_t step = 0; step < kD / 32; ++step) {
#pragma unroll
    for (int32_t pair = 0; pair < 2; ++pair) {
      float2 low = Widen(pair == 0 ? x[step].x : x[step].y);
      float2 high = Widen(pair == 0 ? x[step + kD / 32].x : x[step + kD / 32].y);
      if (norm != nullptr) {
        const half* weight = norm + Fragment<kD>::Element(step, lane % 4) + 2 * pair;
        const float2 a = __half22float2(*reinterpret_cast<const half2*>(weight));
        const float2 b = __half22float2(*reinterpret_cast<const half2*>(weight + kD / 2));
        low = make_float2(low.x * inverse * a.x, low.y * inverse * a.y);
        high = make_float2(high.x * inverse * b.x, high.y * inverse * b.y);
      }
      const float2 c = angles.cos[step][pair], s = angles.sin[step][pair];
      const uint32_t new_low = PackHalves(low.x * c.x - high.x * s.x, low.y * c.y - high.y * s.y);
      const uint32_t new_high = PackHalves(high.x * c.x + low.x * s.x, high.y * c.y + low.y * s.y);
      if (pair == 0) {
        x[step].x = new_low;
        x[step + kD / 32].x = new_high;
      } else {
        x[step].y = new_low;
        x[step + kD / 32].y = new_high;
      }
    }
  }
}

template <int32_t kD>
__device__ __forceinline__ void RotateQueries(const AttentionParams& p, const Angles<kD>& angles,
                                              int32_t lane, uint32_t (&q)[kD / 16][4]) {
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    uint2 row[kD / 16];
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      row[step] = make_uint2(q[step][upper], q[step][2 + upper]);
    }
    Rotate<kD>(angles, p.rotation.q_norm, p.rotation.epsilon, lane, row);
#pragma unroll
    for (int32_t step = 0; step < kD / 16; ++step) {
      q[step][upper] = row[step].x;
      q[step][2 + upper] = row[step].y;
    }
  }
}

// The step's own key and value: into the cache, and into the fragments of the block they belong to.
template <int32_t kD>
__device__ __forceinline__ void TakeNewest(const AttentionParams& p, const Work& work,
                                           const Angles<kD>& angles, int64_t at, int32_t lane,
                                           KvFragments<kD>* kv) {
  const half* row = p.q + work.tile.first_row * p.q_stride;
  const half* key = row + (p.heads + work.kv_head) * kD;
  const half* value = row + (p.heads + p.kv_heads + work.kv_head) * kD;
  const int32_t place = work.last % kBlockTokens;
  uint2 newest[kD / 16];
#pragma unroll
  for (int32_t step = 0; step < kD / 16; ++step) {
    newest[step] = *reinterpret_cast<const uint2*>(key + Fragment<kD>::Element(step, lane % 4));
  }
  Rotate<kD>(angles, p.rotation.k_norm, p.rotation.epsilon, lane, newest);
#pragma unroll
  for (int32_t step = 0; step < kD / 16; ++step) {
    if (lane < 4) {
      *reinterpret_cast<uint2*>(p.cache.keys + at + place * kD +
                                Fragment<kD>::Element(step, lane)) = newest[step];
    }
#pragma unroll
    for (int32_t t = 0; t < 2; ++t) {
      if (KvFragments<kD>::KeyPosition(t, lane) == place) kv->keys[t][step] = newest[step];
    }
  }
#pragma unroll
  for (int32_t column = 0; column < kD / 8; ++column) {
    const int32_t d = column * 8 + lane / 4;
    const half element = value[d];
    if (lane % 4 != place / 4) continue;
    p.cache.values[at + d * kBlockTokens + place] = element;
    const uint32_t bits = __half_as_ushort(element);
    const uint2 old = kv->values[column];
    const uint32_t pair = place % 4 < 2 ? old.x : old.y;
    const uint32_t now =
        place % 2 == 0 ? (pair & 0xffff0000u) | bits : (pair & 0xffffu) | bits << 16;
    kv->values[column] = make_uint2(place % 4 < 2 ? now : old.x, place % 4 < 2 ? old.y : now);
  }
}

template <int32_t kD, bool kRotates>
__global__ void __launch_bounds__(kThreads)
    AttentionKernel(const __grid_constant__ AttentionParams p) {
  __shared__ __align__(16) float parts[kWarps * kPartFloats<kD>];
  if constexpr (!kRotates) WaitForPreviousKernel();
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Work work = MakeWork(p);
  const bool idle = work.tile.tokens == 0 || static_cast<int32_t>(blockIdx.z) >= work.splits;
  const int32_t* table = p.block_tables + static_cast<int64_t>(work.tile.slot) * p.table_size;
  const auto place_of = [&](int32_t block) {
    return (static_cast<int64_t>(table[block]) * p.kv_heads + work.kv_head) * kBlockTokens * kD;
  };
  int32_t block = work.begin_block + warp;
  const int32_t end = work.end_block;
  int64_t at = 0;
  KvFragments<kD> kv;
  Angles<kRotates ? kD : 32> angles;
  // Blocks without work leave at once: the next kernel wants their place.
  if (idle) return;
  // What earlier steps wrote needs no waiting for the kernel before.
  if (block < end) kv.Load(p.cache, at = place_of(block), lane);
  if constexpr (kRotates) {
    angles.Load(p.rotation, work.last, lane);
    WaitForPreviousKernel();
  }
  LetNextKernelStart();
  uint32_t q[kD / 16][4];
  LoadQueries<kD>(p, work, lane, q);
  if constexpr (kRotates) RotateQueries<kD>(p, angles, lane, q);
  RowState<kD> state = {};
  state.max[0] = state.max[1] = kNever;
  while (block < end) {
    if constexpr (kRotates) {
      if (block == work.last / kBlockTokens) TakeNewest<kD>(p, work, angles, at, lane, &kv);
    }
    float s[2][4];
    Scores<kD>(kv, q, s);
    Softmax<kD>(p, work, block * kBlockTokens, lane, s, &state);
    AddValues<kD>(kv, lane, work.last + 1 - block * kBlockTokens, s, &state);
    block += kWarps;
    if (block < end) kv.Load(p.cache, at = place_of(block), lane);
  }
#pragma unroll
  for (int32_t upper = 0; upper < 2; ++upper) {
    float& sum = state.sum[upper];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  }
  StorePart<kD>(state, lane, parts + warp * kPartFloats<kD>);
  __syncthreads();
  if (work.splits == 1) {
    WriteOut<kD>(p, work, parts, kWarps);
  } else {
    FinishSplit<kD>(p, work, parts);
  }
}

template <int32_t kD>
cudaError_t LaunchAttention(const AttentionParams& params, const LaunchOptions& options) {
  const LaunchShape shape{
      .grid = dim3(static_cast<uint32_t>(params.tile_count), static_cast<uint32_t>(params.kv_heads),
                   static_cast<uint32_t>(params.splits)),
      .block = dim3(kThreads),
      .stream = options.stream,
      .dependent = options.dependent};
  if constexpr (AttentionRotates(kD)) {
    if (params.rotation.cos != nullptr) {
      return LaunchKernel(AttentionKernel<kD, true>, shape, params);
    }
  }
  return LaunchKernel(AttentionKernel<kD, false>, shape, params);
}

}  // namespace

cudaError_t Attention(const AttentionParams& params, const LaunchOptions& options) {
  if (params.rotation.cos != nullptr && !AttentionRotates(params.head_dim)) {
    return cudaErrorInvalidValue;
  }
  if (!AttentionSupports(params.heads, params.kv_heads, params.head_dim) || params.splits < 1 ||
      params.splits > kAttentionSplitsMax) {
    return cudaErrorInvalidValue;
  }
  switch (params.head_dim) {
    case 16:
      return LaunchAttention<16>(params, options);
    case 32:
      return LaunchAttention<32>(params, options);
    case 64:
      return LaunchAttention<64>(params, options);
    default:
      return LaunchAttention<128>(params, options);
  }
}

}  // namespace nibble::cuda
