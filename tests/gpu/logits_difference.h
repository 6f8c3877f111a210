// Logits of an executor's steps beside those of somebody else: transformers', as tests/data/
// model-specs holds them, or another executor's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/element.h"
#include "tests/gpu/sequence_driver.h"
#include "tests/support/must.h"
#include "worker/weights/safetensors.h"

namespace nibble::gpu_check {

using cuda::Element;

using Logits = std::map<std::pair<int32_t, int32_t>, std::vector<float>>;  // by slot, position

template <typename AnyExecutor>
void Keep(AnyExecutor* executor, Logits* logits) {
  executor->set_logits_observer(
      [logits](int32_t slot, int32_t position, std::span<const float> row) {
        (*logits)[{slot, position}].assign(row.begin(), row.end());
      });
}

inline double LogSumExp(const std::vector<float>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

// What is allowed. bf16 rounds eight times as coarsely as fp16; divergence goes with the square.
// transformers itself in bf16 diverges by 2e-3 to 8e-3 on the tiny checkpoints.
struct Limits {
  double kl_mean;
  float margin;  // of the best token over the one that was taken
};
inline Limits LimitsOf(Element element) {
  return element == Element::kHalf ? Limits{1e-4, 0.05f} : Limits{64 * 1e-4, 8 * 0.05f};
}

struct Difference {
  const Limits limits;
  double kl_sum = 0, kl_max = 0, logit_max = 0;
  int32_t positions = 0, argmax_differs = 0, argmax_wrong = 0;
  float margin_lost = 0;

  explicit Difference(Element element) : Difference(LimitsOf(element)) {}
  explicit Difference(const Limits& allowed) : limits(allowed) {}

  void Take(const std::vector<float>& want, const std::vector<float>& got) {
    CHECK(want.size() == got.size());
    const double want_sum = LogSumExp(want), got_sum = LogSumExp(got);
    double kl = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double p = static_cast<double>(want[i]) - want_sum;
      kl += std::exp(p) * (p - (static_cast<double>(got[i]) - got_sum));
      const double difference =
          std::abs(static_cast<double>(want[i]) - static_cast<double>(got[i]));
      logit_max = std::isfinite(difference) ? std::max(logit_max, difference) : 1e30;
    }
    kl_sum += kl;
    kl_max = std::max(kl_max, std::isfinite(kl) ? kl : 1e30);
    ++positions;
    const auto best = std::max_element(want.begin(), want.end());
    const auto mine = std::max_element(got.begin(), got.end());
    if (best - want.begin() == mine - got.begin()) return;
    ++argmax_differs;
    const float lost = *best - want[static_cast<size_t>(mine - got.begin())];
    margin_lost = std::max(margin_lost, lost);
    if (lost > limits.margin) ++argmax_wrong;  // the other choice was clearly worse
  }
  [[nodiscard]] double kl_mean() const { return kl_sum / positions; }
  bool Report(const std::string& name) const {
    const bool ok = kl_mean() <= limits.kl_mean && argmax_wrong == 0 && logit_max < 1e9;
    std::printf(
        "%-4s %-44s %4d positions: KL mean %.2e max %.2e, logits %.2e, argmax differs %d "
        "(by %.3f), wrong %d\n",
        ok ? "ok" : "FAIL", name.c_str(), positions, kl_mean(), kl_max, logit_max, argmax_differs,
        static_cast<double>(margin_lost), argmax_wrong);
    return ok;
  }
};

// Feeds the ids `chunk` at a time, every row sampled.
inline void FeedAll(SequenceDriver* driver, int32_t slot, const std::vector<int32_t>& ids,
                    int32_t chunk) {
  for (size_t begin = 0; begin < ids.size();) {
    const size_t count = std::min(static_cast<size_t>(chunk), ids.size() - begin);
    driver->Feed(slot, std::span(ids).subspan(begin, count), static_cast<int32_t>(count));
    static_cast<void>(driver->Run());
    begin += count;
  }
}

struct Expected {
  std::vector<int32_t> ids;
  std::vector<std::vector<float>> logits;  // per position
};

inline Expected ReadExpected(const std::string& folder) {
  auto file = testing::Must(weights::SafetensorsFile::Open(folder + "/expected.safetensors"));
  Expected expected;
  const weights::TensorView& ids = file->tensors().at("input_ids");
  for (size_t at = 0; at < ids.data.size(); at += 8) {
    int64_t id = 0;
    std::memcpy(&id, ids.data.data() + at, sizeof(id));
    expected.ids.push_back(static_cast<int32_t>(id));
  }
  const weights::TensorView& logits = file->tensors().at("logits");
  const size_t vocab = logits.data.size() / sizeof(float) / expected.ids.size();
  for (size_t position = 0; position < expected.ids.size(); ++position) {
    expected.logits.emplace_back(vocab);
    std::memcpy(expected.logits.back().data(), logits.data.data() + position * vocab * 4,
                vocab * 4);
  }
  return expected;
}

}  // namespace nibble::gpu_check
