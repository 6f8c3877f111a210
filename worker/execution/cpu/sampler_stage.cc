#include "worker/execution/cpu/sampler_stage.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::execution {

SamplerStage::SamplerStage(RankContext* context, std::vector<weights::Range> vocab_shares,
                           MaskWaiter wait_for_masks)
    : context_(context),
      vocab_shares_(std::move(vocab_shares)),
      wait_for_masks_(std::move(wait_for_masks)) {
  const auto rows = static_cast<size_t>(context->buffers->sample_rows);
  const auto threads = static_cast<size_t>(context->team->threads());
  chunk_.order.reserve(rows);
  partial_.resize(rows * threads);
  local_.resize(rows);
  exchanged_.resize(rows * vocab_shares_.size());
  samplers_.reserve(threads);
  for (size_t thread = 0; thread < threads; ++thread) {
    samplers_.emplace_back(context->model->spec().vocab_size);
  }
}

int64_t SamplerStage::scratch_bytes() const {
  return static_cast<int64_t>(samplers_.size()) *
             RowSampler::ScratchBytes(context_->model->spec().vocab_size) +
         static_cast<int64_t>((partial_.size() + local_.size() + exchanged_.size()) *
                              sizeof(Candidate));
}

RowRequest SamplerStage::RequestOf(const SampledRow& row) const {
  const step::SequenceStep& sequence = context_->plan->sequences[static_cast<size_t>(row.sequence)];
  const Slot& slot = context_->slots->slot(sequence.slot);
  RowRequest request;
  request.params = &slot.params;
  if (slot.penalized) request.counts = context_->slots->penalties().Row(sequence.slot);
  request.mask = row.mask;
  if (slot.outputs + row.draft < slot.min_tokens) request.forbidden = slot.stop_ids;
  const auto drafts_begin =
      static_cast<size_t>(sequence.token_begin + sequence.token_count - sequence.draft_count);
  request.drafts =
      std::span(context_->plan->token_ids).subspan(drafts_begin, static_cast<size_t>(row.draft));
  request.seed = slot.seed;
  request.output_index = static_cast<uint64_t>(slot.outputs + row.draft);
  request.logprobs = sequence.logprobs;
  return request;
}

bool SamplerStage::Run(int32_t thread) {
  const auto rows = static_cast<int32_t>(context_->rows.sampled.size());
  const int32_t chunk_rows = context_->buffers->sample_rows;
  if (thread == 0) outcomes_.resize(static_cast<size_t>(rows));
  for (int32_t begin = 0; begin < rows; begin += chunk_rows) {
    context_->team->Barrier(thread);  // the residual stream, or the chunk before, is complete
    if (thread == 0) MakeChunk(begin, std::min(rows, begin + chunk_rows));
    context_->team->Barrier(thread);
    if (!RunChunk(thread)) return false;
  }
  return true;
}

void SamplerStage::MakeChunk(int32_t begin, int32_t end) {
  chunk_.order.clear();
  for (int32_t index = begin; index < end; ++index) chunk_.order.push_back(index);
  const auto needs_whole_row = [&](int32_t index) {
    const SampledRow& row = context_->rows.sampled[static_cast<size_t>(index)];
    return observer_ != nullptr ||
           !WorksOnPartOfRow(RequestOf(row), context_->model->spec().vocab_size);
  };
  const auto middle = std::partition(chunk_.order.begin(), chunk_.order.end(), needs_whole_row);
  chunk_.whole = static_cast<int32_t>(middle - chunk_.order.begin());
}

bool SamplerStage::RunChunk(int32_t thread) {
  const PackedMatrix& head = context_->model->head();
  const Buffers& buffers = *context_->buffers;
  MatrixInput input;
  NormRows(thread, &input);
  head.Multiply(*context_->kernels, input, buffers.logits, buffers.logits_stride,
                ShareOf(head.row_blocks(), thread, context_->team->threads()));
  if (context_->rows.late_rows > 0 && !WaitForMasks(thread)) return false;
  FindBestOfColumns(thread);
  if (!context_->Collect(thread, [this] { return Exchange(); })) return false;
  for (int32_t place = thread; place < chunk_.whole; place += context_->team->threads()) {
    SampleWholeRow(thread, place);
  }
  return true;
}

// The final norm of the chunk's rows, side by side in Buffers::normed.
void SamplerStage::NormRows(int32_t thread, MatrixInput* input) {
  const model::ModelSpec& spec = context_->model->spec();
  const int32_t hidden = spec.hidden_size;
  const int32_t count = chunk_.size();
  float* normed = context_->buffers->normed;
  const auto norm = [&](int32_t place) {
    const auto index = static_cast<size_t>(chunk_.order[static_cast<size_t>(place)]);
    const int64_t row = context_->rows.sampled[index].row;
    context_->kernels->rms_norm(Rows(context_->buffers->residual + row * hidden, 1, hidden),
                                context_->model->final_norm(), spec.norm_epsilon,
                                normed + static_cast<int64_t>(place) * hidden, hidden);
  };
  const bool split = count > kPrivateTokens;
  if (split) {
    const cpu::BlockRange mine = context_->converter->TokensOf(thread, count);
    for (int32_t place = mine.begin; place < mine.end; ++place) norm(place);
  } else {
    if (thread == 0) {
      for (int32_t place = 0; place < count; ++place) norm(place);
    }
    context_->team->Barrier(thread);
  }
  *input = context_->converter->Convert(
      thread, context_->model->head().input_form(), Rows(normed, count, hidden),
      split ? InputConverter::Rows::kOwnTokensOnly : InputConverter::Rows::kReady);
}

bool SamplerStage::WaitForMasks(int32_t thread) {
  return context_->Collect(thread, [this]() -> absl::Status {
    ASSIGN_OR_RETURN(const step::MaskBatch* masks, wait_for_masks_());
    const int32_t words = (context_->model->spec().vocab_size + 31) / 32;
    const auto needed =
        static_cast<size_t>(masks->mask_stride) * static_cast<size_t>(context_->rows.late_rows);
    if (masks->mask_stride < words || masks->mask_words.size() < needed) {
      return absl::InvalidArgumentError(absl::StrCat(
          "late masks: ", masks->mask_words.size(), " words with stride ", masks->mask_stride, "; ",
          context_->rows.late_rows, " rows need at least ", words, " each"));
    }
    const uint32_t* mask = masks->mask_words.data();
    for (SampledRow& row : context_->rows.sampled) {
      if (!row.late_mask) continue;
      row.mask = mask;
      mask += masks->mask_stride;
    }
    return absl::OkStatus();
  });
}

// For rows that do not need the whole row: the best token among the columns that this thread has
// just computed.
void SamplerStage::FindBestOfColumns(int32_t thread) {
  const PackedMatrix& head = context_->model->head();
  const int32_t threads = context_->team->threads();
  const cpu::BlockRange blocks = ShareOf(head.row_blocks(), thread, threads);
  const int32_t begin = std::min(head.rows(), blocks.begin * layout::kRowBlock);
  const int32_t end = std::min(head.rows(), blocks.end * layout::kRowBlock);
  const int32_t first_token = context_->model->share().vocab.begin + begin;
  for (int32_t place = chunk_.whole; place < chunk_.size(); ++place) {
    const auto index = static_cast<size_t>(chunk_.order[static_cast<size_t>(place)]);
    const RowRequest request = RequestOf(context_->rows.sampled[index]);
    const std::span<float> logits(
        context_->buffers->logits + static_cast<int64_t>(place) * context_->buffers->logits_stride +
            begin,
        static_cast<size_t>(end - begin));
    Candidate best;
    if (HasNonFinite(logits)) {
      best.non_finite = 1;
    } else {
      AdjustLogits(request, first_token, logits);
      best = BestOf(request, first_token, logits);
    }
    partial_[static_cast<size_t>(place * threads + thread)] = best;
  }
}

absl::Status SamplerStage::Exchange() {
  const int32_t threads = context_->team->threads();
  for (int32_t place = chunk_.whole; place < chunk_.size(); ++place) {
    Candidate best;
    for (int32_t thread = 0; thread < threads; ++thread) {
      Merge(partial_[static_cast<size_t>(place * threads + thread)], &best);
    }
    local_[static_cast<size_t>(place - chunk_.whole)] = best;
  }
  RETURN_IF_ERROR(ExchangeCandidates());
  if (chunk_.whole > 0) RETURN_IF_ERROR(GatherLogits());
  if (observer_ == nullptr) return absl::OkStatus();
  for (int32_t place = 0; place < chunk_.whole; ++place) {
    const auto index = static_cast<size_t>(chunk_.order[static_cast<size_t>(place)]);
    const SampledRow& row = context_->rows.sampled[index];
    observer_(context_->plan->sequences[static_cast<size_t>(row.sequence)].slot,
              context_->rows.inputs[static_cast<size_t>(row.row)].position, AssembleRow(0, place));
  }
  return absl::OkStatus();
}

absl::Status SamplerStage::ExchangeCandidates() {
  const auto count = static_cast<size_t>(chunk_.size() - chunk_.whole);
  if (count == 0) return absl::OkStatus();
  const std::span<const Candidate> mine(local_.data(), count);
  const std::span<Candidate> all(exchanged_.data(), count * vocab_shares_.size());
  RETURN_IF_ERROR(
      context_->communicator->AllGather(std::as_bytes(mine), std::as_writable_bytes(all)));
  for (size_t i = 0; i < count; ++i) {
    Candidate best;
    for (size_t rank = 0; rank < vocab_shares_.size(); ++rank) {
      Merge(all[rank * count + i], &best);
    }
    const auto index = chunk_.order[static_cast<size_t>(chunk_.whole) + i];
    outcomes_[static_cast<size_t>(index)].best = best;
  }
  return absl::OkStatus();
}

absl::Status SamplerStage::GatherLogits() {
  if (vocab_shares_.size() == 1) return absl::OkStatus();
  const auto count =
      static_cast<size_t>(chunk_.whole) * static_cast<size_t>(context_->buffers->logits_stride);
  const std::span<const float> mine(context_->buffers->logits, count);
  const std::span<float> all(context_->buffers->gathered, count * vocab_shares_.size());
  return context_->communicator->AllGather(std::as_bytes(mine), std::as_writable_bytes(all));
}

const float* SamplerStage::LogitsOfRank(int32_t rank, int32_t place) const {
  const int64_t stride = context_->buffers->logits_stride;
  if (vocab_shares_.size() == 1) return context_->buffers->logits + place * stride;
  return context_->buffers->gathered + (int64_t{rank} * chunk_.whole + place) * stride;
}

std::span<float> SamplerStage::AssembleRow(int32_t thread, int32_t place) const {
  float* row = context_->buffers->whole_row[static_cast<size_t>(thread)];
  for (size_t rank = 0; rank < vocab_shares_.size(); ++rank) {
    const weights::Range& share = vocab_shares_[rank];
    std::memcpy(row + share.begin, LogitsOfRank(static_cast<int32_t>(rank), place),
                static_cast<size_t>(share.count()) * sizeof(float));
  }
  return {row, static_cast<size_t>(context_->model->spec().vocab_size)};
}

float SamplerStage::RawLogit(int32_t place, int32_t token_id) const {
  size_t rank = 0;
  while (token_id >= vocab_shares_[rank].end) ++rank;
  return LogitsOfRank(static_cast<int32_t>(rank), place)[token_id - vocab_shares_[rank].begin];
}

void SamplerStage::SampleWholeRow(int32_t thread, int32_t place) {
  const auto index = static_cast<size_t>(chunk_.order[static_cast<size_t>(place)]);
  const RowRequest request = RequestOf(context_->rows.sampled[index]);
  RowSampler& sampler = samplers_[static_cast<size_t>(thread)];
  Outcome& outcome = outcomes_[index];
  const std::span<float> row = AssembleRow(thread, place);
  double log_sum_exp = 0;
  if (request.logprobs >= 0 && !HasNonFinite(row)) {
    log_sum_exp = sampler.LogSumExp(row);
    sampler.TopLogprobs(row, log_sum_exp, request.logprobs, outcome.top.data());
  }
  outcome.best = sampler.Sample(request, row);
  if (request.logprobs >= 0 && outcome.best.token_id >= 0) {
    outcome.logprob = static_cast<float>(
        static_cast<double>(RawLogit(place, outcome.best.token_id)) - log_sum_exp);
  }
}

void SamplerStage::Finish(step::StepResult* result) {
  size_t row = 0;
  for (size_t index = 0; index < context_->plan->sequences.size(); ++index) {
    const int32_t count = context_->plan->sequences[index].sample_count;
    if (count == 0) continue;
    FinishSequence(static_cast<int32_t>(index), &outcomes_[row], result);
    row += static_cast<size_t>(count);
  }
}

// Takes the first sampled token, and each further one as long as the draft before it was right.
void SamplerStage::FinishSequence(int32_t index, const Outcome* outcomes,
                                  step::StepResult* result) {
  const step::SequenceStep& sequence = context_->plan->sequences[static_cast<size_t>(index)];
  const int32_t* drafts = context_->plan->token_ids.data() + sequence.token_begin +
                          sequence.token_count - sequence.draft_count;
  step::SampledSequence sampled{.slot = sequence.slot,
                                .token_begin = static_cast<int32_t>(result->tokens.size()),
                                .top_begin = static_cast<int32_t>(result->top_logprobs.size()),
                                .top_count = std::max(0, sequence.logprobs)};
  for (int32_t i = 0; i < sequence.sample_count; ++i) {
    const Outcome& outcome = outcomes[i];
    if (outcome.best.non_finite != 0 || outcome.best.token_id < 0) {
      sampled.non_finite = true;
      break;
    }
    context_->slots->AddOutput(sequence.slot, outcome.best.token_id);
    result->tokens.push_back({.token_id = outcome.best.token_id, .logprob = outcome.logprob});
    result->top_logprobs.insert(result->top_logprobs.end(), outcome.top.begin(),
                                outcome.top.begin() + sampled.top_count);
    ++sampled.token_count;
    if (i < sequence.draft_count && outcome.best.token_id != drafts[i]) break;
  }
  if (sampled.non_finite) {
    result->tokens.resize(static_cast<size_t>(sampled.token_begin));
    result->top_logprobs.resize(static_cast<size_t>(sampled.top_begin));
    sampled.token_count = 0;
  }
  result->sequences.push_back(sampled);
}

}  // namespace nibble::execution
