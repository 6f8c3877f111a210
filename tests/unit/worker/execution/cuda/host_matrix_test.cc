#include "worker/execution/cuda/host_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "tests/support/test_data.h"
#include "worker/execution/cuda/activations.h"
#include "worker/weights/float_types.h"
#include "worker/weights/rank_weights.h"

namespace nibble::execution {
namespace {

TEST(HostMatrix, ValuesBeyondFp16AreRefusedByName) {
  const std::vector<float> values = {1.5f, -65504.0f, 70000.0f};
  const auto narrowed = Narrow(values, cuda::Element::kHalf, "model.layers.3.mlp.down_proj");
  EXPECT_TRUE(absl::IsInvalidArgument(narrowed.status()));
  EXPECT_THAT(std::string(narrowed.status().message()),
              ::testing::HasSubstr("model.layers.3.mlp.down_proj holds 70000"));
  const auto fits = Narrow(std::span(values).first(2), cuda::Element::kHalf, "w");
  ASSERT_TRUE(fits.ok());
  EXPECT_EQ(weights::HalfToFloat((*fits)[1]), -65504.0f);
}

TEST(HostMatrix, Bf16ReachesFurtherAndRoundsToTheNearestEven) {
  const std::vector<float> values = {70000.0f, 1.00390625f, 1.01171875f, -1.0f};
  const auto narrowed = Narrow(values, cuda::Element::kBfloat16, "w");
  ASSERT_TRUE(narrowed.ok()) << narrowed.status();
  EXPECT_THAT(*narrowed, ::testing::ElementsAre(0x4789, 0x3f80, 0x3f82, 0xbf80));
  const std::vector<float> beyond = {3.4e38f};
  EXPECT_TRUE(absl::IsInvalidArgument(Narrow(beyond, cuda::Element::kBfloat16, "w").status()));
}

TEST(Activations, AutoIsWhatTheModelWasTrainedIn) {
  model::ModelSpec spec;
  EXPECT_EQ(ElementOf(Activations::kAuto, spec), cuda::Element::kHalf);
  spec.stored_type = "float32";
  EXPECT_EQ(ElementOf(Activations::kAuto, spec), cuda::Element::kHalf);
  spec.stored_type = "bfloat16";
  EXPECT_EQ(ElementOf(Activations::kAuto, spec), cuda::Element::kBfloat16);
  EXPECT_EQ(ElementOf(Activations::kHalf, spec), cuda::Element::kHalf);
  EXPECT_EQ(ElementOf(Activations::kBfloat16, model::ModelSpec{}), cuda::Element::kBfloat16);
}

// Threads read ahead; what comes out is in order and complete.
TEST(MatrixQueue, GivesEveryMatrixOfARankInOrder) {
  const auto folder = testing::TestData("models/smollm2-135m-awq-gemm-g64", "MatrixQueue");
  if (!folder.has_value()) return;
  const auto checkpoint = weights::Checkpoint::Open(*folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto shares = weights::PlanShares(**checkpoint, 2);
  ASSERT_TRUE(shares.ok());
  const weights::RankShare& share = (*shares)[1];
  MatrixQueue queue(**checkpoint, share, cuda::Element::kHalf, /*stored=*/false);
  const int32_t layers = (*checkpoint)->spec().layer_count;
  for (int32_t layer = 0; layer < layers; ++layer) {
    const auto qkv = queue.Next();
    const auto o = queue.Next();
    const auto gate_up = queue.Next();
    const auto down = queue.Next();
    ASSERT_TRUE(qkv.ok() && o.ok() && gate_up.ok() && down.ok());
    EXPECT_EQ(gate_up->rows, 2 * share.ffn.count());
    EXPECT_EQ(down->columns, share.ffn.count());
    if (layer != layers / 2) continue;
    const auto want = weights::LoadDown(**checkpoint, share, layer);
    ASSERT_TRUE(want.ok());
    EXPECT_EQ(down->q, want->q);
    EXPECT_EQ(down->zeros, want->zeros);
    EXPECT_EQ(down->group, want->group_size);
  }
  const auto head = queue.Next();
  ASSERT_TRUE(head.ok());
  EXPECT_EQ(head->rows, share.vocab.count());
  const auto embedding = queue.Next();
  ASSERT_TRUE(embedding.ok());
  EXPECT_EQ(embedding->rows, (*checkpoint)->spec().vocab_size);
}

std::vector<std::byte> BytesOf(const StoredBlock& block) {
  std::vector<std::byte> bytes(static_cast<size_t>(block.bytes()));
  // In two pieces, as a sender takes them.
  const int64_t half = block.lines / 2;
  CopyLines(block, 0, half, bytes.data());
  CopyLines(block, half, block.lines - half, bytes.data() + half * block.line_bytes);
  return bytes;
}

// [lines, rows / 8] words of eight rows in AutoAWQ's order -> [rows, lines].
std::vector<uint8_t> Unpacked(const StoredBlock& block) {
  constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  const std::vector<std::byte> bytes = BytesOf(block);
  const auto words = static_cast<size_t>(block.line_bytes / 4);
  const auto lines = static_cast<size_t>(block.lines);
  std::vector<uint8_t> values(8 * words * lines);
  for (size_t row = 0; row < 8 * words; ++row) {
    for (size_t line = 0; line < lines; ++line) {
      uint32_t word = 0;
      std::memcpy(&word, bytes.data() + 4 * (line * words + row / 8), 4);
      values[row * lines + line] = static_cast<uint8_t>(word >> (4 * kNibble[row % 8]) & 15);
    }
  }
  return values;
}

void ExpectSame(const StoredMatrix& stored, const absl::StatusOr<weights::LogicalLinear>& want) {
  ASSERT_TRUE(want.ok()) << want.status();
  EXPECT_EQ(stored.rows, want->rows);
  EXPECT_EQ(stored.columns, want->columns);
  EXPECT_EQ(stored.group, want->group_size);
  std::vector<uint8_t> q, zeros;
  for (const StoredPart& part : stored.parts) {
    const std::vector<uint8_t> more_q = Unpacked(part.values);
    const std::vector<uint8_t> more_zeros = Unpacked(part.zeros);
    EXPECT_EQ(part.scales.bytes(), 2 * static_cast<int64_t>(more_zeros.size()));
    q.insert(q.end(), more_q.begin(), more_q.end());
    zeros.insert(zeros.end(), more_zeros.begin(), more_zeros.end());
  }
  EXPECT_EQ(q, want->q);
  EXPECT_EQ(zeros, want->zeros);
  const std::vector<std::byte> scales = BytesOf(stored.parts.back().scales);
  uint16_t last = 0;
  std::memcpy(&last, scales.data() + scales.size() - 2, 2);
  EXPECT_EQ(weights::HalfToFloat(last), want->scales.back());
}

// What is sent as it lies in the file is what the host would have read.
TEST(StoredMatrix, HoldsARanksShareOfEveryFusedMatrix) {
  const auto folder = testing::TestData("models/smollm2-135m-awq-gemm-g64", "StoredMatrix");
  if (!folder.has_value()) return;
  const auto checkpoint = weights::Checkpoint::Open(*folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto shares = weights::PlanShares(**checkpoint, 2);
  ASSERT_TRUE(shares.ok());
  for (const weights::RankShare& share : *shares) {
    const auto qkv = FindStored(**checkpoint, share, 3, FusedMatrix::kQkv);
    const auto o = FindStored(**checkpoint, share, 3, FusedMatrix::kO);
    const auto gate_up = FindStored(**checkpoint, share, 3, FusedMatrix::kGateUp);
    const auto down = FindStored(**checkpoint, share, 3, FusedMatrix::kDown);
    ASSERT_TRUE(qkv.has_value() && o.has_value() && gate_up.has_value() && down.has_value());
    ExpectSame(*qkv, weights::LoadQkv(**checkpoint, share, 3));
    ExpectSame(*o, weights::LoadO(**checkpoint, share, 3));
    ExpectSame(*gate_up, weights::LoadGateUp(**checkpoint, share, 3));
    ExpectSame(*down, weights::LoadDown(**checkpoint, share, 3));
  }
}

TEST(StoredMatrix, OtherLayoutsAreLeftToTheHost) {
  for (const char* name : {"llama", "llama-biases"}) {
    const auto checkpoint =
        weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/" + name);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto shares = weights::PlanShares(**checkpoint, 1);
    ASSERT_TRUE(shares.ok());
    EXPECT_FALSE(FindStored(**checkpoint, (*shares)[0], 0, FusedMatrix::kQkv).has_value());
  }
}

TEST(StoredMatrix, DenseOnesMustBeOfTheElementType) {
  const auto checkpoint =
      weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/llama-biases");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(FindStoredEmbedding(**checkpoint, cuda::Element::kBfloat16).has_value());
  EXPECT_FALSE(FindStoredEmbedding(**checkpoint, cuda::Element::kHalf).has_value());
}

}  // namespace
}  // namespace nibble::execution
