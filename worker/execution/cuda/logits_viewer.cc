#include "worker/execution/cuda/logits_viewer.h"

#include <utility>

namespace nibble::execution {

absl::Status LogitsViewer::Set(Observer observer) {
  observer_ = std::move(observer);
  if (observer_ == nullptr || logits_.bytes() > 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(logits_, PinnedMemory::Allocate(int64_t{rows_} * vocab_size_ * 4));
  return absl::OkStatus();
}

absl::Status LogitsViewer::Show(const StepRecord& record, const float* device_logits, int32_t begin,
                                int32_t end, cudaStream_t stream) {
  const auto floats = static_cast<size_t>(end - begin) * static_cast<size_t>(vocab_size_);
  RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(logits_.as<float>(), device_logits, floats * sizeof(float),
                                 cudaMemcpyDeviceToHost, stream),
                 "fetching logits"));
  Call& call = calls_[next_call_++ % calls_.size()];
  call = {.viewer = this, .record = &record, .begin = begin, .end = end};
  return CudaStatus(cudaLaunchHostFunc(stream, Run, &call), "calling the host");
}

void LogitsViewer::Run(void* data) {
  const Call& call = *static_cast<const Call*>(data);
  const auto vocab_size = static_cast<size_t>(call.viewer->vocab_size_);
  const float* logits = call.viewer->logits_.as<float>();
  for (int32_t i = call.begin; i < call.end; ++i, logits += vocab_size) {
    const OutputRow& row = call.record->rows[static_cast<size_t>(i)];
    const step::SequenceStep& sequence = call.record->sequences[static_cast<size_t>(row.sequence)];
    call.viewer->observer_(
        sequence.slot,
        sequence.first_position + sequence.token_count - sequence.sample_count + row.draft,
        {logits, vocab_size});
  }
}

}  // namespace nibble::execution
