// Compiled without contraction of products and sums (-fmad=false).
#include "kernels/cuda/sample_whole.h"

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample_math.cuh"
#include "kernels/cuda/sample_row.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kBlocksWanted = 128;   // as many as nearly fill the GPU
constexpr int32_t kTokensOfPart = 4096;  // that a block is worth
constexpr int32_t kPartsMax = 8;         // of a row: the largest cluster that every GPU has
constexpr int32_t kBucketBits = 10;
static_assert(1 << kBucketBits == kBuckets);
constexpr uint64_t kAll = ~uint64_t{0};

// Falling logits as rising numbers; the two zeros are one.
__device__ __forceinline__ uint32_t LogitKey(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float LogitOf(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key : ~key & 0x7fffffffu);
}
__device__ __forceinline__ uint64_t PlaceOf(uint32_t key, int32_t token) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(token);
}

// What filters have left of a row's tokens.
struct Kept {
  float largest = 0;  // logit
  float scale = 1;    // 1 / temperature
  // Tokens with a larger gap are out: by far the most, and at once. The first number below the
  // reach of weights.
  float gap_limit = 20.999998f;
  bool cut_further = false;     // by what follows
  uint64_t cut = kAll;          // the last place by falling logit
  uint64_t typical_cut = kAll;  // the last place by distance
  float mean_gap = 0;
  bool typical = false;
  uint32_t least_weight = 0;

  __device__ __forceinline__ float Gap(float logit) const { return (largest - logit) * scale; }
  __device__ __forceinline__ float Distance(float gap) const { return fabsf(gap - mean_gap); }
  __device__ __forceinline__ bool Has(int32_t token, float logit, float gap) const {
    if (!(gap <= gap_limit)) return false;
    if (!cut_further) return true;
    if (PlaceOf(LogitKey(logit), token) > cut) return false;
    if (typical && PlaceOf(__float_as_uint(Distance(gap)), token) > typical_cut) return false;
    return least_weight == 0 || WeightUnits(gap) >= least_weight;
  }
  __device__ __forceinline__ void CutAt(uint64_t place) {
    if (place >= cut) return;
    cut = place;
    gap_limit = fminf(gap_limit, Gap(LogitOf(static_cast<uint32_t>(place >> 32))));
    cut_further = true;
  }
};
static_assert(kWeightReach == 21.0f);

// The order in which tokens are kept, and what counts towards the share of them.
enum class Order { kRawLogits, kLogits, kWeighedLogits, kWeighedDistances };

struct Item {
  bool in = false;
  float level = 0;  // rises with the key; most tokens' differ
  uint32_t key = 0;
  uint32_t weight = 1;
};

__device__ __forceinline__ float LevelOf(const Kept& kept, Order order, float gap) {
  return order == Order::kWeighedDistances ? kept.Distance(gap) : gap;
}

__device__ __forceinline__ Item ItemOf(const Kept& kept, Order order, int32_t token, float value) {
  const float gap = kept.Gap(value);
  if (order == Order::kRawLogits) return {.in = true, .level = gap, .key = LogitKey(value)};
  if (!kept.Has(token, value, gap)) return {};
  const float level = LevelOf(kept, order, gap);
  return {.in = true,
          .level = level,
          .key = order == Order::kWeighedDistances ? __float_as_uint(level) : LogitKey(value),
          .weight = order == Order::kLogits ? 1 : WeightUnits(gap)};
}

// Places among which the last one kept is known to be: one bucket of levels, and from then on those
// with the same first bits.
struct Range {
  int32_t level_bucket = -1;  // -1: all
  int32_t shift = 64;
  uint64_t prefix = 0;

  __device__ __forceinline__ static int32_t LevelBucket(float level) {
    constexpr float kScale = kBuckets / kWeightReach;
    return static_cast<int32_t>(fminf(level * kScale, kBuckets - 1));
  }
  __device__ __forceinline__ bool Has(uint64_t place) const {
    return shift == 64 || place >> shift == prefix;
  }
  __device__ __forceinline__ int32_t NextShift() const {
    return shift > kBucketBits ? shift - kBucketBits : 0;
  }
  __device__ __forceinline__ int32_t BucketOf(uint64_t place) const {
    return static_cast<int32_t>(place >> NextShift() & ((1u << (shift - NextShift())) - 1));
  }
  __device__ __forceinline__ void Narrow(int32_t bucket) {
    if (level_bucket < 0) {
      level_bucket = bucket;
      return;
    }
    const int32_t bits = shift - NextShift();
    prefix = prefix << bits | static_cast<uint32_t>(bucket);
    shift -= bits;
  }
};

// Sums of weights by bucket, of this block's part.
__device__ void FillBuckets(const Row& row, const Kept& kept, Order order, const Range& range) {
  Shared& shared = Block();
  shared.sums[threadIdx.x] = make_uint2(0, 0);  // a thread for each
  __syncthreads();
  ForEach(row, order == Order::kRawLogits, [&](int32_t token, float value) {
    const Item item = ItemOf(kept, order, token, value);
    if (!item.in) return;
    int32_t bucket = Range::LevelBucket(item.level);
    if (range.level_bucket >= 0) {
      const uint64_t place = PlaceOf(item.key, token);
      if (bucket != range.level_bucket || !range.Has(place)) return;
      bucket = range.BucketOf(place);
    }
    const uint32_t before = atomicAdd(&shared.sums[bucket].x, item.weight);
    if (before + item.weight < before) atomicAdd(&shared.sums[bucket].y, 1u);
  });
  Meet(row);
}

// What the weights of the tokens that are kept must reach: a number, or a share of their sum.
struct Target {
  uint64_t weight = 0;
  float share = -1;  // < 0: the number

  __device__ __forceinline__ uint64_t Of(uint64_t total) const {
    if (share < 0) return weight;
    const auto units =
        static_cast<uint64_t>(static_cast<double>(share) * static_cast<double>(total));
    return units == 0 ? 1 : units;
  }
};

// Of the warp's threads up to this one.
__device__ __forceinline__ uint64_t SumUpTo(uint64_t value) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, value, lanes);
    if (lane >= lanes) value += other;
  }
  return value;
}

// The bucket in which the weights of those before it and its own reach the target, which becomes a
// number. False, on every thread, where they don't. Empties the lists of all parts.
__device__ bool FindBucket(const Row& row, uint64_t before, Target* target_out) {
  Shared& shared = Block();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t own = 0;  // of bucket threadIdx.x
#pragma unroll 4
  for (int32_t part = 0; part < row.parts; ++part) {
    const uint2 sums = *OfPart(row, &shared.sums[threadIdx.x], part);
    own += static_cast<uint64_t>(sums.y) << 32 | sums.x;
  }
  const uint64_t sum = SumUpTo(own);  // of the warp
  if (lane == 31) shared.warp_sums[warp] = sum;
  if (threadIdx.x == 0) shared.list.count = 0;
  __syncthreads();
  const uint64_t warps = SumUpTo(shared.warp_sums[lane]);
  const uint64_t total = __shfl_sync(0xffffffffu, warps, 31);
  const uint64_t warps_before =
      warp == 0 ? 0 : __shfl_sync(0xffffffffu, warps, static_cast<int32_t>(warp) - 1);
  const uint64_t target = target_out->Of(total);
  *target_out = {.weight = target};
  const uint64_t end = before + warps_before + sum;
  if (end - own < target && end >= target) {
    shared.bucket = static_cast<int32_t>(threadIdx.x);
    shared.before = end - own;
  }
  Meet(row);
  return before + total >= target;
}

// The row's tokens that `wanted` gives, in no order, as far as there is room, in the list of each
// part; how many there are. REQUIRES: empty lists.
template <typename Wanted>
__device__ int32_t Gather(const Row& row, Order order, const Wanted& wanted) {
  TokenList* mine = &Block().list;
  ForEach(row, order == Order::kRawLogits, [&](int32_t token, float value) {
    uint64_t place;
    uint32_t weight;
    if (!wanted(token, value, &place, &weight)) return;
#pragma unroll 1
    for (int32_t part = 0; part < row.parts; ++part) {
      TokenList* list = OfPart(row, mine, part);
      const int32_t at = atomicAdd(&list->count, 1);
      if (at >= kListMax) continue;
      list->places[at] = place;
      list->weights[at] = weight;
    }
  });
  Meet(row);
  return mine->count;
}

// The place of the first token, in `order`, with which the weights of all up to it reach the
// target; kAll where they don't. One copy of the code: a block runs most of it once.
__device__ __noinline__ uint64_t FindCut(const Row row, const Kept kept, Order order, Target goal) {
  Shared& shared = Block();
  Range range;
  uint64_t before = 0;
  int32_t count;
  do {
    FillBuckets(row, kept, order, range);
    if (!FindBucket(row, before, &goal)) return kAll;
    before = shared.before;
    range.Narrow(shared.bucket);
    count = Gather(row, order, [&](int32_t token, float value, uint64_t* place, uint32_t* weight) {
      const float level = LevelOf(kept, order, kept.Gap(value));
      if (Range::LevelBucket(level) != range.level_bucket) return false;
      const Item item = ItemOf(kept, order, token, value);
      *place = PlaceOf(item.key, token);
      *weight = item.weight;
      return item.in && range.Has(*place);
    });
  } while (count > kListMax);
  const uint64_t target = goal.weight;
  if (static_cast<int32_t>(threadIdx.x) < count) {
    const uint64_t place = shared.list.places[threadIdx.x];
    const uint32_t weight = shared.list.weights[threadIdx.x];
    uint64_t sum = before;
    for (int32_t i = 0; i < count; ++i) {
      if (shared.list.places[i] <= place) sum += shared.list.weights[i];
    }
    if (sum >= target && sum - weight < target) shared.cut = place;
  }
  __syncthreads();
  return shared.cut;
}

struct TypicalSums {
  uint64_t weights = 0, gaps = 0;
};

__device__ void KeepTypical(const Row& row, Kept* kept) {
  TypicalSums sums;
  ForEach(row, false, [&](int32_t token, float value) {
    const float gap = kept->Gap(value);
    if (!kept->Has(token, value, gap)) return;
    const uint32_t weight = WeightUnits(gap);
    sums.weights += weight;
    sums.gaps += static_cast<uint64_t>(static_cast<double>(weight) * static_cast<double>(gap));
  });
  sums = OverRow(row, sums, [](TypicalSums* sum, const TypicalSums& other) {
    sum->weights += other.weights;
    sum->gaps += other.gaps;
  });
  kept->mean_gap =
      static_cast<float>(static_cast<double>(sums.gaps) / static_cast<double>(sums.weights));
  kept->typical_cut =
      FindCut(row, *kept, Order::kWeighedDistances, {.share = row.asked().typical_p});
  kept->typical = kept->cut_further = true;
}

__device__ void KeepMinP(const Row& row, Kept* kept) {
  uint32_t best = kWeightOne;
  if (kept->typical) {
    best = 0;
    ForEach(row, false, [&](int32_t token, float value) {
      const float gap = kept->Gap(value);
      if (kept->Has(token, value, gap)) best = max(best, WeightUnits(gap));
    });
    best = OverRow(row, best, [](uint32_t* a, uint32_t b) { *a = max(*a, b); });
  }
  kept->least_weight = static_cast<uint32_t>(
      ceil(static_cast<double>(row.asked().min_p) * static_cast<double>(best)));
  kept->cut_further = true;
}

__device__ __forceinline__ bool HasFilters(const WholeRow& asked) {
  return asked.top_k > 0 || asked.top_p < 1 || asked.typical_p < 1 || asked.min_p > 0;
}

__device__ void Filter(const Row& row, Kept* kept) {
  const WholeRow& asked = row.asked();
  if (asked.top_k > 0) {
    kept->CutAt(
        FindCut(row, *kept, Order::kLogits, {.weight = static_cast<uint64_t>(asked.top_k)}));
  }
  if (asked.typical_p < 1) KeepTypical(row, kept);
  if (asked.top_p < 1) {
    kept->CutAt(FindCut(row, *kept, Order::kWeighedLogits, {.share = asked.top_p}));
  }
  if (asked.min_p > 0) KeepMinP(row, kept);
}

// The token with the largest score.
struct Best {
  double score = 0;
  int32_t token_id = -1;  // -1: none
  int32_t padding = 0;
};
__device__ __forceinline__ void Take(Best* best, const Best& other) {
  TakeBetter(best, other, [](Best* a, const Best& b) { *a = b; });
}

__device__ int32_t Draw(const Row& row, const Kept& kept, int32_t likeliest, bool filtered) {
  const uint64_t stream = row.asked().stream;
  const double inverse_temperature = row.asked().inverse_temperature;
  uint64_t* bounds = Block().bounds;
  FillGumbelBounds(bounds);
  __syncthreads();
  Best best;
  // The likeliest token's score is a floor: most tokens cannot reach it whatever their gumbel.
  if (!kept.typical) {
    best.token_id = likeliest;
    best.score =
        static_cast<double>(kept.largest) * inverse_temperature + Gumbel(stream, likeliest);
  }
  ForEach(row, false, [&](int32_t token, float value) {
    if (filtered && !kept.Has(token, value, kept.Gap(value))) return;
    const double scaled = static_cast<double>(value) * inverse_temperature;
    const uint64_t bits = UniformBits(stream, token);
    if (best.token_id >= 0 && StaysBehind(best.score - scaled, bits, bounds)) return;
    Take(&best, {scaled + GumbelFromBits(bits), token});
  });
  return OverRow(row, best, [](Best* a, const Best& b) { Take(a, b); }).token_id;
}

// What one pass over the row finds.
struct Extremes {
  float raw = -INFINITY;       // largest raw logit
  float adjusted = -INFINITY;  // largest
  int32_t token_id = -1;       // its first; -1: every token is masked
  int32_t non_finite = 0;
};

__device__ Extremes FindExtremes(const Row& row) {
  Extremes mine;
  ForTokensFirst(row, [&](int32_t token, float raw, float value) {
    if (!(raw < INFINITY)) mine.non_finite = 1;
    mine.raw = fmaxf(mine.raw, raw);
    if (value > mine.adjusted) {
      mine.adjusted = value;
      mine.token_id = token;
    }
  });
  return OverRow(row, mine, [](Extremes* a, const Extremes& b) {
    a->non_finite |= b.non_finite;
    a->raw = fmaxf(a->raw, b.raw);
    if (b.token_id >= 0 && (a->token_id < 0 || b.adjusted > a->adjusted ||
                            (b.adjusted == a->adjusted && b.token_id < a->token_id))) {
      a->adjusted = b.adjusted;
      a->token_id = b.token_id;
    }
  });
}

// ln of the softmax denominator of the raw logits.
__device__ double LogSumExp(const Row& row, float largest) {
  const double most = largest > -INFINITY ? static_cast<double>(largest) : 0.0;
  uint64_t sum = 0;
  ForEach(row, true, [&](int32_t, float raw) {
    const double gap = static_cast<double>(raw) - most;
    if (gap < -32.0) return;  // not half a unit
    sum += static_cast<uint64_t>(PortableExp(gap) * 0x1p44 + 0.5);
  });
  sum = SumOverRow(row, sum);
  return most + PortableLog(static_cast<double>(sum) * 0x1p-44);
}

__device__ void WriteTop(const Row& row, float largest, double log_sum_exp, RowLogprobs* out) {
  Kept kept;
  kept.largest = largest;
  const uint64_t cut = FindCut(row, kept, Order::kRawLogits,
                               {.weight = static_cast<uint64_t>(row.asked().logprobs)});
  const float least = LogitOf(static_cast<uint32_t>(cut >> 32));
  if (threadIdx.x == 0) Block().list.count = 0;
  Meet(row);
  const auto wanted = [&](int32_t token, float raw, uint64_t* place, uint32_t* weight) {
    if (raw < least) return false;
    *place = PlaceOf(LogitKey(raw), token);
    *weight = 1;
    return *place <= cut;
  };
  const int32_t count = Gather(row, Order::kRawLogits, wanted);
  if (row.part != 0 || static_cast<int32_t>(threadIdx.x) >= count) return;
  const uint64_t place = Block().list.places[threadIdx.x];
  int32_t rank = 0;
  for (int32_t i = 0; i < count; ++i) rank += Block().list.places[i] < place ? 1 : 0;
  const auto token = static_cast<int32_t>(place & 0xffffffffu);
  out->token_ids[rank] = token;
  out->logprobs[rank] = static_cast<float>(static_cast<double>(row.logits[token]) - log_sum_exp);
}

// One thread of the row: the token leaves the sampler.
__device__ void Deliver(const Row& row, int32_t token, bool non_finite) {
  const WholeRow& asked = row.asked();
  row.p.sampled[asked.row] = {token, non_finite ? 1 : 0};
  if (asked.feeds == 0) return;
  row.p.last_tokens[asked.slot] = token < 0 ? 0 : token;
  if (token >= 0 && asked.penalized != 0) {
    sampling::CountOutput(row.p.counts + static_cast<int64_t>(asked.slot) * row.p.vocab_size +
                          token);
  }
}

// Blocks of a row stand side by side: a cluster, where there is more than one.
struct LaunchParams {
  WholeParams whole;
  int32_t parts;
  bool keeps_values;
};

__global__ void __launch_bounds__(kRowThreads)
    SampleWholeKernel(const __grid_constant__ LaunchParams launch) {
  const WholeParams& p = launch.whole;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const Row row =
      RowOf(p, block / launch.parts, block % launch.parts, launch.parts, launch.keeps_values);
  const WholeRow& asked = row.asked();
  FillSparse(row);
  const Extremes extremes = FindExtremes(row);
  const bool delivers = row.part == 0 && threadIdx.x == 0;
  const bool greedy = asked.inverse_temperature <= 0;
  if (extremes.non_finite != 0 || extremes.token_id < 0 ||
      (!greedy && extremes.adjusted == INFINITY)) {  // an absurd penalty's overflow
    const bool masked = extremes.non_finite == 0 && extremes.token_id < 0;
    if (delivers) Deliver(row, -1, !masked);
    return;
  }
  double log_sum_exp = 0;
  RowLogprobs* logprobs = p.logprobs + asked.logprob_row;
  if (asked.logprobs >= 0) log_sum_exp = LogSumExp(row, extremes.raw);
  if (asked.logprobs > 0) WriteTop(row, extremes.raw, log_sum_exp, logprobs);
  int32_t token = extremes.token_id;
  if (!greedy) {
    Kept kept;
    kept.largest = extremes.adjusted;
    kept.scale = static_cast<float>(asked.inverse_temperature);
    if (HasFilters(asked)) Filter(row, &kept);
    token = Draw(row, kept, token, HasFilters(asked));
  }
  if (!delivers) return;
  if (asked.logprobs >= 0) {
    logprobs->sampled = static_cast<float>(static_cast<double>(row.logits[token]) - log_sum_exp);
  }
  Deliver(row, token, false);
}

// How a row is cut, and what each of its blocks takes.
struct Cut {
  int32_t parts = 1;
  bool keeps_values = false;
  int32_t shared_bytes = 0;
};

Cut CutInto(int32_t parts, int32_t vocab_size, int32_t shared_bytes_max) {
  const int32_t tokens = vocab_size / parts + 1;
  const auto bytes = static_cast<int32_t>(sizeof(Shared)) + SparseWords(tokens) * 4;
  const bool room = bytes + tokens * 4 <= shared_bytes_max;
  return {.parts = parts, .keeps_values = room, .shared_bytes = room ? bytes + tokens * 4 : bytes};
}

// As many blocks as fill the GPU, and more where a part's logits would not fit into one.
Cut CutOf(const WholeParams& params, bool clusters, int32_t shared_bytes_max) {
  Cut cut = CutInto(1, params.vocab_size, shared_bytes_max);
  while (clusters && cut.parts < kPartsMax) {
    const int32_t parts = 2 * cut.parts;
    const bool wanted =
        parts * params.count <= kBlocksWanted && params.vocab_size >= parts * kTokensOfPart;
    if (!wanted && cut.keeps_values) break;
    cut = CutInto(parts, params.vocab_size, shared_bytes_max);
  }
  return cut;
}

}  // namespace

cudaError_t SampleWhole(const WholeParams& params, bool clusters, const LaunchOptions& options) {
  if (params.vocab_size > kSampleVocabMax) return cudaErrorInvalidValue;
  int device = 0, shared_bytes_max = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&shared_bytes_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const Cut cut = CutOf(params, clusters, shared_bytes_max);
  error = cudaFuncSetAttribute(SampleWholeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               cut.shared_bytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(
      SampleWholeKernel,
      {.grid = dim3(static_cast<uint32_t>(params.count * cut.parts)),
       .block = dim3(kRowThreads),
       .shared_bytes = cut.shared_bytes,
       .stream = options.stream,
       .cluster = cut.parts},
      LaunchParams{.whole = params, .parts = cut.parts, .keeps_values = cut.keeps_values});
}

}  // namespace nibble::cuda
