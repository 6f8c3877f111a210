// Launches the kernels of a step on one stream: embedding, layers, head, sampling.
//
// With fusion, norms, the residual sum and SiLU·mul happen inside the matrix products and kernels
// start before the one before them has ended; without, every operation is a kernel of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_wgmma.h"
#include "worker/execution/cuda/cuda_model.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/gpu_group.h"
#include "worker/execution/cuda/launch_timer.h"
#include "worker/execution/cuda/step_inputs.h"

namespace nibble::execution {

struct DecoderOptions {
  int32_t max_step_tokens = 0;
  int32_t max_slots = 0;
  int32_t kv_blocks = 0;    // without the one that serves padding
  int32_t sample_rows = 0;  // rows whose logits are held at a time
  bool fusion = true;
  // Several ranks: every rank's share of the vocabulary, and this rank's group (borrowed).
  std::vector<weights::Range> vocab_shares = {};
  GpuGroup* group = nullptr;
  // kCount: a decoder that can only say what it would allocate; needs no device.
  DeviceArena::Mode mode = DeviceArena::Mode::kAllocate;
};

// Where a step's inputs and outputs lie on the device.
struct StepView {
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* blocks = nullptr;
  const cuda::AttentionUnit* units = nullptr;
  const cuda::AttentionTile* prompt_tiles = nullptr;
  const cuda::SampleRow* sample_rows = nullptr;
  const int32_t* row_tokens = nullptr;
  int32_t tokens = 0;
  int32_t unit_count = 0;
  int32_t prompt_tile_count = 0;
  int32_t rows = 0;
  bool every_token_sampled = false;  // row i is token i
  int64_t kv_positions = 0;          // that its sequences see; for LaunchTimer alone
  int64_t score_count = 0;           // the same of every token; for LaunchTimer alone
  cuda::SampledToken* sampled = nullptr;
  // Nothing that a graph holds.
  cuda::WholeParams whole = {};
  cuda::HistoryParams histories = {};
  cuda::DraftParams drafted = {};
};

// Owns the KV cache and the activations. One thread; the stream is borrowed.
class CudaDecoder {
 public:
  CudaDecoder(const CudaDecoder&) = delete;
  CudaDecoder& operator=(const CudaDecoder&) = delete;
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CudaDecoder>> Create(
      const CudaModel* model, const DecoderOptions& options, cudaStream_t stream);

  // Everything up to the residual stream after the last layer.
  [[nodiscard]] absl::Status Forward(const StepView& step);
  // Logits and tokens of rows [begin, end) of the step, at most sample_rows of them.
  [[nodiscard]] absl::Status SampleRows(const StepView& step, int32_t begin, int32_t end);

  // Entries of the block tables; `pairs` on the device.
  [[nodiscard]] absl::Status UpdateTables(const int32_t* pairs, int32_t count);
  // One KV block copy after the other; `from_to` on the device.
  [[nodiscard]] absl::Status CopyBlocks(const int32_t* from_to, int32_t count);
  // Counts of slots that begin with penalties.
  [[nodiscard]] absl::Status CountHistories(const cuda::HistoryParams& params);
  // Behind SampleRows of the same rows: those of them that ask for more than their best token.
  // Logits and last tokens are the decoder's.
  [[nodiscard]] absl::Status SampleWhole(cuda::WholeParams params);
  [[nodiscard]] absl::Status AcceptDrafts(cuda::DraftParams params);

  // nullptr: operations are not timed. Borrowed.
  void set_timer(LaunchTimer* timer) { timer_ = timer; }

  // What this rank gives to the others in a step: partial results and logits.
  [[nodiscard]] int64_t ExchangedBytes(int32_t tokens, int32_t rows) const;

  [[nodiscard]] const float* logits() const { return logits_; }
  [[nodiscard]] int64_t kv_bytes() const { return kv_arena_.bytes(); }
  [[nodiscard]] int64_t activation_bytes() const { return arena_.bytes(); }

 private:
  CudaDecoder(const CudaModel* model, const DecoderOptions& options, cudaStream_t stream)
      : model_(*model),
        options_(options),
        stream_(stream),
        kv_arena_(options.mode),
        arena_(options.mode) {}

  // A matrix product and what happens around it.
  struct Product {
    const char* name = "";
    const DeviceMatrix* matrix = nullptr;
    int32_t tokens = 0;
    const cuda::Real16* x = nullptr;
    const cuda::Real16* ordered = nullptr;  // or x as kernels/layout/gpu_x.h has it
    const float* ordered_scales = nullptr;  // not null: `ordered` is in fixed point
    bool normed_input = false;              // x stands for a normed input (w4_decode.h)
    bool in_fragments = false;              // x lies as a GpuFragmentOrder has it
    cuda::DecodeOutput output = cuda::DecodeOutput::kHalf;
    cuda::Real16* y_half = nullptr;
    float* y_float = nullptr;
    cuda::Real16* next_ordered = nullptr;     // with kSiluMul and `ordered`, in the place of y_half
    int32_t next_group = 128;                 // of the next product's weights
    const cuda::Real16* next_norm = nullptr;  // with kAddResidual: of the norm that follows
    // LeavesParts: the kernel that follows adds up what blocks leave; or Meets.
    bool in_parts = false;
    bool norm_follows = true;  // with kAddResidual: of every token, in this step
  };

  [[nodiscard]] absl::Status Allocate(int32_t table_size);
  [[nodiscard]] absl::Status AllocateOrdered();
  // Words that say by themselves that they have come: all bits are set.
  [[nodiscard]] absl::StatusOr<float*> AllocateWords(int64_t count);
  [[nodiscard]] absl::Status Multiply(const Product& product);
  // REQUIRES: at most 16 tokens.
  [[nodiscard]] absl::Status MultiplyFew(const Product& product);
  [[nodiscard]] absl::Status MultiplyMany(const Product& product);
  // On Hopper, where activations come in order or are put into it.
  [[nodiscard]] absl::Status MultiplyOrdered(const Product& product,
                                             const cuda::W4BatchParams& params);
  // The product before has left what this one takes in, if it has.
  void TakeLeft(cuda::WgmmaInput* input);
  // This one is to leave it.
  void Leave(const Product& product, cuda::WgmmaInput* input);
  // Of the matrix `next`'s input.
  [[nodiscard]] absl::Status Norm(const cuda::Real16* weight, const int32_t* rows, int32_t count,
                                  const DeviceMatrix& next);
  [[nodiscard]] absl::Status Layer(const StepView& step, int32_t layer);
  // KeepsRows: the last layer behind its qkv (decoder_sampling.cc).
  [[nodiscard]] absl::Status LastLayerOfRows(const StepView& step);
  [[nodiscard]] absl::Status RotateAndStore(const StepView& step, int32_t layer);
  [[nodiscard]] absl::Status Attend(const StepView& step, int32_t layer);
  [[nodiscard]] absl::Status Mlp(const StepView& step, int32_t layer);
  [[nodiscard]] absl::Status AddToResidual(const Product& product);
  // The same and more where several ranks hold parts (decoder_group.cc).
  [[nodiscard]] bool parallel() const { return options_.vocab_shares.size() > 1; }
  [[nodiscard]] absl::Status AllocateForGroup();
  [[nodiscard]] absl::Status AddOverRanks(const Product& product);
  [[nodiscard]] absl::Status JoinLogits(int32_t rows);
  [[nodiscard]] cuda::KvLayer Cache(int32_t layer) const;
  // How ranks take sums inside kernels, or nullptr where NCCL does.
  [[nodiscard]] const cuda::PeerExchange* Exchange() const {
    return parallel() && options_.group != nullptr ? options_.group->exchange() : nullptr;
  }
  [[nodiscard]] bool SumsInKernels() const { return !parallel() || Exchange() != nullptr; }
  // Up to how many tokens the decode kernel is faster than w4_wgmma.h.
  [[nodiscard]] static int32_t FewTokens() { return 8; }
  // Few enough tokens for the decode kernel, between whose products norms take no kernel.
  [[nodiscard]] bool NormsInProducts(int32_t tokens) const;
  // Where a norm of so many tokens leaves its results in order; nullptr: in normed_.
  [[nodiscard]] cuda::Real16* OrderedInput(int32_t tokens) const;
  // SiLU leaves its results in order, too, where they fill whole slabs: of more than a few tokens.
  [[nodiscard]] bool OrderedMlp() const;
  // Attention and norms of so many tokens add up themselves what qkv, o and down leave, norms over
  // all ranks.
  [[nodiscard]] bool LeavesParts(int32_t tokens) const;
  // Of fewer, o and down take the place of the norms behind them.
  [[nodiscard]] bool Meets(int32_t tokens) const;
  [[nodiscard]] bool RotatesInAttention(const StepView& step) const {
    return hopper_ && options_.fusion && step.every_token_sampled;
  }
  // Every product of the layers takes fixed point.
  [[nodiscard]] bool IsFixed(const StepView& step) const {
    return attention_scales_ != nullptr && Meets(step.tokens) &&
           step.tokens <= cuda::kWgmmaFixedTokens && RotatesInAttention(step) &&
           step.prompt_tile_count == 0;
  }
  [[nodiscard]] bool LayersTakeFixed() const;
  [[nodiscard]] absl::Status Embed(const StepView& step);
  // Of a prompt's tokens only those whose logits are asked for go on behind the last attention, by
  // the decode kernel.
  [[nodiscard]] bool KeepsRows(const StepView& step) const {
    return hopper_ && options_.fusion && !parallel() && !step.every_token_sampled &&
           step.tokens > cuda::kWgmmaMeetingTokens && step.rows <= FewTokens();
  }
  // The norm before the head is of every token, in order and at once.
  [[nodiscard]] bool LastNormTakesAll(const StepView& step) const {
    return step.every_token_sampled && step.rows == step.tokens &&
           step.rows <= options_.sample_rows;
  }
  // How results lie that attention leaves for the decode kernel.
  [[nodiscard]] layout::GpuFragmentOrder AttentionFragments(const StepView& step,
                                                            const DeviceLayer& layer) const;
  // Where attention leaves its results in order, or nullptr.
  [[nodiscard]] cuda::Real16* OrderedAttention(const StepView& step,
                                               const DeviceLayer& layer) const;
  [[nodiscard]] cuda::LaunchOptions Launch() const {
    return {.stream = stream_,
            .dependent = hopper_ && options_.fusion && timer_ == nullptr,
            .element = model_.element()};
  }
  // Behind an operation, where operations are timed.
  [[nodiscard]] absl::Status Timed(std::string_view name, int64_t bytes = 0, int64_t flops = 0) {
    return timer_ == nullptr ? absl::OkStatus() : timer_->Mark(name, bytes, flops);
  }

  const CudaModel& model_;
  const DecoderOptions options_;
  const cudaStream_t stream_;
  LaunchTimer* timer_ = nullptr;
  int32_t multiprocessors_ = 0;
  int32_t table_size_ = 0;
  // Of the normed input that the product launched last has left.
  int32_t square_parts_ = 1;
  int32_t scale_ = 0;  // index into scales_

  DeviceArena kv_arena_;
  DeviceArena arena_;
  uint8_t* kv_ = nullptr;
  int64_t kv_part_bytes_ = 0;  // one layer's keys or values
  int32_t* block_tables_ = nullptr;
  int32_t* last_tokens_ = nullptr;
  float* residual_ = nullptr;
  float* kept_residual_ = nullptr;  // of the rows that a prompt's step goes on with
  float* square_sums_ = nullptr;
  float* scales_[2] = {};
  bool hopper_ = false;            // else the portable kernels run
  cuda::Real16* ordered_[2] = {};  // activations as kernels/layout/gpu_x.h has them
  float* parts_ = nullptr;         // of a product, for the kernel that follows
  int32_t part_count_ = 0;         // that the product launched last has left
  // Where products meet (w4_wgmma.h), and what they leave for the next one; it reads that after the
  // product's own activations, so memory is its own.
  float* meeting_ = nullptr;
  float* help_ = nullptr;  // where idle multiprocessors help with gate-up (w4_wgmma.h)
  struct {
    cuda::Real16* x = nullptr;
    float* fixed_scales = nullptr;
    float* square_sums = nullptr;
    bool fixed = false;
    bool valid = false;  // by the product launched last
  } left_;
  bool is_fixed_ = false;              // the step
  float* attention_scales_ = nullptr;  // where attention leaves fixed point; nullptr: never
  float* mlp_scales_ = nullptr;        // where SiLU has left fixed point in ordered_[1]
  bool mlp_fixed_ = false;             // and whether the product launched last has
  cuda::Real16* normed_ = nullptr;
  cuda::Real16* qkv_ = nullptr;
  cuda::Real16* attention_ = nullptr;
  cuda::Real16* gate_up_ = nullptr;  // without fusion
  float* projected_ = nullptr;       // without fusion
  cuda::Real16* mlp_ = nullptr;
  float* logits_ = nullptr;
  float* partial_ = nullptr;          // several ranks: of o and down, fp32 or fp16
  bool partial_waits_ = false;        // in fp16, for the norm that follows to add
  float* own_logits_ = nullptr;       // several ranks: [rows, vocab share]
  float* gathered_logits_ = nullptr;  // several ranks: the ranks' own_logits_, padded
  float* attention_scratch_ = nullptr;
  cuda::SampleScratch* sample_scratch_ = nullptr;
};

}  // namespace nibble::execution
