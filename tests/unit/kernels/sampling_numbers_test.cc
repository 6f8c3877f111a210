#include "kernels/sampling/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace nibble::sampling {
namespace {

TEST(PortableMathTest, ExpAgreesWithTheLibrary) {
  for (double x = -699.5; x < 699; x += 0.37) {
    const double expected = std::exp(x);
    EXPECT_NEAR(PortableExp(x) / expected, 1.0, 1e-13) << x;
  }
  EXPECT_EQ(PortableExp(0.0), 1.0);
  EXPECT_EQ(PortableExp(-1e9), 0.0);
  EXPECT_EQ(PortableExp(-INFINITY), 0.0);
}

TEST(PortableMathTest, LogAgreesWithTheLibrary) {
  for (double x = 1e-300; x < 1e300; x *= 1.7) {
    EXPECT_NEAR(PortableLog(x), std::log(x), 1e-13 * std::abs(std::log(x))) << x;
  }
  // Near 1 the relative error counts: a Gumbel variate takes the logarithm of the result.
  for (double d = 0x1p-53; d < 0.3; d *= 1.9) {
    EXPECT_NEAR(PortableLog(1.0 - d) / std::log(1.0 - d), 1.0, 1e-13) << d;
    EXPECT_NEAR(PortableLog(1.0 + 4 * d) / std::log(1.0 + 4 * d), 1.0, 1e-13) << d;
  }
  EXPECT_EQ(PortableLog(1.0), 0.0);
}

TEST(PortableMathTest, WeightsAgreeWithTheLibrary) {
  EXPECT_EQ(WeightUnits(0), kWeightOne);
  EXPECT_GE(WeightUnits(std::nextafter(kWeightReach, 0.0f)), 1u);
  for (float x = 0; x < kWeightReach; x += 0.000517f) {
    const double exact = std::exp(-static_cast<double>(x)) * 0x1p31;
    EXPECT_NEAR(WeightUnits(x), exact, 3e-6 * exact + 1) << x;
  }
}

// The first outputs for seed 1234567, as published with the reference implementation's ports.
TEST(RandomTest, ProducesSplitMix64) {
  const std::vector<uint64_t> published = {6457827717110365317u, 3203168211198807973u,
                                           9817491932198370423u, 4593380528125082431u,
                                           16408922859458223821u};
  for (size_t i = 0; i < published.size(); ++i) {
    EXPECT_EQ(SplitMixAt(1234567, i), published[i]);
  }
}

TEST(RandomTest, SeedsAndIndicesGiveDifferentStreams) {
  std::set<uint64_t> streams;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    for (uint64_t index = 0; index < 100; ++index) streams.insert(OutputStream(seed, index));
  }
  EXPECT_EQ(streams.size(), 10000u);
}

TEST(RandomTest, GumbelVariatesHaveTheirMeanAndVariance) {
  constexpr int kCount = 200'000;
  double sum = 0, squares = 0, largest = -1e9;
  for (int i = 0; i < kCount; ++i) {
    const double g = GumbelFromBits(UniformBits(OutputStream(7, 3), i));
    sum += g;
    squares += g * g;
    largest = std::max(largest, g);
  }
  const double mean = sum / kCount;
  EXPECT_NEAR(mean, 0.5772156649, 0.015);  // Euler's constant; the standard error is 0.003
  EXPECT_NEAR(squares / kCount - mean * mean, 1.6449340668, 0.04);  // pi^2 / 6
  EXPECT_LT(largest, kGumbelMax);
}

TEST(RandomTest, GumbelIsFiniteAtBothEnds) {
  EXPECT_NEAR(GumbelFromBits(0), -std::log(53 * std::log(2.0)), 1e-12);
  const double top = GumbelFromBits((uint64_t{1} << 52) - 1);
  EXPECT_NEAR(top, 53 * std::log(2.0), 1e-9);
  EXPECT_LT(top, kGumbelMax);
}

}  // namespace
}  // namespace nibble::sampling
