#include "worker/weights/checkpoint.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/printable.h"
#include "worker/weights/strict_json.h"

namespace nibble::weights {
namespace {

using model::Message;
using nlohmann::json;

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";
constexpr int64_t kConfigBytesMax = 4 << 20;
constexpr int64_t kIndexBytesMax = 64 << 20;

absl::StatusOr<json> ReadJson(const ModelFolder& folder, std::string_view name, int64_t bytes_max) {
  ASSIGN_OR_RETURN(const std::string text, folder.ReadFile(name, bytes_max));
  return ParseStrictJson(text, name);
}

// null where the file does not exist.
absl::StatusOr<json> ReadOptionalJson(const ModelFolder& folder, std::string_view name) {
  auto document = ReadJson(folder, name, kConfigBytesMax);
  if (absl::IsNotFound(document.status())) return json();
  if (document.ok() && !document->is_object()) {
    return absl::InvalidArgumentError(Message(name, " is not a JSON object"));
  }
  return document;
}

absl::StatusOr<json> ReadSideFile(const ModelFolder& folder) {
  for (const std::string_view name : {"quant_config.json", "quantize_config.json"}) {
    ASSIGN_OR_RETURN(json document, ReadOptionalJson(folder, name));
    if (!document.is_null()) return document;
  }
  return json();
}

// FNV-1a.
void Mix(uint64_t* hash, std::string_view bytes) {
  for (const char byte : bytes) {
    *hash = (*hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  }
  *hash = (*hash ^ 0xff) * 0x100000001b3u;  // ends the field: no byte of UTF-8 text is 0xff
}

// AWQ's list holds parts of dotted paths, compressed-tensors' whole names (its patterns and class
// names are not read: the tensors decide).
bool Listed(const QuantizationConfig& quantization, std::string_view layer) {
  for (const std::string& name : quantization.modules_to_not_convert) {
    if (quantization.layout == Layout::kCompressedTensors ? layer == name
                                                          : layer.find(name) != layer.npos) {
      return true;
    }
  }
  return false;
}

bool LayoutAgrees(Layout config, Layout tensors) {
  if (config == Layout::kNone || config == tensors) return true;
  if (config == Layout::kLlmAwq) {  // v1 files are stored like gemv, v2 like gemv_fast
    return tensors == Layout::kGemv || tensors == Layout::kGemvFast;
  }
  return config == Layout::kGemvFast && tensors == Layout::kLlmAwq;
}

LogicalLinear EmptyLinear(std::string_view name, const LinearInfo& info) {
  LogicalLinear linear;
  linear.name = std::string(name);
  linear.rows = info.rows;
  linear.columns = info.columns;
  linear.group_size = info.group_size;
  linear.stored_type = info.stored_type;
  return linear;
}

}  // namespace

struct Checkpoint::Index {
  struct Place {
    const TensorView* view = nullptr;
    std::string_view name;  // of the tensor; both are owned by the files
    std::string_view file;
  };
  absl::flat_hash_map<std::string, Place> tensors;
};

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& folder) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint());
  checkpoint->folder_ = folder;
  ASSIGN_OR_RETURN(checkpoint->root_, ModelFolder::Open(folder));
  const ModelFolder& root = checkpoint->root_;
  ASSIGN_OR_RETURN(checkpoint->config_, ReadJson(root, "config.json", kConfigBytesMax));
  ASSIGN_OR_RETURN(checkpoint->spec_, model::ParseModelSpec(checkpoint->config_));
  ASSIGN_OR_RETURN(checkpoint->generation_config_,
                   ReadOptionalJson(root, "generation_config.json"));
  ASSIGN_OR_RETURN(const json side_file, ReadSideFile(root));
  ASSIGN_OR_RETURN(checkpoint->quantization_,
                   ParseQuantizationConfig(checkpoint->config_, side_file));
  RETURN_IF_ERROR(checkpoint->OpenWeights());
  RETURN_IF_ERROR(checkpoint->BuildIndex());
  return checkpoint;
}

absl::Status Checkpoint::OpenWeights() {
  std::set<std::string> names;
  json weight_map;
  auto single = root_.OpenFile(kSingleFile);
  if (single.ok()) {
    names.insert(std::string(kSingleFile));
    listing_ = kSingleFile;
  } else if (!absl::IsNotFound(single.status())) {
    return single.status();
  } else {
    auto index = ReadJson(root_, kIndexFile, kIndexBytesMax);
    if (absl::IsNotFound(index.status())) {
      return absl::NotFoundError(Message("the model folder holds neither ", kSingleFile, " nor ",
                                         kIndexFile, "; only safetensors files are read"));
    }
    RETURN_IF_ERROR(index.status());
    listing_ = kIndexFile;
    if (!index->is_object() || !index->contains("weight_map") ||
        !(*index)["weight_map"].is_object()) {
      return absl::InvalidArgumentError(
          Message(kIndexFile, ": weight_map is missing; allowed: an object of tensor and file"));
    }
    weight_map = std::move((*index)["weight_map"]);
  }
  for (const auto& [tensor, file] : weight_map.items()) {
    if (!file.is_string()) {
      return absl::InvalidArgumentError(
          Message(kIndexFile, ": tensor ", Printable(tensor), ": the file is not a string"));
    }
    names.insert(file.get<std::string>());
  }
  for (const std::string& name : names) {
    auto file = root_.OpenFile(name);
    if (!file.ok()) {
      return absl::Status(
          absl::IsNotFound(file.status()) ? absl::StatusCode::kDataLoss : file.status().code(),
          Message(kIndexFile, ": ", file.status().message()));
    }
    ASSIGN_OR_RETURN(auto mapped, SafetensorsFile::Map(file->get(), name));
    files_.push_back(std::move(mapped));
  }
  for (const auto& [tensor, file] : weight_map.items()) {
    const std::string name = file.get<std::string>();
    const auto found = std::find_if(files_.begin(), files_.end(),
                                    [&](const auto& mapped) { return mapped->name() == name; });
    if (!(*found)->tensors().contains(tensor)) {
      return absl::DataLossError(
          Message(kIndexFile, ": tensor ", Printable(tensor), ": is not in ", Printable(name)));
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::BuildIndex() {
  auto index = std::make_shared<Index>();
  for (const auto& file : files_) {
    for (const auto& [name, view] : file->tensors()) {
      if (name.ends_with(".g_idx") || name.ends_with(".weight_g_idx")) {
        return absl::UnimplementedError(
            Message(file->name(), ": tensor ", Printable(name),
                    ": act-order (GPTQ) weights are not supported; allowed: 4-bit AWQ"));
      }
      const auto [place, added] =
          index->tensors.try_emplace(name, Index::Place{&view, name, file->name()});
      if (!added) {
        return absl::DataLossError(Message("tensor ", Printable(name), ": is in both ",
                                           place->second.file, " and ", file->name()));
      }
    }
  }
  index_ = std::move(index);
  return absl::OkStatus();
}

const TensorView* Checkpoint::Find(std::string_view name) const { return Stored(name).view; }

std::vector<std::string> Checkpoint::TensorNames() const {
  std::vector<std::string> names;
  names.reserve(index_->tensors.size());
  for (const auto& [name, place] : index_->tensors) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

StoredTensor Checkpoint::Stored(std::string_view name) const {
  const auto found = index_->tensors.find(absl::string_view(name.data(), name.size()));
  if (found == index_->tensors.end()) return {};
  const Index::Place& place = found->second;
  return {.view = place.view, .name = place.name, .file = place.file};
}

LayerTensors Checkpoint::TensorsOf(std::string_view layer) const {
  LayerTensors tensors;
  tensors.layer = std::string(layer);
  tensors.listing = listing_;
  const std::pair<StoredTensor*, std::string_view> parts[] = {
      {&tensors.weight, "weight"},
      {&tensors.bias, "bias"},
      {&tensors.qweight, "qweight"},
      {&tensors.qzeros, "qzeros"},
      {&tensors.scales, "scales"},
      {&tensors.scaled_zeros, "scaled_zeros"},
      {&tensors.weight_packed, "weight_packed"},
      {&tensors.weight_scale, "weight_scale"},
      {&tensors.weight_zero_point, "weight_zero_point"},
      {&tensors.weight_shape, "weight_shape"},
  };
  for (const auto& [tensor, suffix] : parts) *tensor = Stored(Message(layer, ".", suffix));
  return tensors;
}

absl::Status Checkpoint::CheckAgainstConfig(std::string_view layer, const LinearInfo& info,
                                            const StoredTensor& tensor) const {
  if (info.layout == Layout::kNone) return absl::OkStatus();
  if (!LayoutAgrees(quantization_.layout, info.layout)) {
    return TensorError(
        tensor, Message("is stored as ", LayoutName(info.layout), "; the quantization config says ",
                        LayoutName(quantization_.layout)));
  }
  const int32_t stated = quantization_.group_size < 0 ? info.columns : quantization_.group_size;
  if (quantization_.layout != Layout::kNone && stated != 0 && stated != info.group_size) {
    return TensorError(tensor, Message("has groups of ", info.group_size,
                                       "; the quantization config says ", stated));
  }
  if (Listed(quantization_, layer)) {
    return TensorError(tensor,
                       "is quantized, but the quantization config lists it as not converted");
  }
  return absl::OkStatus();
}

absl::StatusOr<LinearInfo> Checkpoint::DescribeLinear(std::string_view name) const {
  const LayerTensors tensors = TensorsOf(name);
  ASSIGN_OR_RETURN(const LayoutReader* reader, ChooseReader(tensors));
  ASSIGN_OR_RETURN(LinearInfo info, reader->describe(tensors, quantization_.group_size));
  const StoredTensor& main = tensors.weight          ? tensors.weight
                             : tensors.weight_packed ? tensors.weight_packed
                                                     : tensors.qweight;
  RETURN_IF_ERROR(CheckAgainstConfig(name, info, main));
  const std::optional<LinearShape> shape = ExpectedShape(spec_, name);
  if (shape.has_value() && (info.rows != shape->rows || info.columns != shape->columns)) {
    return TensorError(
        main, Message("holds ", info.rows, " x ", info.columns, " weights; config.json says ",
                      shape->rows, " x ", shape->columns));
  }
  info.has_bias = shape.has_value() ? shape->bias : static_cast<bool>(tensors.bias);
  if (info.has_bias) RETURN_IF_ERROR(CheckTensor(tensors, tensors.bias, "bias", 1));
  if (tensors.bias) {
    RETURN_IF_ERROR(CheckShape(tensors.bias, {info.rows}));
    RETURN_IF_ERROR(FloatTypeOf(tensors.bias).status());
  }
  return info;
}

absl::Status Checkpoint::LoadBias(const LayerTensors& tensors, LogicalLinear* linear) const {
  if (!tensors.bias) return absl::OkStatus();
  ASSIGN_OR_RETURN(linear->bias, ReadFloats(tensors.bias));
  const std::optional<LinearShape> shape = ExpectedShape(spec_, tensors.layer);
  if (!shape.has_value() || shape->bias) return absl::OkStatus();
  // Quantizers write zero biases where the architecture has none.
  for (const float value : linear->bias) {
    if (value != 0) {
      return TensorError(tensors.bias, "is not zero; config.json gives this layer no bias");
    }
  }
  linear->bias.clear();
  return absl::OkStatus();
}

absl::StatusOr<LogicalLinear> Checkpoint::LoadLinear(std::string_view name) const {
  ASSIGN_OR_RETURN(const LinearInfo info, DescribeLinear(name));
  const LayerTensors tensors = TensorsOf(name);
  ASSIGN_OR_RETURN(const LayoutReader* reader, ChooseReader(tensors));
  LogicalLinear linear = EmptyLinear(name, info);
  RETURN_IF_ERROR(reader->read(tensors, &linear));
  RETURN_IF_ERROR(LoadBias(tensors, &linear));
  return linear;
}

absl::StatusOr<std::optional<LogicalLinear>> Checkpoint::LoadPart(
    std::string_view name, std::optional<Range> rows, std::optional<Range> columns) const {
  ASSIGN_OR_RETURN(const LinearInfo info, DescribeLinear(name));
  const Range part_rows = rows.value_or(Range{0, info.rows});
  const Range part_columns = columns.value_or(Range{0, info.columns});
  CHECK(part_rows.begin >= 0 && part_rows.end <= info.rows);
  CHECK(part_columns.begin >= 0 && part_columns.end <= info.columns);
  const LayerTensors tensors = TensorsOf(name);
  ASSIGN_OR_RETURN(const LayoutReader* reader, ChooseReader(tensors));
  if (!PartReadable(*reader, info, part_rows, part_columns)) return std::nullopt;
  LogicalLinear part = EmptyLinear(name, info);
  part.rows = part_rows.count();
  part.columns = part_columns.count();
  RETURN_IF_ERROR(reader->read_part(tensors, part_rows, part_columns, &part));
  RETURN_IF_ERROR(LoadBias(tensors, &part));
  if (part_columns.begin > 0) part.bias.clear();
  if (!part.bias.empty()) {
    part.bias.erase(part.bias.begin() + part_rows.end, part.bias.end());
    part.bias.erase(part.bias.begin(), part.bias.begin() + part_rows.begin);
  }
  return part;
}

absl::StatusOr<LogicalLinear> Checkpoint::LoadLinearRows(std::string_view name, Range rows) const {
  ASSIGN_OR_RETURN(auto part, LoadPart(name, rows, std::nullopt));
  if (part.has_value()) return *std::move(part);
  ASSIGN_OR_RETURN(LogicalLinear whole, LoadLinear(name));
  if (rows.count() == whole.rows) return whole;
  return SliceRows(whole, rows.begin, rows.end);
}

absl::StatusOr<LogicalLinear> Checkpoint::LoadLinearColumns(std::string_view name,
                                                            Range columns) const {
  ASSIGN_OR_RETURN(auto part, LoadPart(name, std::nullopt, columns));
  if (part.has_value()) return *std::move(part);
  ASSIGN_OR_RETURN(LogicalLinear whole, LoadLinear(name));
  if (columns.count() == whole.columns) return whole;
  return SliceColumns(whole, columns.begin, columns.end);
}

absl::StatusOr<LinearInfo> Checkpoint::DescribeHead() const {
  const bool quantized = Stored("lm_head.qweight") || Stored("lm_head.weight_packed");
  if (!spec_.tied_head || quantized) return DescribeLinear(kHeadName);
  ASSIGN_OR_RETURN(const FloatType type,
                   DescribeDense(kEmbeddingName, {spec_.vocab_size, spec_.hidden_size}));
  return LinearInfo{.rows = spec_.vocab_size, .columns = spec_.hidden_size, .stored_type = type};
}

absl::StatusOr<LogicalLinear> Checkpoint::LoadHead() const {
  const bool quantized = Stored("lm_head.qweight") || Stored("lm_head.weight_packed");
  if (!spec_.tied_head || quantized) return LoadLinear(kHeadName);
  ASSIGN_OR_RETURN(const LinearInfo info, DescribeHead());
  LogicalLinear linear = EmptyLinear(kHeadName, info);
  ASSIGN_OR_RETURN(linear.dense, ReadFloats(Stored(kEmbeddingName)));
  return linear;
}

absl::StatusOr<FloatType> Checkpoint::DescribeDense(std::string_view name,
                                                    const std::vector<int64_t>& shape) const {
  const StoredTensor tensor = Stored(name);
  if (!tensor) {
    return absl::InvalidArgumentError(
        Message(listing_, ": tensor ", Printable(name), " is missing"));
  }
  RETURN_IF_ERROR(CheckShape(tensor, shape));
  return FloatTypeOf(tensor);
}

absl::StatusOr<std::vector<float>> Checkpoint::LoadDense(std::string_view name,
                                                         const std::vector<int64_t>& shape) const {
  RETURN_IF_ERROR(DescribeDense(name, shape).status());
  return ReadFloats(Stored(name));
}

absl::StatusOr<std::string> Checkpoint::ReadFile(std::string_view name, int64_t size_max) const {
  return root_.ReadFile(name, size_max);
}

uint64_t Checkpoint::IdentityHash() const {
  uint64_t hash = 0xcbf29ce484222325u;
  Mix(&hash, config_.dump(-1, ' ', false, json::error_handler_t::replace));
  for (const std::string& name : TensorNames()) {
    const TensorView& view = *Find(name);
    Mix(&hash, name);
    Mix(&hash, TensorTypeName(view.type));
    for (const int64_t dimension : view.shape) Mix(&hash, std::to_string(dimension));
  }
  return hash;
}

}  // namespace nibble::weights
