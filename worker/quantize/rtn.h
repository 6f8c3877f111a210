// Round-to-nearest quantization of a whole checkpoint: no calibration, minutes at most.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace nibble::quantize {

struct RtnOptions {
  std::string input_folder;   // an unquantized Hugging Face model folder
  std::string output_folder;  // must not exist, or be empty
  int32_t group_size = 128;   // 32, 64, 128, or -1 for the whole row
  int32_t threads = 1;
  int64_t shard_bytes_max = int64_t{4} << 30;  // of one safetensors file
  // Called as layers are done, from one thread at a time: input bytes.
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
};

// Writes an AutoAWQ `gemm` checkpoint: the decoder's linear layers in 4 bits (the law is in
// round_to_nearest.h), embedding, norms, biases and head in fp16, config.json with its
// quantization_config, and the tokenizer and generation files as they are. The bytes written do not
// depend on the number of threads. The folder appears under its name only when it is complete and
// on disk; after a failure nothing is left behind (a killed process leaves OUTPUT.partial-XXXXXX).
//
// INVALID_ARGUMENT names a tensor that cannot be quantized (rows no multiple of 8, columns no
// multiple of the group, a value beyond fp16); ALREADY_EXISTS for the output; FAILED_PRECONDITION
// when the input is quantized already.
[[nodiscard]] absl::Status QuantizeRtn(const RtnOptions& options);

}  // namespace nibble::quantize
