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
#include "worker/execution/cuda/host_sampler.h"
#include "worker/execution/cuda/launch_timer.h"
#include "worker/execution/cuda/step_inputs.h"
#include "worker/execution/cuda/step_record.h"

namespace nibble::execution {
namespace {

constexpr uint64_t kDepth = 2;           // steps in flight
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
        host_sampler(limits),
        sample_rows(std::min(limits.max_step_tokens,
                             std::clamp(limits.max_slots, kSampleRowsMin, kSampleRowsMax))) {}
  ~State();

  DecoderOptions OptionsOfDecoder(DeviceArena::Mode mode) const;
  absl::Status AllocateIn(DeviceArena* target);
  absl::StatusOr<DeviceMemoryUse> Plan();
  absl::Status Prepare();
  StepRecord& At(uint64_t step) { return records[step % kDepth]; }
  StepView ViewOf(const StepOffsets& offsets, const StepShape& shape, bool every_token) const;
  absl::Status RunPlan(StepRecord* record);
  absl::Status RunKernels(StepRecord* record, const StepView& view);
  absl::Status RunTimed(StepRecord* record, const StepView& view);
  absl::Status CallHost(StepRecord* record);
  absl::Status CallHost(StepRecord* record, int32_t begin, int32_t end);
  void Collect(StepRecord* record, step::StepResult* result);
  void CollectHostRows(const StepRecord& record, const step::SequenceStep& sequence, size_t row,
                       step::StepResult* result);

  // What the driver's thread does for the host's sampler: one chunk of rows, or the slots alone.
  struct HostCall {
    State* state = nullptr;
    StepRecord* record = nullptr;
    int32_t begin = 0, end = 0;
  };
  static void RunHostCall(void* call);

  const std::unique_ptr<GpuGroup> group;
  const std::unique_ptr<CudaModel> model;
  const CudaExecutorOptions options;
  int device = 0;  // of every thread that calls
  const step::ExecutorLimits limits;
  PlanChecker checker;
  StepInputs inputs;
  HostSampler host_sampler;
  const int32_t sample_rows;

  cudaStream_t stream = nullptr;
  std::unique_ptr<CudaDecoder> decoder;
  std::unique_ptr<DecodeGraphs> graphs;
  DeviceArena arena;
  std::byte* device_inputs = nullptr;
  cuda::SampledToken* device_sampled = nullptr;
  int32_t* device_pairs = nullptr;
  PinnedMemory host_logits;
  std::array<StepRecord, kDepth> records;
  std::array<std::vector<HostCall>, kDepth> calls;
  std::unique_ptr<LaunchTimer> timer;  // while operations are timed
  int32_t timed_tokens = 0;            // of the steps whose operations are
  bool timed_decode = false;           // whether they decode
  uint64_t launched = 0;
  uint64_t waited = 0;
  absl::Status failure;
};

CudaExecutor::State::~State() {
  host_sampler.Stop();
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
  ASSIGN_OR_RETURN(device_pairs, target->Allocate<int32_t>(int64_t{2} * limits.max_slots));
  return absl::OkStatus();
}

absl::StatusOr<DeviceMemoryUse> CudaExecutor::State::Plan() {
  constexpr auto kCount = DeviceArena::Mode::kCount;
  ASSIGN_OR_RETURN(const auto planned,
                   CudaDecoder::Create(model.get(), OptionsOfDecoder(kCount), nullptr));
  DeviceArena counted(kCount);
  RETURN_IF_ERROR(AllocateIn(&counted));
  const auto ranks = static_cast<int32_t>(options.vocab_shares.size());
  const int64_t exchange =
      ranks > 1 ? GpuGroup::ExchangeBytes(ranks, CudaDecoder::ExchangeBlocks(model->spec())) : 0;
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
  ASSIGN_OR_RETURN(host_logits,
                   PinnedMemory::Allocate(int64_t{sample_rows} * limits.vocab_size * 4));
  const int32_t chunks = (limits.max_step_tokens + sample_rows - 1) / sample_rows;
  for (uint64_t i = 0; i < kDepth; ++i) {
    StepRecord& record = records[i];
    calls[i].resize(static_cast<size_t>(chunks) + 1);
    ASSIGN_OR_RETURN(record.inputs, PinnedMemory::Allocate(inputs.bytes_max()));
    ASSIGN_OR_RETURN(record.sampled,
                     PinnedMemory::Allocate(int64_t{limits.max_step_tokens} *
                                            static_cast<int64_t>(sizeof(cuda::SampledToken))));
    ASSIGN_OR_RETURN(record.last_pairs, PinnedMemory::Allocate(int64_t{8} * limits.max_slots));
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
  const std::byte* base = device_inputs;
  return {.token_ids = reinterpret_cast<const int32_t*>(base + offsets.token_ids),
          .positions = reinterpret_cast<const int32_t*>(base + offsets.positions),
          .blocks = reinterpret_cast<const int32_t*>(base + offsets.blocks),
          .units = reinterpret_cast<const cuda::AttentionUnit*>(base + offsets.units),
          .prompt_tiles = reinterpret_cast<const cuda::AttentionTile*>(base + offsets.prompt_tiles),
          .sample_rows = reinterpret_cast<const cuda::SampleRow*>(base + offsets.sample_rows),
          .row_tokens = reinterpret_cast<const int32_t*>(base + offsets.row_tokens),
          .tokens = shape.tokens,
          .unit_count = UnitCapacity(shape.tiles),
          .prompt_tile_count = shape.prompt_tiles,
          .rows = shape.rows,
          .every_token_sampled = every_token,
          .sampled = device_sampled};
}

absl::Status CudaExecutor::State::RunPlan(StepRecord* record) {
  const bool decode = inputs.decode_only();
  record->rows = inputs.rows();
  record->on_host = inputs.any_on_host() || record->opened_count > 0;
  const int32_t tokens = inputs.shape().tokens;
  const bool timed = timer != nullptr && timed_tokens == tokens && timed_decode == decode;
  const int32_t padded = decode && graphs != nullptr && !timed ? graphs->BatchFor(tokens) : 0;
  if (padded > 0) inputs.Pad(padded);
  const StepShape shape = inputs.shape();
  const StepOffsets offsets = OffsetsOf(shape);
  inputs.Write(offsets, record->inputs.as<std::byte>());
  RETURN_IF_ERROR(CudaStatus(cudaEventRecord(record->begun, stream), "recording an event"));
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(device_inputs, record->inputs.as<std::byte>(),
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
  const StepView view = ViewOf(offsets, shape, decode);
  if (group != nullptr && options.on_exchanged_bytes) {
    options.on_exchanged_bytes(decoder->ExchangedBytes(shape.tokens, shape.rows));
  }
  if (padded > 0) {
    RETURN_IF_ERROR(graphs->Launch(padded));
    if (record->on_host) RETURN_IF_ERROR(CallHost(record));
  } else {
    RETURN_IF_ERROR(timed ? RunTimed(record, view) : RunKernels(record, view));
  }
  if (!record->rows.empty()) {
    RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(record->sampled.as<cuda::SampledToken>(), device_sampled,
                                   record->rows.size() * sizeof(cuda::SampledToken),
                                   cudaMemcpyDeviceToHost, stream),
                   "fetching tokens"));
  }
  return CudaStatus(cudaEventRecord(record->done, stream), "recording an event");
}

absl::Status CudaExecutor::State::RunKernels(StepRecord* record, const StepView& view) {
  if (view.tokens > 0) RETURN_IF_ERROR(decoder->Forward(view));
  if (record->on_host && view.rows == 0) return CallHost(record);
  for (int32_t begin = 0; begin < view.rows; begin += sample_rows) {
    const int32_t end = std::min(view.rows, begin + sample_rows);
    RETURN_IF_ERROR(decoder->SampleRows(view, begin, end));
    if (record->on_host) RETURN_IF_ERROR(CallHost(record, begin, end));
  }
  return absl::OkStatus();
}

absl::Status CudaExecutor::State::RunTimed(StepRecord* record, const StepView& view) {
  StepView counted = view;
  for (const step::SequenceStep& sequence : record->sequences) {
    const int64_t end = sequence.first_position + sequence.token_count;
    counted.kv_positions += end;
    for (int64_t i = sequence.first_position; i < end; ++i) counted.score_count += i + 1;
  }
  decoder->set_timer(timer.get());
  RETURN_IF_ERROR(timer->BeginStep());
  const absl::Status status = RunKernels(record, counted);
  decoder->set_timer(nullptr);
  return status;
}

// The host's part where the rows, if there are any, are one chunk.
absl::Status CudaExecutor::State::CallHost(StepRecord* record) {
  return CallHost(record, 0, static_cast<int32_t>(record->rows.size()));
}

absl::Status CudaExecutor::State::CallHost(StepRecord* record, int32_t begin, int32_t end) {
  const auto rows = static_cast<int32_t>(record->rows.size());
  const bool wanted = std::any_of(record->rows.begin() + begin, record->rows.begin() + end,
                                  [](const OutputRow& row) { return row.on_host; });
  if (wanted) {
    RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(host_logits.as<float>(), decoder->logits(),
                                   static_cast<size_t>(end - begin) *
                                       static_cast<size_t>(limits.vocab_size) * sizeof(float),
                                   cudaMemcpyDeviceToHost, stream),
                   "fetching logits"));
  }
  HostCall& call = calls[launched % kDepth][static_cast<size_t>(begin / sample_rows)];
  call = {.state = this, .record = record, .begin = begin, .end = end};
  RETURN_IF_ERROR(CudaStatus(cudaLaunchHostFunc(stream, RunHostCall, &call), "calling the host"));
  if (end < rows || !inputs.any_on_host()) return absl::OkStatus();
  const auto sequences = record->sequences.size();
  RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(device_pairs, record->last_pairs.as<int32_t>(),
                                 sequences * 2 * sizeof(int32_t), cudaMemcpyHostToDevice, stream),
                 "sending tokens"));
  return decoder->SetLastTokens(device_pairs, static_cast<int32_t>(sequences));
}

void CudaExecutor::State::RunHostCall(void* data) {
  const HostCall& call = *static_cast<HostCall*>(data);
  HostSampler& sampler = call.state->host_sampler;
  if (call.begin == 0) sampler.Begin(call.record);
  sampler.Run(call.record, call.begin, call.end, call.state->host_logits.as<float>());
  if (call.end == static_cast<int32_t>(call.record->rows.size())) sampler.Finish(call.record);
}

void CudaExecutor::State::CollectHostRows(const StepRecord& record,
                                          const step::SequenceStep& sequence, size_t row,
                                          step::StepResult* result) {
  const std::span<const HostOutcome> outcomes(&record.outcomes[row],
                                              static_cast<size_t>(sequence.sample_count));
  step::SampledSequence sampled{.slot = sequence.slot,
                                .token_begin = static_cast<int32_t>(result->tokens.size()),
                                .top_begin = static_cast<int32_t>(result->top_logprobs.size()),
                                .top_count = std::max(0, sequence.logprobs)};
  sampled.token_count = AcceptedTokens(record, sequence, outcomes);
  sampled.non_finite = sampled.token_count == 0;
  for (int32_t i = 0; i < sampled.token_count; ++i) {
    const HostOutcome& outcome = outcomes[static_cast<size_t>(i)];
    result->tokens.push_back({.token_id = outcome.best.token_id, .logprob = outcome.logprob});
    result->top_logprobs.insert(result->top_logprobs.end(), outcome.top.begin(),
                                outcome.top.begin() + sampled.top_count);
  }
  if (sequence.draft_count > 0) inputs.TakeOutputs(sequence.slot, sampled.token_count);
  result->sequences.push_back(sampled);
}

void CudaExecutor::State::Collect(StepRecord* record, step::StepResult* result) {
  result->step_id = record->step_id;
  const auto* tokens = record->sampled.as<cuda::SampledToken>();
  size_t row = 0;
  for (const step::SequenceStep& sequence : record->sequences) {
    if (sequence.sample_count == 0) continue;
    if (record->rows[row].on_host) {
      CollectHostRows(*record, sequence, row, result);
    } else {
      const cuda::SampledToken& token = tokens[row];
      const bool finite = token.non_finite == 0 && token.token_id >= 0;
      result->sequences.push_back({.slot = sequence.slot,
                                   .token_begin = static_cast<int32_t>(result->tokens.size()),
                                   .token_count = finite ? 1 : 0,
                                   .top_begin = static_cast<int32_t>(result->top_logprobs.size()),
                                   .top_count = 0,
                                   .non_finite = !finite});
      if (finite) result->tokens.push_back({.token_id = token.token_id});
    }
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
  state.inputs.Build(plan, state.host_sampler.observed());
  state.failure = state.RunPlan(&record);
  if (state.failure.ok()) ++state.launched;
  return state.failure;
}

absl::Status CudaExecutor::ProvideMasks(const step::MaskBatch& masks) {
  State& state = *state_;
  for (uint64_t step = state.waited; step < state.launched; ++step) {
    StepRecord& record = state.At(step);
    if (record.step_id == masks.step_id) return state.host_sampler.ProvideMasks(&record, masks);
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
  if (state.failure.ok()) state.failure = record.status;
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
  state_->host_sampler.set_observer(std::move(observer));
}

}  // namespace nibble::execution
