#include "worker/step/plan_codec.h"

#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::step {
namespace {

static_assert(std::endian::native == std::endian::little, "the wire form is little-endian");

constexpr uint32_t kPlanMagic = 0x4C50424E;   // "NBPL"
constexpr uint32_t kMasksMagic = 0x4B4D424E;  // "NBMK"
constexpr uint32_t kVersion = 1;

// SequenceStep without its padding.
struct WireSequence {
  int32_t slot, first_position, token_begin, token_count, feed_sampled, block_table_index,
      block_begin, block_count, draft_count, sample_count, logprobs, mask;
};

constexpr size_t kPlanHeaderBytes = 4 + 4 + 8 + 7 * 4 + 4;
constexpr size_t kSetupFixedBytes = 3 * 4 + 8 + 7 * 4 + 4 + 3 * 4;
constexpr size_t kMasksHeaderBytes = 4 + 4 + 8 + 4 + 4;

// Writes values one after another. The caller has checked that there is room for all of them.
class WireWriter {
 public:
  explicit WireWriter(std::byte* at) : at_(at) {}

  template <typename T>
  void Put(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    std::memcpy(at_, &value, sizeof(T));
    at_ += sizeof(T);
  }
  void PutCount(size_t count) { Put(static_cast<uint32_t>(count)); }
  template <typename T>
  void PutArray(const std::vector<T>& values) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (values.empty()) return;
    std::memcpy(at_, values.data(), values.size() * sizeof(T));
    at_ += values.size() * sizeof(T);
  }
  [[nodiscard]] const std::byte* at() const { return at_; }

 private:
  std::byte* at_;
};

// Reads values one after another. Past the end it gives zeros and remembers that.
class WireReader {
 public:
  explicit WireReader(std::span<const std::byte> in) : in_(in) {}

  template <typename T>
  T Take() {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    T value{};
    if (in_.size() < sizeof(T)) {
      in_ = {};
      short_ = true;
    } else {
      std::memcpy(&value, in_.data(), sizeof(T));
      in_ = in_.subspan(sizeof(T));
    }
    return value;
  }
  // A count is checked against what is left before anything is made that large.
  template <typename T>
  bool TakeArray(uint32_t count, std::vector<T>* out) {
    static_assert(std::is_trivially_copyable_v<T>);
    const size_t bytes = size_t{count} * sizeof(T);
    if (short_ || in_.size() < bytes) return false;
    out->resize(count);
    if (count > 0) std::memcpy(out->data(), in_.data(), bytes);
    in_ = in_.subspan(bytes);
    return true;
  }
  [[nodiscard]] bool short_of_bytes() const { return short_; }
  [[nodiscard]] size_t left() const { return in_.size(); }

 private:
  std::span<const std::byte> in_;
  bool short_ = false;
};

absl::Status Bad(absl::string_view what, absl::string_view problem) {
  return absl::DataLossError(absl::StrCat("plan: ", what, " ", problem));
}

absl::Status BadAt(absl::string_view what, size_t index, absl::string_view problem) {
  return absl::DataLossError(absl::StrCat("plan: ", what, " ", index, " ", problem));
}

void PutSetup(const SlotSetup& setup, WireWriter* out) {
  const SamplingParams& sampling = setup.sampling;
  out->Put(setup.slot);
  out->Put(setup.prompt_count);
  out->Put(setup.min_tokens);
  out->Put(setup.seed);
  for (const float value :
       {sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p,
        sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty}) {
    out->Put(value);
  }
  out->Put(sampling.top_k);
  out->PutCount(sampling.logit_bias.size());
  out->PutCount(setup.stop_ids.size());
  out->PutCount(setup.history.size());
  out->PutArray(sampling.logit_bias);
  out->PutArray(setup.stop_ids);
  out->PutArray(setup.history);
}

absl::Status TakeSetup(WireReader* in, size_t index, SlotSetup* setup) {
  SamplingParams& sampling = setup->sampling;
  setup->slot = in->Take<int32_t>();
  setup->prompt_count = in->Take<int32_t>();
  setup->min_tokens = in->Take<int32_t>();
  setup->seed = in->Take<uint64_t>();
  for (float* value :
       {&sampling.temperature, &sampling.top_p, &sampling.min_p, &sampling.typical_p,
        &sampling.presence_penalty, &sampling.frequency_penalty, &sampling.repetition_penalty}) {
    *value = in->Take<float>();
  }
  sampling.top_k = in->Take<int32_t>();
  const uint32_t biases = in->Take<uint32_t>();
  const uint32_t stop_ids = in->Take<uint32_t>();
  const uint32_t history = in->Take<uint32_t>();
  if (in->short_of_bytes() || !in->TakeArray(biases, &sampling.logit_bias) ||
      !in->TakeArray(stop_ids, &setup->stop_ids) || !in->TakeArray(history, &setup->history)) {
    return BadAt("opened slot", index, "goes past the end");
  }
  if (setup->slot < 0) return BadAt("opened slot", index, "has a negative slot");
  if (setup->prompt_count < 0 || static_cast<uint32_t>(setup->prompt_count) > history) {
    return BadAt("opened slot", index, "has a prompt count outside its history");
  }
  return absl::OkStatus();
}

void PutSequence(const SequenceStep& step, WireWriter* out) {
  const WireSequence wire = {
      .slot = step.slot,
      .first_position = step.first_position,
      .token_begin = step.token_begin,
      .token_count = step.token_count,
      .feed_sampled = step.feed_sampled ? 1 : 0,
      .block_table_index = step.block_table_index,
      .block_begin = step.block_begin,
      .block_count = step.block_count,
      .draft_count = step.draft_count,
      .sample_count = step.sample_count,
      .logprobs = step.logprobs,
      .mask = static_cast<int32_t>(step.mask),
  };
  for (const int32_t value :
       {wire.slot, wire.first_position, wire.token_begin, wire.token_count, wire.feed_sampled,
        wire.block_table_index, wire.block_begin, wire.block_count, wire.draft_count,
        wire.sample_count, wire.logprobs, wire.mask}) {
    out->Put(value);
  }
}

// begin and count name a range of a vector of `size` entries. No sum that could overflow.
bool InRange(int32_t begin, int32_t count, size_t size) {
  return begin >= 0 && count >= 0 && static_cast<size_t>(begin) <= size &&
         static_cast<size_t>(count) <= size - static_cast<size_t>(begin);
}

absl::Status TakeSequence(WireReader* in, size_t index, const StepPlan& plan, SequenceStep* step) {
  step->slot = in->Take<int32_t>();
  step->first_position = in->Take<int32_t>();
  step->token_begin = in->Take<int32_t>();
  step->token_count = in->Take<int32_t>();
  const auto feed_sampled = in->Take<int32_t>();
  step->block_table_index = in->Take<int32_t>();
  step->block_begin = in->Take<int32_t>();
  step->block_count = in->Take<int32_t>();
  step->draft_count = in->Take<int32_t>();
  step->sample_count = in->Take<int32_t>();
  step->logprobs = in->Take<int32_t>();
  const auto mask = in->Take<int32_t>();
  constexpr absl::string_view kWhat = "sequence";
  if (step->slot < 0) return BadAt(kWhat, index, "has a negative slot");
  if (step->token_count < 1 ||
      !InRange(step->token_begin, step->token_count, plan.token_ids.size())) {
    return BadAt(kWhat, index, "has tokens outside the plan's");
  }
  if (step->first_position < 0 ||
      step->first_position > std::numeric_limits<int32_t>::max() - step->token_count) {
    return BadAt(kWhat, index, "has an impossible position");
  }
  if (feed_sampled < 0 || feed_sampled > 1) return BadAt(kWhat, index, "has a bad feed flag");
  step->feed_sampled = feed_sampled == 1;
  if (!InRange(step->block_begin, step->block_count, plan.block_ids.size()) ||
      step->block_table_index < 0 ||
      step->block_table_index > std::numeric_limits<int32_t>::max() - step->block_count) {
    return BadAt(kWhat, index, "has blocks outside the plan's");
  }
  if (step->draft_count < 0 || step->draft_count >= step->token_count) {
    return BadAt(kWhat, index, "has more drafts than tokens");
  }
  if (step->sample_count != 0 && step->sample_count != 1 + step->draft_count) {
    return BadAt(kWhat, index, "samples rows it does not have");
  }
  if (step->logprobs < -1 || step->logprobs > kMaxLogprobs) {
    return BadAt(kWhat, index, "asks for too many logprobs");
  }
  if (mask < 0 || mask > static_cast<int32_t>(MaskSource::kLate)) {
    return BadAt(kWhat, index, "has an unknown mask source");
  }
  step->mask = static_cast<MaskSource>(mask);
  return absl::OkStatus();
}

// The sequences stand before the arrays that they refer to, so those are read first.
struct PlanCounts {
  uint32_t closed, opened, block_copies, sequences, token_ids, block_ids, mask_words;
};

absl::Status CheckMaskWords(const StepPlan& plan) {
  uint64_t rows = 0;
  for (const SequenceStep& sequence : plan.sequences) {
    if (sequence.mask == MaskSource::kHere) rows += static_cast<uint64_t>(sequence.sample_count);
  }
  if (plan.mask_stride < 0 || (rows > 0 && plan.mask_stride == 0) ||
      plan.mask_words.size() != rows * static_cast<uint64_t>(plan.mask_stride)) {
    return Bad("mask words", "do not match the rows that bring their masks");
  }
  return absl::OkStatus();
}

absl::Status CheckSlotsAndCopies(const StepPlan& plan) {
  for (const int32_t slot : plan.closed) {
    if (slot < 0) return Bad("closed slots", "hold a negative slot");
  }
  for (const BlockCopy& copy : plan.block_copies) {
    if (copy.from < 0 || copy.to < 0) return Bad("block copies", "hold a negative block");
  }
  for (const int32_t block : plan.block_ids) {
    if (block < 0) return Bad("block ids", "hold a negative block");
  }
  return absl::OkStatus();
}

absl::Status TakeBody(std::span<const std::byte> in, const PlanCounts& counts, WireReader* reader,
                      StepPlan* plan) {
  if (!reader->TakeArray(counts.closed, &plan->closed)) {
    return Bad("closed slots", "go past the end");
  }
  if (reader->left() / kSetupFixedBytes < counts.opened) {
    return Bad("opened slots", "go past the end");
  }
  plan->opened.resize(counts.opened);
  for (size_t i = 0; i < counts.opened; ++i) {
    RETURN_IF_ERROR(TakeSetup(reader, i, &plan->opened[i]));
  }
  if (!reader->TakeArray(counts.block_copies, &plan->block_copies)) {
    return Bad("block copies", "go past the end");
  }
  const size_t sequence_bytes = size_t{counts.sequences} * sizeof(WireSequence);
  if (reader->left() < sequence_bytes) return Bad("sequences", "go past the end");
  const size_t sequences_begin = in.size() - reader->left();
  WireReader arrays(in.subspan(sequences_begin + sequence_bytes));
  if (!arrays.TakeArray(counts.token_ids, &plan->token_ids) ||
      !arrays.TakeArray(counts.block_ids, &plan->block_ids) ||
      !arrays.TakeArray(counts.mask_words, &plan->mask_words)) {
    return Bad("token, block or mask arrays", "go past the end");
  }
  if (arrays.left() != 0) return Bad("wire form", "is longer than its contents");
  plan->sequences.resize(counts.sequences);
  for (size_t i = 0; i < counts.sequences; ++i) {
    RETURN_IF_ERROR(TakeSequence(reader, i, *plan, &plan->sequences[i]));
  }
  RETURN_IF_ERROR(CheckSlotsAndCopies(*plan));
  return CheckMaskWords(*plan);
}

}  // namespace

size_t EncodedSize(const SlotSetup& setup) {
  return kSetupFixedBytes + setup.sampling.logit_bias.size() * sizeof(LogitBias) +
         (setup.stop_ids.size() + setup.history.size()) * 4;
}

size_t EncodedSize(const StepPlan& plan) {
  size_t size = kPlanHeaderBytes;
  for (const SlotSetup& setup : plan.opened) size += EncodedSize(setup);
  return size + plan.sequences.size() * sizeof(WireSequence) +
         plan.block_copies.size() * sizeof(BlockCopy) +
         (plan.closed.size() + plan.token_ids.size() + plan.block_ids.size() +
          plan.mask_words.size()) *
             4;
}

size_t EncodedSize(const MaskBatch& masks) {
  return kMasksHeaderBytes + masks.mask_words.size() * 4;
}

absl::StatusOr<size_t> Encode(const StepPlan& plan, std::span<std::byte> out) {
  const size_t size = EncodedSize(plan);
  if (size > out.size()) {
    return absl::ResourceExhaustedError(absl::StrCat("plan of step ", plan.step_id, " takes ", size,
                                                     " bytes; room for ", out.size()));
  }
  WireWriter writer(out.data());
  writer.Put(kPlanMagic);
  writer.Put(kVersion);
  writer.Put(plan.step_id);
  writer.PutCount(plan.closed.size());
  writer.PutCount(plan.opened.size());
  writer.PutCount(plan.block_copies.size());
  writer.PutCount(plan.sequences.size());
  writer.PutCount(plan.token_ids.size());
  writer.PutCount(plan.block_ids.size());
  writer.PutCount(plan.mask_words.size());
  writer.Put(plan.mask_stride);
  writer.PutArray(plan.closed);
  for (const SlotSetup& setup : plan.opened) PutSetup(setup, &writer);
  writer.PutArray(plan.block_copies);
  for (const SequenceStep& sequence : plan.sequences) PutSequence(sequence, &writer);
  writer.PutArray(plan.token_ids);
  writer.PutArray(plan.block_ids);
  writer.PutArray(plan.mask_words);
  CHECK(writer.at() == out.data() + size);
  return size;
}

absl::StatusOr<size_t> Encode(const MaskBatch& masks, std::span<std::byte> out) {
  const size_t size = EncodedSize(masks);
  if (size > out.size()) {
    return absl::ResourceExhaustedError(absl::StrCat("masks of step ", masks.step_id, " take ",
                                                     size, " bytes; room for ", out.size()));
  }
  WireWriter writer(out.data());
  writer.Put(kMasksMagic);
  writer.Put(kVersion);
  writer.Put(masks.step_id);
  writer.PutCount(masks.mask_words.size());
  writer.Put(masks.mask_stride);
  writer.PutArray(masks.mask_words);
  CHECK(writer.at() == out.data() + size);
  return size;
}

absl::Status Decode(std::span<const std::byte> in, StepPlan* plan) {
  WireReader reader(in);
  const auto magic = reader.Take<uint32_t>();
  const auto version = reader.Take<uint32_t>();
  plan->step_id = reader.Take<uint64_t>();
  const PlanCounts counts = {
      .closed = reader.Take<uint32_t>(),
      .opened = reader.Take<uint32_t>(),
      .block_copies = reader.Take<uint32_t>(),
      .sequences = reader.Take<uint32_t>(),
      .token_ids = reader.Take<uint32_t>(),
      .block_ids = reader.Take<uint32_t>(),
      .mask_words = reader.Take<uint32_t>(),
  };
  plan->mask_stride = reader.Take<int32_t>();
  absl::Status status;
  if (reader.short_of_bytes()) {
    status = Bad("header", "goes past the end");
  } else if (magic != kPlanMagic || version != kVersion) {
    status = Bad("header", "is not of this version");
  } else {
    status = TakeBody(in, counts, &reader, plan);
  }
  if (!status.ok()) plan->Clear();
  return status;
}

absl::Status Decode(std::span<const std::byte> in, MaskBatch* masks) {
  WireReader reader(in);
  const auto magic = reader.Take<uint32_t>();
  const auto version = reader.Take<uint32_t>();
  masks->step_id = reader.Take<uint64_t>();
  const auto words = reader.Take<uint32_t>();
  masks->mask_stride = reader.Take<int32_t>();
  if (reader.short_of_bytes()) return absl::DataLossError("masks: header goes past the end");
  if (magic != kMasksMagic || version != kVersion) {
    return absl::DataLossError("masks: header is not of this version");
  }
  if (reader.left() != size_t{words} * 4) {
    return absl::DataLossError("masks: words do not fill the rest");
  }
  const bool whole_rows = masks->mask_stride > 0
                              ? words % static_cast<uint32_t>(masks->mask_stride) == 0
                              : masks->mask_stride == 0 && words == 0;
  if (!whole_rows) return absl::DataLossError("masks: words are no whole rows");
  if (!reader.TakeArray(words, &masks->mask_words)) {
    return absl::DataLossError("masks: words go past the end");
  }
  return absl::OkStatus();
}

}  // namespace nibble::step
