// Holds a group's executors, all ranks on one GPU, to the logits that transformers computed for one
// tiny checkpoint per architecture: shares, sums inside kernels, and what happens between them.
//
//   ranks_check MODEL_SPECS_FOLDER [RANKS]    2 unless given
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/gpu/logits_difference.h"
#include "tests/gpu/sequence_driver.h"
#include "tests/support/must.h"
#include "worker/execution/cuda/activations.h"
#include "worker/execution/cuda/cuda_executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/rank_weights.h"

namespace nibble::gpu_check {
namespace {

using execution::CudaExecutor;
using execution::CudaModel;
using execution::GpuGroup;
using testing::Must;

// So few that kernels which start early leave room for those of other ranks, which they wait for.
constexpr int32_t kMultiprocessors = 32;
constexpr auto kPatience = std::chrono::seconds(5);

// The ranks of a group, which take the same steps. Each has only its share of the logits.
class Ranks {
 public:
  struct Room {
    int32_t max_context = 0;
    int32_t step_tokens = 64;
    int32_t multiprocessors = kMultiprocessors;  // of all ranks
  };
  Ranks(const std::string& folder, int32_t ranks, const Room& room, Element element) {
    const auto checkpoint = Must(weights::Checkpoint::Open(folder));
    const auto shares = Must(weights::PlanShares(*checkpoint, ranks));
    for (const weights::RankShare& share : shares) vocab_.push_back(share.vocab);
    execution::CudaExecutorOptions options{.max_slots = 4,
                                           .max_step_tokens = room.step_tokens,
                                           .kv_blocks = (room.max_context + 31) / 16,
                                           .multiprocessors = room.multiprocessors / ranks};
    if (ranks > 1) options.vocab_shares = vocab_;
    auto groups = Must(GpuGroup::ShareGpu(
        ranks, CudaExecutor::ExchangeOf(checkpoint->spec().hidden_size, options), kPatience));
    logits_.resize(shares.size());
    for (size_t rank = 0; rank < shares.size(); ++rank) {
      auto model =
          Must(CudaModel::Load(*checkpoint, shares[rank], room.max_context, element, nullptr));
      executors_.push_back(Must(CudaExecutor::Create(
          std::move(model), options, ranks > 1 ? std::move(groups[rank]) : nullptr)));
      Keep(executors_.back().get(), &logits_[rank]);
      drivers_.emplace_back(executors_.back().get());
      drivers_.back().OpenGreedy(0);
    }
  }

  void Run(std::span<const int32_t> ids, int32_t sample_rows) {
    for (SequenceDriver& driver : drivers_) {
      driver.Feed(0, ids, sample_rows);
      driver.Launch();
    }
    for (SequenceDriver& driver : drivers_) static_cast<void>(driver.Wait());
  }

  [[nodiscard]] size_t rows() const { return logits_[0].size(); }
  // Of a sampled row, put together.
  [[nodiscard]] std::vector<float> Row(int32_t position) const {
    std::vector<float> row;
    for (size_t rank = 0; rank < logits_.size(); ++rank) {
      const std::vector<float>& whole = logits_[rank].at({0, position});
      row.insert(row.end(), whole.begin() + vocab_[rank].begin, whole.begin() + vocab_[rank].end);
    }
    return row;
  }

 private:
  std::vector<weights::Range> vocab_;
  std::vector<Logits> logits_;
  std::vector<std::unique_ptr<CudaExecutor>> executors_;
  std::vector<SequenceDriver> drivers_;
};

struct Case {
  std::string folder, name;
  int32_t ranks;
  Element element;
};

bool CheckChunks(const Case& c, const Expected& expected, int32_t chunk) {
  const auto count = static_cast<int32_t>(expected.ids.size());
  Ranks ranks(c.folder + "/" + c.name, c.ranks, {.max_context = count}, c.element);
  for (int32_t begin = 0; begin < count; begin += chunk) {
    const int32_t tokens = std::min(chunk, count - begin);
    ranks.Run(
        std::span(expected.ids).subspan(static_cast<size_t>(begin), static_cast<size_t>(tokens)),
        tokens);
  }
  Difference difference(c.element);
  for (int32_t position = 0; position < count; ++position) {
    difference.Take(expected.logits[static_cast<size_t>(position)], ranks.Row(position));
  }
  return difference.Report(c.name + " " + execution::ElementWord(c.element) + " by " +
                           std::to_string(chunk));
}

// A prompt whose last rows alone are sampled: the last layer goes on with these.
bool CheckLastRows(const Case& c, const Expected& expected) {
  const auto count = static_cast<int32_t>(expected.ids.size());
  Difference difference(c.element);
  bool only_those = true;
  for (const int32_t rows : {1, 3, 8}) {
    Ranks ranks(c.folder + "/" + c.name, c.ranks, {.max_context = count}, c.element);
    ranks.Run(expected.ids, rows);
    for (int32_t position = count - rows; position < count; ++position) {
      difference.Take(expected.logits[static_cast<size_t>(position)], ranks.Row(position));
    }
    only_those = only_those && ranks.rows() == static_cast<size_t>(rows);
  }
  return difference.Report(c.name + " " + execution::ElementWord(c.element) + " last rows") &&
         only_those;
}

// A prompt whose sums the ranks share out, in slices of which the last is shorter, beside one rank
// that computes it alone.
bool CheckShared(const Case& c, const Expected& expected) {
  constexpr int32_t kTokens = 200, kRows = 3;
  std::vector<int32_t> ids;
  for (size_t i = 0; i < kTokens; ++i) ids.push_back(expected.ids[i * 7 % expected.ids.size()]);
  const std::string folder = c.folder + "/" + c.name;
  // So few multiprocessors that a tile of a prompt's leaves none idle.
  const Ranks::Room room{
      .max_context = kTokens, .step_tokens = 256, .multiprocessors = 2 * c.ranks};
  Ranks alone(folder, 1, room, c.element);
  alone.Run(ids, kRows);
  Difference difference(c.element);
  Ranks ranks(folder, c.ranks, room, c.element);
  ranks.Run(ids, kRows);
  for (int32_t position = kTokens - kRows; position < kTokens; ++position) {
    difference.Take(alone.Row(position), ranks.Row(position));
  }
  return difference.Report(c.name + " " + execution::ElementWord(c.element) + " shared out");
}

int Run(const std::string& folder, int32_t ranks) {
  bool ok = true;
  for (const char* name : {"llama", "llama-rope-llama3", "llama-biases", "mistral-window", "qwen2",
                           "qwen3", "llama-awq-gemm", "qwen2-awq-quantized-head"}) {
    const Expected expected = ReadExpected(folder + "/" + name);
    for (const Element element : {Element::kHalf, Element::kBfloat16}) {
      const Case c{folder, name, ranks, element};
      for (const int32_t chunk : {7, 1}) ok = CheckChunks(c, expected, chunk) && ok;
      ok = CheckLastRows(c, expected) && ok;
      // Of quantized weights alone.
      if (c.name.find("awq") != c.name.npos) ok = CheckShared(c, expected) && ok;
    }
  }
  std::printf("%s\n", ok ? "all of it holds" : "FAILED");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace nibble::gpu_check

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: ranks_check MODEL_SPECS_FOLDER [RANKS]\n");
    return 2;
  }
  // A kernel that is loaded when it is first launched waits for those that wait for it.
  ::setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/1);
  return nibble::gpu_check::Run(argv[1], argc > 2 ? std::atoi(argv[2]) : 2);
}
