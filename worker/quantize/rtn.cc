#include "worker/quantize/rtn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"
#include "worker/model/message.h"
#include "worker/quantize/output_folder.h"
#include "worker/quantize/round_to_nearest.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/float_types.h"
#include "worker/weights/gemm_packing.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/printable.h"
#include "worker/weights/safetensors_writer.h"

namespace nibble::quantize {
namespace {

using model::Message;
using weights::Checkpoint;
using weights::TensorPlan;
using weights::TensorType;

constexpr int64_t kCopyBytesMax = int64_t{256} << 20;
constexpr int32_t kMaxThreads = 1024;

// What a model folder holds beside weights and config.json.
constexpr std::string_view kCopied[] = {"tokenizer.json",
                                        "tokenizer_config.json",
                                        "special_tokens_map.json",
                                        "added_tokens.json",
                                        "tokenizer.model",
                                        "vocab.json",
                                        "merges.txt",
                                        "chat_template.jinja",
                                        "chat_template.json",
                                        "generation_config.json",
                                        "LICENSE",
                                        "NOTICE"};

// One piece of work: tensors that are made together.
struct Item {
  std::string source;  // a linear layer's name, or a dense tensor's
  int32_t group = 0;   // of a linear layer; 0 = a dense tensor, copied as fp16
  std::vector<TensorPlan> outputs;
  std::vector<int64_t> shape;  // of a dense tensor
  int64_t input_bytes = 0;
};

struct Plan {
  std::vector<Item> items;
  std::vector<std::vector<TensorPlan>> shards;
  int64_t input_bytes = 0;
};

absl::Status CheckOptions(const RtnOptions& options) {
  const int32_t group = options.group_size;
  if (group != 32 && group != 64 && group != 128 && group != -1) {
    return absl::InvalidArgumentError(
        Message("group size is ", group, "; allowed: 32, 64, 128, -1 (the whole row)"));
  }
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        Message("threads is ", options.threads, "; allowed: 1 … ", kMaxThreads));
  }
  return absl::OkStatus();
}

// Lists the work in the order of the output, from headers alone.
class Planner {
 public:
  Planner(const Checkpoint& checkpoint, int32_t group_size)
      : checkpoint_(checkpoint), group_size_(group_size) {}

  absl::StatusOr<std::vector<Item>> Items() {
    const model::ModelSpec& spec = checkpoint_.spec();
    const std::vector<int64_t> matrix = {spec.vocab_size, spec.hidden_size};
    RETURN_IF_ERROR(AddDense(std::string(weights::kEmbeddingName), matrix));
    for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
      for (const weights::LinearRole role : weights::kLinearRoles) {
        RETURN_IF_ERROR(AddLinear(weights::LinearName(layer, role)));
      }
      for (const weights::NormTensor& norm : weights::LayerNorms(spec, layer)) {
        RETURN_IF_ERROR(AddDense(norm.name, {norm.size}));
      }
    }
    RETURN_IF_ERROR(AddDense(std::string(weights::kFinalNormName), {spec.hidden_size}));
    if (!spec.tied_head) {
      RETURN_IF_ERROR(AddDense(Message(weights::kHeadName, ".weight"), matrix));
    }
    return std::move(items_);
  }

 private:
  absl::Status AddDense(std::string name, std::vector<int64_t> shape) {
    RETURN_IF_ERROR(checkpoint_.DescribeDense(name, shape).status());
    Item item;
    item.source = name;
    item.input_bytes = static_cast<int64_t>(checkpoint_.Find(name)->data.size());
    item.outputs = {{std::move(name), TensorType::kF16, shape}};
    item.shape = std::move(shape);
    items_.push_back(std::move(item));
    return absl::OkStatus();
  }

  absl::Status AddLinear(const std::string& name) {
    ASSIGN_OR_RETURN(const weights::LinearInfo info, checkpoint_.DescribeLinear(name));
    if (info.layout != weights::Layout::kNone) {
      return absl::FailedPreconditionError(Message(name, " is quantized already (",
                                                   weights::LayoutName(info.layout),
                                                   "); allowed: fp16, bf16, fp32"));
    }
    const int32_t group = group_size_ < 0 ? info.columns : group_size_;
    if (info.columns % group != 0 || group % 32 != 0) {
      return absl::InvalidArgumentError(Message(name, " has ", info.columns,
                                                " columns; allowed: multiples of ",
                                                group_size_ < 0 ? 32 : group, " (the group size)"));
    }
    if (info.rows % weights::kGemmRowUnit != 0) {
      return absl::InvalidArgumentError(Message(
          name, " has ", info.rows, " rows; allowed: multiples of ", weights::kGemmRowUnit));
    }
    Item item;
    item.source = name;
    item.group = group;
    item.outputs = weights::PlanGemm(name, info.rows, info.columns, group);
    item.input_bytes = static_cast<int64_t>(checkpoint_.Find(name + ".weight")->data.size());
    items_.push_back(std::move(item));
    if (!info.has_bias) return absl::OkStatus();
    return AddDense(name + ".bias", {info.rows});
  }

  const Checkpoint& checkpoint_;
  const int32_t group_size_;
  std::vector<Item> items_;
};

absl::StatusOr<Plan> MakePlan(const Checkpoint& checkpoint, const RtnOptions& options) {
  Plan plan;
  ASSIGN_OR_RETURN(plan.items, Planner(checkpoint, options.group_size).Items());
  int64_t shard_bytes = 0;
  for (const Item& item : plan.items) {
    plan.input_bytes += item.input_bytes;
    for (const TensorPlan& tensor : item.outputs) {
      if (plan.shards.empty() || shard_bytes + tensor.bytes() > options.shard_bytes_max) {
        plan.shards.emplace_back();
        shard_bytes = 0;
      }
      plan.shards.back().push_back(tensor);
      shard_bytes += tensor.bytes();
    }
  }
  return plan;
}

std::string ShardName(size_t index, size_t count) {
  if (count == 1) return "model.safetensors";
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name;
}

absl::StatusOr<std::vector<std::byte>> ToHalf(const std::vector<float>& values,
                                              std::string_view name) {
  std::vector<std::byte> bytes(values.size() * 2);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = weights::FloatToHalf(values[i]);
    if (!std::isfinite(weights::HalfToFloat(half))) {
      return absl::InvalidArgumentError(Message("tensor ", weights::Printable(name), ": value ", i,
                                                " is ", values[i],
                                                "; allowed: -65504 … 65504 (fp16)"));
    }
    std::memcpy(bytes.data() + 2 * i, &half, sizeof(half));
  }
  return bytes;
}

// The output files, and the threads that fill them.
class Writer {
 public:
  Writer(const Checkpoint& checkpoint, const Plan& plan, const RtnOptions& options)
      : checkpoint_(checkpoint), plan_(plan), options_(options) {}

  absl::Status Run(const OutputFolder& folder) {
    for (size_t i = 0; i < plan_.shards.size(); ++i) {
      const std::string name = ShardName(i, plan_.shards.size());
      ASSIGN_OR_RETURN(auto file, weights::SafetensorsWriter::Create(
                                      folder.PathOf(name), plan_.shards[i], {{"format", "pt"}}));
      for (const TensorPlan& tensor : plan_.shards[i]) file_of_[tensor.name] = file.get();
      files_.push_back(std::move(file));
    }
    statuses_.resize(plan_.items.size());
    const auto count = std::min<size_t>(options_.threads, plan_.items.size());
    {
      std::vector<std::jthread> threads;
      for (size_t i = 1; i < count; ++i) threads.emplace_back([this] { Work(); });
      Work();
    }
    for (const absl::Status& status : statuses_) RETURN_IF_ERROR(status);
    for (const auto& file : files_) RETURN_IF_ERROR(file->Finish());
    return absl::OkStatus();
  }

 private:
  void Work() {
    while (!failed_.load(std::memory_order_relaxed)) {
      const size_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= plan_.items.size()) return;
      statuses_[index] = Make(plan_.items[index]);
      if (!statuses_[index].ok()) failed_.store(true, std::memory_order_relaxed);
      Report(plan_.items[index].input_bytes);
    }
  }

  absl::Status Make(const Item& item) const {
    if (item.group == 0) {
      ASSIGN_OR_RETURN(const std::vector<float> values,
                       checkpoint_.LoadDense(item.source, item.shape));
      ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, ToHalf(values, item.source));
      return Write(item.source, bytes);
    }
    ASSIGN_OR_RETURN(const weights::LogicalLinear dense, checkpoint_.LoadLinear(item.source));
    ASSIGN_OR_RETURN(const weights::LogicalLinear quantized, RoundToNearest(dense, item.group));
    const std::vector<std::vector<std::byte>> tensors = weights::PackGemm(quantized);
    for (size_t i = 0; i < tensors.size(); ++i) {
      RETURN_IF_ERROR(Write(item.outputs[i].name, tensors[i]));
    }
    return absl::OkStatus();
  }

  absl::Status Write(const std::string& name, const std::vector<std::byte>& bytes) const {
    return file_of_.at(name)->Write(name, bytes);
  }

  void Report(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_done_ += bytes;
    if (options_.progress) options_.progress(bytes_done_, plan_.input_bytes);
  }

  const Checkpoint& checkpoint_;
  const Plan& plan_;
  const RtnOptions& options_;
  std::vector<std::unique_ptr<weights::SafetensorsWriter>> files_;
  std::map<std::string, weights::SafetensorsWriter*> file_of_;
  std::vector<absl::Status> statuses_;  // one per item, each written by one thread
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  int64_t bytes_done_ = 0;  // under mutex_
};

absl::Status WriteConfig(const Checkpoint& checkpoint, const RtnOptions& options,
                         const OutputFolder& folder) {
  nlohmann::json config = checkpoint.config();
  config["torch_dtype"] = "float16";
  if (config.contains("dtype")) config["dtype"] = "float16";
  config["quantization_config"] = {{"quant_method", "awq"},
                                   {"version", "gemm"},
                                   {"bits", 4},
                                   {"group_size", options.group_size},
                                   {"zero_point", true},
                                   {"modules_to_not_convert", nullptr}};
  return folder.WriteFile("config.json", config.dump(2) + "\n");
}

absl::Status WriteIndex(const Plan& plan, const OutputFolder& folder) {
  if (plan.shards.size() == 1) return absl::OkStatus();
  nlohmann::json weight_map = nlohmann::json::object();
  int64_t bytes = 0;
  for (size_t i = 0; i < plan.shards.size(); ++i) {
    for (const TensorPlan& tensor : plan.shards[i]) {
      weight_map[tensor.name] = ShardName(i, plan.shards.size());
      bytes += tensor.bytes();
    }
  }
  const nlohmann::json index = {{"metadata", {{"total_size", bytes}}},
                                {"weight_map", std::move(weight_map)}};
  return folder.WriteFile("model.safetensors.index.json", index.dump(2) + "\n");
}

absl::Status CopyFiles(const Checkpoint& checkpoint, const OutputFolder& folder) {
  for (const std::string_view name : kCopied) {
    auto text = checkpoint.ReadFile(name, kCopyBytesMax);
    if (absl::IsNotFound(text.status())) continue;
    RETURN_IF_ERROR(text.status());
    RETURN_IF_ERROR(folder.WriteFile(name, *text));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status QuantizeRtn(const RtnOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.input_folder));
  ASSIGN_OR_RETURN(const Plan plan, MakePlan(*checkpoint, options));
  ASSIGN_OR_RETURN(const auto folder, OutputFolder::Create(options.output_folder));
  RETURN_IF_ERROR(Writer(*checkpoint, plan, options).Run(*folder));
  RETURN_IF_ERROR(WriteConfig(*checkpoint, options, *folder));
  RETURN_IF_ERROR(WriteIndex(plan, *folder));
  RETURN_IF_ERROR(CopyFiles(*checkpoint, *folder));
  return folder->Commit();
}

}  // namespace nibble::quantize
