#include "tests/unit/kernels/amx_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/amx_products.h"
#include "kernels/cpu/avx512.h"

namespace nibble::cpu {
namespace {

[[noreturn]] void Fault(const char* what) {
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

// Eight tiles as the architecture describes them: palette 1, at most 16 rows of 64 bytes; what
// lies outside a tile's configured shape reads as zero.
class EmulatedTiles {
 public:
  void Configure(const TileConfig& config) {
    if (config.palette != 1) Fault("LDTILECFG: palette is not 1");
    if (config.start_row != 0) Fault("LDTILECFG: start row is not 0");
    for (int i = 0; i < 16; ++i) {
      if (i >= 8 && (config.rows[i] != 0 || config.row_bytes[i] != 0)) {
        Fault("LDTILECFG: more than eight tiles");
      }
      if (config.rows[i] > 16 || config.row_bytes[i] > 64) Fault("LDTILECFG: tile too large");
      if ((config.rows[i] == 0) != (config.row_bytes[i] == 0)) Fault("LDTILECFG: half a shape");
    }
    config_ = config;
    configured_ = true;
    std::memset(tiles_, 0, sizeof(tiles_));
  }
  void Release() { configured_ = false; }

  template <int kTile>
  void Zero() {
    Check(kTile);
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void Load(const void* from, int64_t row_stride) {
    Zero<kTile>();
    for (int row = 0; row < config_.rows[kTile]; ++row) {
      std::memcpy(tiles_[kTile][row], static_cast<const char*>(from) + row * row_stride,
                  config_.row_bytes[kTile]);
    }
  }
  template <int kTile>
  void Store(void* to, int64_t row_stride) {
    Check(kTile);
    for (int row = 0; row < config_.rows[kTile]; ++row) {
      std::memcpy(static_cast<char*>(to) + row * row_stride, tiles_[kTile][row],
                  config_.row_bytes[kTile]);
    }
  }
  template <int kResult, int kLeft, int kRight>
  void Dot() {
    Check(kResult);
    Check(kLeft);
    Check(kRight);
    if (config_.rows[kLeft] != config_.rows[kResult]) Fault("TDPBSUD: rows differ");
    if (config_.row_bytes[kLeft] / 4 != config_.rows[kRight]) Fault("TDPBSUD: depths differ");
    if (config_.row_bytes[kRight] != config_.row_bytes[kResult]) Fault("TDPBSUD: widths differ");
    for (int m = 0; m < config_.rows[kResult]; ++m) {
      for (int k = 0; k < config_.row_bytes[kLeft] / 4; ++k) {
        for (int n = 0; n < config_.row_bytes[kResult] / 4; ++n) {
          AddDot<kResult, kLeft, kRight>(m, k, n);
        }
      }
    }
  }

 private:
  void Check(int tile) const {
    if (!configured_) Fault("tile used without configuration");
    if (config_.rows[tile] == 0) Fault("tile has no shape");
  }
  template <int kResult, int kLeft, int kRight>
  void AddDot(int m, int k, int n) {
    int32_t sum = 0;
    std::memcpy(&sum, &tiles_[kResult][m][4 * n], sizeof(sum));
    for (int i = 0; i < 4; ++i) {
      sum += static_cast<int8_t>(tiles_[kLeft][m][4 * k + i]) * tiles_[kRight][k][4 * n + i];
    }
    std::memcpy(&tiles_[kResult][m][4 * n], &sum, sizeof(sum));
  }

  TileConfig config_;
  bool configured_ = false;
  uint8_t tiles_[8][16][64] = {};
};

}  // namespace

void GemmW4Int8AmxEmulated(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                           BlockRange blocks) {
  MultiplyW4AmxAndRest<EmulatedTiles>(w, x, y, blocks, GemmW4Int8Avx512);
}

}  // namespace nibble::cpu
