#include "worker/execution/cuda/step_view.h"

namespace nibble::execution {

StepView ViewOfInputs(const std::byte* inputs, const StepOffsets& offsets, const StepShape& shape) {
  const auto at = [inputs]<typename T>(int64_t offset, const T** part) {
    *part = reinterpret_cast<const T*>(inputs + offset);
  };
  StepView view;
  view.tokens = shape.tokens;
  view.unit_count = UnitCapacity(shape.tiles);
  view.prompt_tile_count = shape.prompt_tiles;
  view.rows = shape.rows;
  at(offsets.token_ids, &view.token_ids);
  at(offsets.positions, &view.positions);
  at(offsets.blocks, &view.blocks);
  at(offsets.units, &view.units);
  at(offsets.prompt_tiles, &view.prompt_tiles);
  at(offsets.sample_rows, &view.sample_rows);
  at(offsets.row_tokens, &view.row_tokens);
  view.whole.count = shape.whole.rows;
  at(offsets.whole_rows, &view.whole.rows);
  at(offsets.biases, &view.whole.biases);
  at(offsets.ids, &view.whole.ids);
  at(offsets.mask_words, &view.whole.masks);
  view.histories.count = shape.whole.histories;
  at(offsets.histories, &view.histories.slots);
  at(offsets.history_tokens, &view.histories.tokens);
  view.drafted.count = shape.whole.drafted;
  view.drafted.ids = view.whole.ids;
  at(offsets.drafted, &view.drafted.sequences);
  return view;
}

}  // namespace nibble::execution
