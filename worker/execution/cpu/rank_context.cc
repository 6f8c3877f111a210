#include "worker/execution/cpu/rank_context.h"

#include <span>

namespace nibble::execution {
namespace {

std::span<float> Span(float* values, int64_t count) { return {values, static_cast<size_t>(count)}; }

// Norms the own tokens of the residual stream and converts them.
void NormOwnTokens(RankContext* context, int32_t thread, const float* norm_weight, InputForm next,
                   MatrixInput* input) {
  const model::ModelSpec& spec = context->model->spec();
  const Buffers& buffers = *context->buffers;
  const int32_t tokens = context->tokens();
  const cpu::BlockRange mine = context->converter->TokensOf(thread, tokens);
  const int64_t at = static_cast<int64_t>(mine.begin) * spec.hidden_size;
  context->kernels->rms_norm(Rows(buffers.residual + at, mine.end - mine.begin, spec.hidden_size),
                             norm_weight, spec.norm_epsilon, buffers.normed + at, spec.hidden_size);
  *input = context->converter->Convert(thread, next, Rows(buffers.normed, tokens, spec.hidden_size),
                                       InputConverter::Rows::kOwnTokensOnly);
}

}  // namespace

bool ReduceAndNorm(RankContext* context, int32_t thread, const float* norm_weight, InputForm next,
                   MatrixInput* input) {
  const model::ModelSpec& spec = context->model->spec();
  const Buffers& buffers = *context->buffers;
  const int32_t tokens = context->tokens();
  const int64_t count = static_cast<int64_t>(tokens) * spec.hidden_size;
  if (tokens <= kPrivateTokens) {
    const bool reduced = context->Collect(thread, [&] {
      return context->communicator->AllReduceAddNorm(
          {.partial = Span(buffers.projected, count),
           .residual = Span(buffers.residual, count),
           .norm_weight = {norm_weight, static_cast<size_t>(spec.hidden_size)},
           .normed = Span(buffers.normed, count),
           .epsilon = spec.norm_epsilon});
    });
    if (!reduced) return false;
    *input = context->converter->Convert(
        thread, next, Rows(buffers.normed, tokens, spec.hidden_size), InputConverter::Rows::kReady);
    return true;
  }
  if (!ReduceIntoResidual(context, thread)) return false;
  NormOwnTokens(context, thread, norm_weight, next, input);
  return true;
}

bool ReduceIntoResidual(RankContext* context, int32_t thread) {
  const Buffers& buffers = *context->buffers;
  const int32_t hidden = context->model->spec().hidden_size;
  const int32_t tokens = context->tokens();
  if (context->communicator->size() == 1) {
    context->team->Barrier(thread);
  } else if (!context->Collect(thread, [&] {
               return context->communicator->AllReduceSum(
                   Span(buffers.projected, static_cast<int64_t>(tokens) * hidden));
             })) {
    return false;
  }
  const cpu::BlockRange mine = ShareOf(tokens, thread, context->team->threads());
  const int64_t at = static_cast<int64_t>(mine.begin) * hidden;
  context->kernels->add(buffers.residual + at, buffers.projected + at,
                        static_cast<int64_t>(mine.end - mine.begin) * hidden);
  return true;
}

void NormResidual(RankContext* context, int32_t thread, const float* norm_weight, InputForm next,
                  MatrixInput* input) {
  const model::ModelSpec& spec = context->model->spec();
  const int32_t tokens = context->tokens();
  context->team->Barrier(thread);
  if (tokens > kPrivateTokens) {
    NormOwnTokens(context, thread, norm_weight, next, input);
    return;
  }
  if (thread == 0) {
    context->kernels->rms_norm(Rows(context->buffers->residual, tokens, spec.hidden_size),
                               norm_weight, spec.norm_epsilon, context->buffers->normed,
                               spec.hidden_size);
  }
  context->team->Barrier(thread);
  *input = context->converter->Convert(thread, next,
                                       Rows(context->buffers->normed, tokens, spec.hidden_size),
                                       InputConverter::Rows::kReady);
}

}  // namespace nibble::execution
