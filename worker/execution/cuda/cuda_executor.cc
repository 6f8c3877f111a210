#include "worker/execution/cuda/cuda_executor.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/execution/cpu/plan_check.h"
#include "worker/execution/cuda/cuda_decoder.h"
#include "worker/execution/cuda/decode_graphs.h"
#include "worker/execution/cuda/launch_timer.h"
#include "worker/execution/cuda/logits_viewer.h"
#include "worker/execution/cuda/step_inputs.h"
#include "worker/execution/cuda/step_record.h"
#include "worker/execution/cuda/step_view.h"

namespace nibble::execution {
namespace {

constexpr int32_t kDepth = 2;            // steps in flight
constexpr int32_t kSampleRowsMax = 256;  // whose logits are held at a time
constexpr int32_t kSampleRowsMin = 16;
constexpr auto kSpin = std::chrono::milliseconds(2);
constexpr auto kNap = std::chrono::microseconds(50);

step::ExecutorLimits LimitsOf(const CudaModel& model, const CudaExecutorOptions& options) {
  return {.vocab_size = model.spec().vocab_size,
          .max_context = model.max_context(),
          .max_slots = options.max_slots,
          .max_step_tokens = options.max_step_tokens,
          .kv_blocks = options.kv_blocks};
}

// Of all layers; 0 where one of them sees all positions.
int32_t WidestWindow(const CudaModel& model) {
  int32_t widest = 0;
  for (const DeviceLayer& layer : model.layers()) {
    if (layer.window == 0) return 0;
    widest = std::max(widest, layer.window);
  }
  return widest;
}

}  // namespace

struct CudaExecutor::State {
  State(std::unique_ptr<CudaModel> made, const CudaExecutorOptions& settings,
        std::unique_ptr<GpuGroup> peers)
      : group(std::move(peers)),
        model(std::move(made)),
        options(settings),
        limits(LimitsOf(*model, options)),
        checker(limits),
        inputs(limits, {.heads = model->share().heads.count(),
                        .kv_heads = model->share().kv_heads.count(),
                        .head_dim = model->spec().head_dim,
                        .window = WidestWindow(*model)}),
        sample_rows(std::min(limits.max_step_tokens,
                             std::clamp(limits.max_slots, kSampleRowsMin, kSampleRowsMax))),
        viewer(limits.vocab_size, sample_rows,
               kDepth * ((limits.max_step_tokens + sample_rows - 1) / sample_rows)) {}
  ~State();

  DecoderOptions OptionsOfDecoder(DeviceArena::Mode mode) const;
  absl::Status AllocateIn(DeviceArena* target);
  absl::StatusOr<DeviceMemoryUse> Plan();
  absl::Status Prepare();
  StepRecord& At(uint64_t step) { return records[step % kDepth]; }
  StepView ViewOf(const StepOffsets& offsets, const StepShape& shape, bool every_token) const;
  StepView ViewOf(const StepRecord& record) const {
    return ViewOf(record.offsets, record.shape, record.decode_only);
  }
  void LayOut(StepRecord* record);
  absl::Status Advance();
  absl::Status Compute(StepRecord* record);
  absl::Status BringInputs(const StepRecord& record, const StepView& view);
  absl::Status Sample(StepRecord* record);
  absl::Status SampleWhole(StepRecord* record, const StepView& view, int32_t begin, int32_t end);
  absl::Status FetchResults(StepRecord* record);
  void Collect(StepRecord* record, step::StepResult* result);

  const std::unique_ptr<GpuGroup> group;
  const std::unique_ptr<CudaModel> model;
  const CudaExecutorOptions options;
  int device = 0;  // of every thread that calls
  const step::ExecutorLimits limits;
  PlanChecker checker;
  StepInputs inputs;
  const int32_t sample_rows;
  LogitsViewer viewer;

  cudaStream_t stream = nullptr;
  std::unique_ptr<CudaDecoder> decoder;
  std::unique_ptr<DecodeGraphs> graphs;
  DeviceArena arena;
  std::byte* device_inputs = nullptr;
  cuda::SampledToken* device_sampled = nullptr;
  uint32_t* device_late_masks = nullptr;
  cuda::TokenCount* device_counts = nullptr;  // [slots, vocabulary]
  cuda::RowLogprobs* device_logprobs = nullptr;
  std::array<StepRecord, kDepth> records;
  std::unique_ptr<LaunchTimer> timer;  // while operations are timed
  int32_t timed_tokens = 0;            // of the steps whose operations are
  bool timed_decode = false;           // whether they decode
  uint64_t launched = 0;
  uint64_t waited = 0;
  absl::Status failure;
};

CudaExecutor::State::~State() {
  if (stream != nullptr) {
    static_cast<void>(cudaStreamSynchronize(stream));
    graphs.reset();
    static_cast<void>(cudaStreamDestroy(stream));
  }
  for (StepRecord& record : records) {
    if (record.begun != nullptr) static_cast<void>(cudaEventDestroy(record.begun));
    if (record.done != nullptr) static_cast<void>(cudaEventDestroy(record.done));
  }
}

DecoderOptions CudaExecutor::State::OptionsOfDecoder(DeviceArena::Mode mode) const {
  return {.max_step_tokens = limits.max_step_tokens,
          .max_slots = limits.max_slots,
          .kv_blocks = limits.kv_blocks,
          .sample_rows = sample_rows,
          .fusion = options.fusion,
          .vocab_shares = options.vocab_shares,
          .group = group.get(),
          .mode = mode};
}

absl::Status CudaExecutor::State::AllocateIn(DeviceArena* target) {
  ASSIGN_OR_RETURN(device_inputs, target->Allocate<std::byte>(inputs.bytes_max()));
  ASSIGN_OR_RETURN(device_sampled, target->Allocate<cuda::SampledToken>(limits.max_step_tokens));
  ASSIGN_OR_RETURN(device_late_masks,
                   target->Allocate<uint32_t>(WholeRows::LateMaskBytesMax(limits) / 4));
  ASSIGN_OR_RETURN(device_counts, target->Allocate<cuda::TokenCount>(int64_t{limits.max_slots} *
                                                                     limits.vocab_size));
  ASSIGN_OR_RETURN(device_logprobs, target->Allocate<cuda::RowLogprobs>(limits.max_step_tokens));
  return absl::OkStatus();
}

absl::StatusOr<DeviceMemoryUse> CudaExecutor::State::Plan() {
  constexpr auto kCount = DeviceArena::Mode::kCount;
  ASSIGN_OR_RETURN(const auto planned,
                   CudaDecoder::Create(model.get(), OptionsOfDecoder(kCount), nullptr));
  DeviceArena counted(kCount);
  RETURN_IF_ERROR(AllocateIn(&counted));
  const auto ranks = static_cast<int32_t>(options.vocab_shares.size());
  const int64_t exchange = ranks > 1 && options.one_machine
                               ? GpuGroup::ExchangeBytes(ranks, model->spec().hidden_size)
                               : 0;
  return DeviceMemoryUse{.weights = model->bytes(),
                         .kv_cache = planned->kv_bytes(),
                         .activations = planned->activation_bytes(),
                         .workspace = counted.bytes() + exchange};
}

absl::Status CudaExecutor::State::Prepare() {
  RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device), "asking for the device"));
  RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"));
  ASSIGN_OR_RETURN(
      decoder,
      CudaDecoder::Create(model.get(), OptionsOfDecoder(DeviceArena::Mode::kAllocate), stream));
  DeviceArena counted(DeviceArena::Mode::kCount);
  RETURN_IF_ERROR(AllocateIn(&counted));
  RETURN_IF_ERROR(arena.Reserve(counted.bytes()));
  RETURN_IF_ERROR(AllocateIn(&arena));
  const int64_t rows = limits.max_step_tokens;
  for (size_t i = 0; i < kDepth; ++i) {
    StepRecord& record = records[i];
    ASSIGN_OR_RETURN(record.inputs, PinnedMemory::Allocate(inputs.bytes_max()));
    ASSIGN_OR_RETURN(record.sampled,
                     PinnedMemory::Allocate(rows * int64_t{sizeof(cuda::SampledToken)}));
    ASSIGN_OR_RETURN(record.logprobs,
                     PinnedMemory::Allocate(rows * int64_t{sizeof(cuda::RowLogprobs)}));
    const int64_t mask_bytes = WholeRows::LateMaskBytesMax(limits);
    ASSIGN_OR_RETURN(record.late_mask_words, PinnedMemory::Allocate(mask_bytes));
    record.late_masks.set_memory(
        {record.late_mask_words.as<uint32_t>(), static_cast<size_t>(mask_bytes / 4)});
    RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&record.begun), "creating an event"));
    RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&record.done), "creating an event"));
  }
  if (options.fusion && options.graphs) {
    ASSIGN_OR_RETURN(
        graphs,
        DecodeGraphs::Capture(
            decoder.get(), stream, std::min(limits.max_slots, sample_rows), [this](int32_t tokens) {
              const StepShape shape{.tokens = tokens, .tiles = tokens, .rows = tokens};
              return ViewOf(OffsetsOf(shape), shape, true);
            }));
  }
  return CudaStatus(cudaDeviceSynchronize(), "preparing");
}

StepView CudaExecutor::State::ViewOf(const StepOffsets& offsets, const StepShape& shape,
                                     bool every_token) const {
  StepView view = ViewOfInputs(device_inputs, offsets, shape);
  view.every_token_sampled = every_token;
  view.sampled = view.whole.sampled = device_sampled;
  view.drafted.sampled = device_sampled;
  view.whole.late_masks = device_late_masks;
  view.whole.logprobs = device_logprobs;
  view.whole.counts = view.histories.counts = view.drafted.counts = device_counts;
  view.whole.vocab_size = view.histories.vocab_size = view.drafted.vocab_size = limits.vocab_size;
  return view;
}

// The plan just built, for the device to read.
void CudaExecutor::State::LayOut(StepRecord* record) {
  record->stage = StepRecord::Stage::kLaidOut;
  record->decode_only = inputs.decode_only();
  record->rows = inputs.rows();
  record->logprob_rows = inputs.whole_rows().logprobs();
  record->late_masks.Expect(inputs.whole_rows().late_masks(), MaskWords(limits.vocab_size));
  const int32_t tokens = inputs.shape().tokens;
  record->timed = timer != nullptr && timed_tokens == tokens && timed_decode == record->decode_only;
  const bool graph = record->decode_only && graphs != nullptr && !record->timed;
  record->padded = graph ? graphs->BatchFor(tokens) : 0;
  if (record->padded > 0) inputs.Pad(record->padded);
  record->shape = inputs.shape();
  record->offsets = OffsetsOf(record->shape);
  inputs.Write(record->offsets, record->inputs.as<std::byte>());
}

// Puts on the stream what can be put there: a step whose masks have not come is not sampled yet,
// and the one behind it waits.
absl::Status CudaExecutor::State::Advance() {
  for (uint64_t step = waited; step < launched; ++step) {
    StepRecord& record = At(step);
    if (record.stage == StepRecord::Stage::kLaidOut) {
      RETURN_IF_ERROR(Compute(&record));
      record.stage = StepRecord::Stage::kComputed;
    }
    if (record.late_masks.waiting()) break;
    if (record.stage == StepRecord::Stage::kComputed) {
      RETURN_IF_ERROR(Sample(&record));
      record.stage = StepRecord::Stage::kSampled;
    }
  }
  return absl::OkStatus();
}

absl::Status CudaExecutor::State::BringInputs(const StepRecord& record, const StepView& view) {
  const StepOffsets& offsets = record.offsets;
  const StepShape& shape = record.shape;
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(device_inputs, record.inputs.as<std::byte>(),
                      static_cast<size_t>(offsets.bytes), cudaMemcpyHostToDevice, stream),
      "sending a step's inputs"));
  if (shape.table_updates > 0) {
    RETURN_IF_ERROR(decoder->UpdateTables(
        reinterpret_cast<const int32_t*>(device_inputs + offsets.updates), shape.table_updates));
  }
  if (shape.copies > 0) {
    RETURN_IF_ERROR(decoder->CopyBlocks(
        reinterpret_cast<const int32_t*>(device_inputs + offsets.copies), shape.copies));
  }
  return shape.whole.histories > 0 ? decoder->CountHistories(view.histories) : absl::OkStatus();
}

// Up to the residual stream; a graph goes on to the tokens of plain rows.
absl::Status CudaExecutor::State::Compute(StepRecord* record) {
  StepView view = ViewOf(*record);
  RETURN_IF_ERROR(CudaStatus(cudaEventRecord(record->begun, stream), "recording an event"));
  RETURN_IF_ERROR(BringInputs(*record, view));
  if (group != nullptr && options.on_exchanged_bytes) {
    options.on_exchanged_bytes(decoder->ExchangedBytes(view.tokens, view.rows));
  }
  if (record->padded > 0) return graphs->Launch(record->padded);
  if (view.tokens == 0) return absl::OkStatus();
  if (!record->timed) return decoder->Forward(view);
  for (const step::SequenceStep& sequence : record->sequences) {
    const int64_t end = sequence.first_position + sequence.token_count;
    view.kv_positions += end;
    for (int64_t i = sequence.first_position; i < end; ++i) view.score_count += i + 1;
  }
  decoder->set_timer(timer.get());
  RETURN_IF_ERROR(timer->BeginStep());
  return decoder->Forward(view);
}

absl::Status CudaExecutor::State::Sample(StepRecord* record) {
  const StepView view = ViewOf(*record);
  const auto rows = static_cast<int32_t>(record->rows.size());
  if (record->late_masks.bytes() > 0) {
    RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(device_late_masks, record->late_mask_words.as<uint32_t>(),
                                   record->late_masks.bytes(), cudaMemcpyHostToDevice, stream),
                   "sending masks"));
  }
  // A graph's rows are one chunk.
  const int32_t chunk = record->padded > 0 ? std::max(rows, 1) : sample_rows;
  for (int32_t begin = 0; begin < rows; begin += chunk) {
    const int32_t end = std::min(rows, begin + chunk);
    if (record->padded == 0) RETURN_IF_ERROR(decoder->SampleRows(view, begin, end));
    if (viewer.active()) {
      RETURN_IF_ERROR(viewer.Show(*record, decoder->logits(), begin, end, stream));
    }
    RETURN_IF_ERROR(SampleWhole(record, view, begin, end));
  }
  decoder->set_timer(nullptr);
  if (view.drafted.count > 0) RETURN_IF_ERROR(decoder->AcceptDrafts(view.drafted));
  return FetchResults(record);
}

// Rows [begin, end), whose logits are there: those that ask for more than their best token.
absl::Status CudaExecutor::State::SampleWhole(StepRecord* record, const StepView& view,
                                              int32_t begin, int32_t end) {
  const auto is_whole = [](const OutputRow& row) { return row.whole; };
  const auto rows = record->rows.begin();
  cuda::WholeParams whole = view.whole;
  whole.first_row = begin;
  whole.rows += std::count_if(rows, rows + begin, is_whole);
  whole.count = static_cast<int32_t>(std::count_if(rows + begin, rows + end, is_whole));
  return whole.count == 0 ? absl::OkStatus() : decoder->SampleWhole(whole);
}

absl::Status CudaExecutor::State::FetchResults(StepRecord* record) {
  const auto fetch = [this](const PinnedMemory& to, const void* from, size_t bytes) {
    if (bytes == 0) return absl::OkStatus();
    return CudaStatus(cudaMemcpyAsync(to.as<void>(), from, bytes, cudaMemcpyDeviceToHost, stream),
                      "fetching tokens");
  };
  RETURN_IF_ERROR(
      fetch(record->sampled, device_sampled, record->rows.size() * sizeof(cuda::SampledToken)));
  const auto logprobs = static_cast<size_t>(record->logprob_rows);
  RETURN_IF_ERROR(fetch(record->logprobs, device_logprobs, logprobs * sizeof(cuda::RowLogprobs)));
  return CudaStatus(cudaEventRecord(record->done, stream), "recording an event");
}

void CudaExecutor::State::Collect(StepRecord* record, step::StepResult* result) {
  result->step_id = record->step_id;
  size_t row = 0;
  for (const step::SequenceStep& sequence : record->sequences) {
    if (sequence.sample_count == 0) continue;
    const int32_t tokens = AppendSequence(*record, sequence, row, result);
    if (sequence.draft_count > 0) inputs.TakeOutputs(sequence.slot, tokens);
    row += static_cast<size_t>(sequence.sample_count);
  }
  float milliseconds = 0;
  if (cudaEventElapsedTime(&milliseconds, record->begun, record->done) == cudaSuccess) {
    result->timings.forward_ns = static_cast<int64_t>(static_cast<double>(milliseconds) * 1e6);
  }
}

CudaExecutor::CudaExecutor(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudaExecutor::~CudaExecutor() = default;

absl::StatusOr<DeviceMemoryUse> CudaExecutor::Plan(std::unique_ptr<CudaModel> planned,
                                                   const CudaExecutorOptions& options) {
  return State(std::move(planned), options, nullptr).Plan();
}

absl::StatusOr<std::unique_ptr<CudaExecutor>> CudaExecutor::Create(
    std::unique_ptr<CudaModel> model, const CudaExecutorOptions& options,
    std::unique_ptr<GpuGroup> group) {
  const int32_t needed = (model->max_context() + step::kBlockTokens - 1) / step::kBlockTokens;
  if (options.kv_blocks < needed || options.max_slots < 1 || options.max_step_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv_blocks ", options.kv_blocks, ", max_slots ", options.max_slots,
                     ", max_step_tokens ", options.max_step_tokens, "; at least ", needed,
                     " blocks (one sequence), one slot and one token"));
  }
  if (model->spec().vocab_size > cuda::kSampleVocabMax) {
    return absl::InvalidArgumentError(absl::StrCat("a vocabulary of ", model->spec().vocab_size,
                                                   " tokens; limit is ", cuda::kSampleVocabMax));
  }
  auto state = std::make_unique<State>(std::move(model), options, std::move(group));
  RETURN_IF_ERROR(state->Prepare());
  return std::unique_ptr<CudaExecutor>(new CudaExecutor(std::move(state)));
}

absl::Status CudaExecutor::Launch(const step::StepPlan& plan) {
  State& state = *state_;
  if (!state.failure.ok()) return state.failure;
  RETURN_IF_ERROR(state.checker.Check(plan));
  RETURN_IF_ERROR(CudaStatus(cudaSetDevice(state.device), "choosing the device"));
  if (state.launched - state.waited == kDepth) {
    return absl::FailedPreconditionError(
        absl::StrCat("step ", plan.step_id, " launched while ", kDepth, " are in flight"));
  }
  StepRecord& record = state.At(state.launched);
  record.CopyPlan(plan);
  state.failure = state.inputs.Build(plan);  // slots have changed whether it fails or not
  if (!state.failure.ok()) return state.failure;
  state.LayOut(&record);
  ++state.launched;
  state.failure = state.Advance();
  return state.failure;
}

absl::Status CudaExecutor::ProvideMasks(const step::MaskBatch& masks) {
  State& state = *state_;
  if (!state.failure.ok()) return state.failure;
  for (uint64_t step = state.waited; step < state.launched; ++step) {
    StepRecord& record = state.At(step);
    if (record.step_id != masks.step_id) continue;
    RETURN_IF_ERROR(CudaStatus(cudaSetDevice(state.device), "choosing the device"));
    RETURN_IF_ERROR(record.late_masks.Provide(masks));
    state.failure = state.Advance();
    return state.failure;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("no step in flight waits for masks of step ", masks.step_id));
}

absl::Status CudaExecutor::Wait(Deadline deadline, step::StepResult* result) {
  State& state = *state_;
  result->Clear();
  if (!state.failure.ok()) return state.failure;
  if (state.waited == state.launched) return absl::FailedPreconditionError("no step in flight");
  StepRecord& record = state.At(state.waited);
  if (record.stage != StepRecord::Stage::kSampled) {
    return absl::FailedPreconditionError(
        absl::StrCat("step ", record.step_id, " is waited for before its masks have come"));
  }
  const auto begin = std::chrono::steady_clock::now();
  cudaError_t error = cudaEventQuery(record.done);
  while (error == cudaErrorNotReady) {
    const auto now = std::chrono::steady_clock::now();
    if (now > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("step ", record.step_id, " is not done by its deadline"));
    }
    if (now - begin > kSpin) {
      if (state.group != nullptr) RETURN_IF_ERROR(state.group->Poll());
      std::this_thread::sleep_for(kNap);
    }
    error = cudaEventQuery(record.done);
  }
  state.failure = CudaStatus(error, absl::StrCat("step ", record.step_id));
  if (state.failure.ok() && state.group != nullptr) state.failure = state.group->Poll();
  if (!state.failure.ok()) return state.failure;
  state.Collect(&record, result);
  ++state.waited;
  return absl::OkStatus();
}

const step::ExecutorLimits& CudaExecutor::limits() const { return state_->limits; }

DeviceMemoryUse CudaExecutor::memory_use() const {
  return {
      .weights = state_->model->bytes(),
      .kv_cache = state_->decoder->kv_bytes(),
      .activations = state_->decoder->activation_bytes(),
      .workspace = state_->arena.bytes() + (state_->group != nullptr ? state_->group->bytes() : 0)};
}

absl::StatusOr<std::vector<OperationTime>> CudaExecutor::TimeOperations(
    int32_t tokens, bool decode, const std::function<absl::Status()>& steps) {
  state_->timer = std::make_unique<LaunchTimer>(state_->stream);
  state_->timed_tokens = tokens;
  state_->timed_decode = decode;
  const absl::Status status = steps();
  const std::unique_ptr<LaunchTimer> timer = std::move(state_->timer);
  RETURN_IF_ERROR(status);
  return timer->Times();
}

void CudaExecutor::Abort() {
  if (state_->group != nullptr) state_->group->Abort();
}

void CudaExecutor::set_logits_observer(LogitsObserver observer) {
  state_->failure.Update(state_->viewer.Set(std::move(observer)));
}

}  // namespace nibble::execution
