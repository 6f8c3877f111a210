// The shares of all ranks together hold the model, in the form that headers announce.
#include "worker/weights/rank_weights.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tensor_files.h"
#include "tests/support/test_data.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::weights {
namespace {

constexpr const char* kFolders[] = {"llama", "llama-biases",   "mistral-window",
                                    "qwen3", "llama-awq-gemm", "qwen2-awq-quantized-head"};

std::unique_ptr<Checkpoint> Open(const std::string& name) {
  auto checkpoint =
      Checkpoint::Open(nibble::testing::SourceDir() + "/tests/data/model-specs/" + name);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

// What a loader hands to the packer is what the plan was made from.
void ExpectFormat(const PackedFormat& format, const absl::StatusOr<LogicalLinear>& loaded) {
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(format.rows, loaded->rows);
  EXPECT_EQ(format.columns, loaded->columns);
  EXPECT_EQ(format.kind == PackedKind::kW4, loaded->quantized());
  EXPECT_EQ(format.group, loaded->group_size);
  EXPECT_EQ(format.type, loaded->stored_type);
  EXPECT_EQ(format.bias, !loaded->bias.empty());
  const size_t count = static_cast<size_t>(loaded->rows) * loaded->columns;
  EXPECT_EQ(loaded->quantized() ? loaded->q.size() : loaded->dense.size(), count);
}

// Rows [from, from + count) of a fused matrix against rows of the checkpoint's own.
void ExpectRows(const LogicalLinear& fused, int32_t from, const Checkpoint& checkpoint,
                const std::string& name, Range rows) {
  const auto whole = checkpoint.LoadLinear(name);
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(Dequantize(SliceRows(fused, from, from + rows.count())),
            Dequantize(SliceRows(*whole, rows.begin, rows.end)));
  if (!whole->bias.empty()) {
    EXPECT_EQ(fused.bias[from], whole->bias[rows.begin]);
  }
}

void ExpectColumns(const LogicalLinear& part, const Checkpoint& checkpoint, const std::string& name,
                   Range columns) {
  const auto whole = checkpoint.LoadLinear(name);
  ASSERT_TRUE(whole.ok());
  const std::vector<float> all = Dequantize(*whole), some = Dequantize(part);
  for (int32_t n = 0; n < part.rows; ++n) {
    for (int32_t k = 0; k < part.columns; ++k) {
      ASSERT_EQ(some[n * part.columns + k], all[n * whole->columns + columns.begin + k]);
    }
  }
  EXPECT_EQ(part.bias.empty(), whole->bias.empty() || columns.begin > 0);
}

void ExpectRank(const Checkpoint& checkpoint, const RankShare& share, int32_t layer) {
  const int32_t head_dim = checkpoint.spec().head_dim;
  const Range q{share.heads.begin * head_dim, share.heads.end * head_dim};
  const Range kv{share.kv_heads.begin * head_dim, share.kv_heads.end * head_dim};
  const auto formats = DescribeLayer(checkpoint, share, layer);
  ASSERT_TRUE(formats.ok()) << formats.status();
  const auto qkv = LoadQkv(checkpoint, share, layer);
  ExpectFormat(formats->qkv, qkv);
  ExpectRows(*qkv, 0, checkpoint, LinearName(layer, LinearRole::kQ), q);
  ExpectRows(*qkv, q.count(), checkpoint, LinearName(layer, LinearRole::kK), kv);
  ExpectRows(*qkv, q.count() + kv.count(), checkpoint, LinearName(layer, LinearRole::kV), kv);
  const auto gate_up = LoadGateUp(checkpoint, share, layer);
  ExpectFormat(formats->gate_up, gate_up);
  ExpectRows(*gate_up, 0, checkpoint, LinearName(layer, LinearRole::kGate), share.ffn);
  ExpectRows(*gate_up, share.ffn.count(), checkpoint, LinearName(layer, LinearRole::kUp),
             share.ffn);
  const auto o = LoadO(checkpoint, share, layer);
  ExpectFormat(formats->o, o);
  ExpectColumns(*o, checkpoint, LinearName(layer, LinearRole::kO), q);
  const auto down = LoadDown(checkpoint, share, layer);
  ExpectFormat(formats->down, down);
  ExpectColumns(*down, checkpoint, LinearName(layer, LinearRole::kDown), share.ffn);
}

TEST(RankWeightsTest, EveryRankHoldsItsPartInTheAnnouncedForm) {
  for (const char* folder : kFolders) {
    const auto checkpoint = Open(folder);
    for (int32_t ranks = 1; ranks <= checkpoint->spec().head_count; ++ranks) {
      SCOPED_TRACE(std::string(folder) + " over " + std::to_string(ranks));
      const auto shares = PlanShares(*checkpoint, ranks);
      // Groups of 32 cannot be cut at every head of 16, nor 128 columns be shared by 5 ranks.
      if (!shares.ok() || !DescribeLayer(*checkpoint, shares->back(), 0).ok()) continue;
      for (const RankShare& share : *shares) {
        if (!DescribeLayer(*checkpoint, share, 1).ok()) continue;
        ExpectRank(*checkpoint, share, 1);
        const auto format = DescribeRankHead(*checkpoint, share);
        const auto head = LoadRankHead(*checkpoint, share);
        ASSERT_TRUE(format.ok() && head.ok()) << format.status() << head.status();
        ExpectFormat(*format, head);
      }
    }
  }
}

TEST(RankWeightsTest, DegreesThatMustWorkDo) {
  const std::pair<const char*, int32_t> cases[] = {{"llama", 1},
                                                   {"llama", 2},
                                                   {"llama", 3},
                                                   {"llama", 4},
                                                   {"llama-awq-gemm", 1},
                                                   {"llama-awq-gemm", 3},
                                                   {"qwen3", 4},
                                                   {"qwen2-awq-quantized-head", 1},
                                                   {"qwen2-awq-quantized-head", 2}};
  for (const auto& [folder, ranks] : cases) {
    SCOPED_TRACE(std::string(folder) + " over " + std::to_string(ranks));
    const auto checkpoint = Open(folder);
    const auto shares = PlanShares(*checkpoint, ranks);
    ASSERT_TRUE(shares.ok()) << shares.status();
    for (const RankShare& share : *shares) {
      EXPECT_TRUE(DescribeLayer(*checkpoint, share, 0).ok());
    }
  }
}

TEST(RankWeightsTest, HeadsThatCutGroupsBelow32AreRefusedByName) {
  // 6 heads of 16 over 6 ranks: each rank would hold half a group of 32.
  const auto checkpoint = Open("llama-awq-gemm");
  RankShare share;
  share.rank_count = 6;
  share.heads = {1, 2};
  share.kv_heads = {0, 1};
  share.ffn = {0, 32};
  share.vocab = {0, 256};
  const auto layer = DescribeLayer(*checkpoint, share, 0);
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(layer.status().message().find("o_proj: the rank's columns 16 … 32 cut groups of 32"),
            absl::string_view::npos)
      << layer.status();
  EXPECT_FALSE(LoadO(*checkpoint, share, 0).ok());
}

class MixedLayersTest : public FolderTest {};

// k_proj of layer 0 left unquantized, as modules_to_not_convert does.
TEST_F(MixedLayersTest, AFusedMatrixWithADensePartIsDense) {
  const auto source = Open("llama-awq-gemm");
  const std::string k = LinearName(0, LinearRole::kK);
  std::vector<TestTensor> tensors;
  for (const std::string& name : source->TensorNames()) {
    if (name.starts_with(k)) continue;
    const TensorView& view = *source->Find(name);
    tensors.push_back(
        {name, std::string(TensorTypeName(view.type)), view.shape,
         std::string(reinterpret_cast<const char*>(view.data.data()), view.data.size())});
  }
  const auto original = source->LoadLinear(k);
  ASSERT_TRUE(original.ok());
  tensors.push_back(
      {k + ".weight", "F32", {original->rows, original->columns}, BytesOf(Dequantize(*original))});
  WriteAll(Path("model.safetensors"), FileOf(tensors));
  WriteAll(Path("config.json"), source->config().dump());
  const auto mixed = Checkpoint::Open(root_);
  ASSERT_TRUE(mixed.ok()) << mixed.status();
  for (const int32_t ranks : {1, 3}) {
    const auto shares = PlanShares(**mixed, ranks);
    ASSERT_TRUE(shares.ok()) << shares.status();
    for (const RankShare& share : *shares) {
      ExpectRank(**mixed, share, 0);
      ExpectRank(**mixed, share, 1);
      const auto formats = DescribeLayer(**mixed, share, 0);
      EXPECT_EQ(formats->qkv.kind, PackedKind::kDense);
      EXPECT_EQ(formats->qkv.type, FloatType::kF32);
      EXPECT_EQ(formats->o.kind, PackedKind::kW4);
    }
  }
}

TEST(RankWeightsTest, PackedBytesAreTheArraysOfTheLayout) {
  // 20 rows fill two blocks of 16: 32 * 64 / 2 nibble bytes, 32 * 2 scales and zeros.
  EXPECT_EQ(W4Bytes(20, 64, 32, FloatType::kF16), 1024 + 128 + 64);
  EXPECT_EQ(W4Bytes(20, 64, 32, FloatType::kF32), 1024 + 256 + 64);
  EXPECT_EQ(Int8MatrixBytes(20, 64), 2048 + 256);
  EXPECT_EQ(DenseBytes(20, 3, FloatType::kBF16), 192);
  EXPECT_EQ(DenseBytes(20, 3, FloatType::kF32), 384);
  PackedFormat format;
  format.kind = PackedKind::kW4;
  format.rows = 20;
  format.columns = 64;
  format.group = 32;
  format.bias = true;
  EXPECT_EQ(PackedBytes(format), 1024 + 128 + 64 + 128);
}

}  // namespace
}  // namespace nibble::weights
