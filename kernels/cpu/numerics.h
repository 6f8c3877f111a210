// The constants that fix the bits of every operation; reference.cc shows the order in which they
// are used. Constants only: translation units of all instruction sets include this file.
#pragma once

#include <cstdint>

namespace nibble::cpu {

// Activations: xq = round-to-even(x * (limit / max|x|)), the limit by the number of int8 terms. A
// group below the floor counts as zero, so that the reciprocal stays finite; a group with NaN or
// infinity gets scale NaN and xq = 0, which makes every product of its token NaN and of no other.
inline constexpr float kQuantizeLimit = 127.0F;
inline constexpr float kQuantizeLimitOfTwo = 32512.0F;  // 127 * 256
inline constexpr float kQuantizeFloor = 0x1p-100F;
inline constexpr uint32_t kInfinityBits = 0x7f800000U;
inline constexpr uint32_t kNanBits = 0x7fc00000U;

// Element k of a row is summed in lane k % 64.
inline constexpr int32_t kNormLanes = 64;

// exp(x) = 2^n * p(r), n = x * log2(e) rounded to even, r = x - n * ln(2) in two steps. Adding
// kExpShift rounds, and leaves n + 127, the exponent of 2^n, in the low bits of the sum. p is an
// interpolation of degree 6 on |r| <= ln(2) / 2; its relative error is 0.2 * 2^-24, and with
// rounding exp is within 1 ulp. exp(0) is exactly 1. Arguments are clamped, NaN stays NaN.
inline constexpr float kExpLowest = -87.33654F;
inline constexpr float kExpHighest = 88.37626F;
inline constexpr float kLog2E = 0x1.715476p+0F;
inline constexpr float kExpShift = 0x1.8p23F + 127.0F;
inline constexpr float kLn2High = 0.693359375F;  // 9 bits: n * kLn2High is exact
inline constexpr float kLn2Low = -0x1.bd0106p-13F;
inline constexpr int32_t kExpTermCount = 7;
inline constexpr float kExpTerms[kExpTermCount] = {
    0x1.6d4334p-10F, 0x1.123da0p-7F, 0x1.5554e8p-5F, 0x1.55547cp-3F, 0.5F, 1.0F, 1.0F};

inline constexpr int32_t kKvBlock = 16;        // positions in a block of the KV cache
inline constexpr int32_t kAttentionTile = 64;  // positions between two steps of the softmax

}  // namespace nibble::cpu
