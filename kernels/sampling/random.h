// Random numbers as a function of (seed, output index, token id), so that a sampled token depends
// on nothing else: not on the step, the batch, the slot or the rank.
//
// The generator is SplitMix64 (Steele, Lea, Flood 2014): an output index selects a stream, a token
// id an element of it.
#pragma once

#include <cstdint>

#include "kernels/sampling/portable_math.h"

namespace nibble::sampling {

inline constexpr uint64_t kSplitMixStep = 0x9e3779b97f4a7c15;

[[nodiscard]] constexpr uint64_t SplitMixFinish(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Element `index` of the sequence that SplitMix64 produces from `state`.
[[nodiscard]] constexpr uint64_t SplitMixAt(uint64_t state, uint64_t index) {
  return SplitMixFinish(state + (index + 1) * kSplitMixStep);
}

// The stream of one output. Finishing twice keeps neighbouring seeds and indices apart.
[[nodiscard]] constexpr uint64_t OutputStream(uint64_t seed, uint64_t output_index) {
  return SplitMixFinish(SplitMixAt(SplitMixFinish(seed + kSplitMixStep), output_index));
}

// 52 random bits k stand for the number (k + 1/2) / 2^52, exact and never 0 or 1.
[[nodiscard]] constexpr uint64_t UniformBits(uint64_t stream, int32_t token_id) {
  return SplitMixAt(stream, static_cast<uint64_t>(static_cast<uint32_t>(token_id))) >> 12;
}
[[nodiscard]] constexpr double UniformFromBits(uint64_t bits) {
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

// A standard Gumbel variate: the token with the largest log p + gumbel is a sample from p.
[[nodiscard]] constexpr double GumbelFromBits(uint64_t bits) {
  return -PortableLog(-PortableLog(UniformFromBits(bits)));
}
inline constexpr double kGumbelMax = 36.75;  // -log(-log(1 - 2^-53)) is 36.74

}  // namespace nibble::sampling
