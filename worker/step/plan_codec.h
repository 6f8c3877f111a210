// The wire form of plans and masks: what the plan ring and the stream between machines carry.
//
// Flat and little-endian, every value 4 or 8 bytes wide. One plan has exactly one wire form, so
// Encode(Decode(bytes)) gives the same bytes. Layout of a plan, in order:
//
//   u32 magic, u32 version, u64 step id
//   u32 counts: closed, opened, block copies, sequences, token ids, block ids, mask words
//   i32 mask stride
//   closed       i32 each
//   opened       i32 slot, i32 prompt count, i32 min tokens, u64 seed, f32 × 7 and i32 top_k of
//                the sampling parameters, u32 counts: biases, stop ids, history; then those
//   block copies i32 from, i32 to each
//   sequences    i32 × 12 each, in the order of SequenceStep's members
//   token ids, block ids, mask words
//
// Layout of masks: u32 magic, u32 version, u64 step id, u32 count of words, i32 stride, words.
#pragma once

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/step/step_plan.h"

namespace nibble::step {

// Bytes that Encode will write.
[[nodiscard]] size_t EncodedSize(const SlotSetup& setup);
[[nodiscard]] size_t EncodedSize(const StepPlan& plan);
[[nodiscard]] size_t EncodedSize(const MaskBatch& masks);

// Writes the wire form to the front of `out` and returns its size. RESOURCE_EXHAUSTED when `out`
// is too small.
[[nodiscard]] absl::StatusOr<size_t> Encode(const StepPlan& plan, std::span<std::byte> out);
[[nodiscard]] absl::StatusOr<size_t> Encode(const MaskBatch& masks, std::span<std::byte> out);

// Reads a wire form that fills `in` exactly. DATA_LOSS names the part that does not check out:
// besides sizes, every reference inside a plan (token, block and mask ranges, sample and draft
// counts, enumerations) is checked, so that an executor may index without looking. What depends
// on an executor's limits (slots, blocks, vocabulary) is the executor's to check.
//
// The vectors of *plan are reused: a step that opens no slot allocates nothing once they are warm.
// After an error *plan is valid but says nothing.
[[nodiscard]] absl::Status Decode(std::span<const std::byte> in, StepPlan* plan);
[[nodiscard]] absl::Status Decode(std::span<const std::byte> in, MaskBatch* masks);

}  // namespace nibble::step
