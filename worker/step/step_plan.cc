#include "worker/step/step_plan.h"

namespace nibble::step {

void StepPlan::Clear() {
  step_id = 0;
  closed.clear();
  opened.clear();
  block_copies.clear();
  sequences.clear();
  token_ids.clear();
  block_ids.clear();
  mask_words.clear();
  mask_stride = 0;
}

void StepResult::Clear() {
  step_id = 0;
  sequences.clear();
  tokens.clear();
  top_logprobs.clear();
  timings = {};
}

}  // namespace nibble::step
