// Shows how far a long piece of work is: a bar on a terminal, a line now and then elsewhere.
// Nothing appears in the first two seconds.
#pragma once

#include <cstdint>
#include <string>

#include "base/clock.h"

namespace nibble {

// One thread.
class Progress {
 public:
  struct Options {
    std::string what;  // "packing weights"
    // Unit of the numbers: bytes are shown as sizes.
    bool bytes = false;
    bool terminal = false;  // is the output a terminal?
    int descriptor = 2;
  };

  // `clock` is borrowed.
  Progress(Options options, const Clock* clock);
  // Ends the bar's line.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // REQUIRES: 0 <= done <= total. Cheap: draws at most ten times a second on a terminal, and a
  // line every five seconds elsewhere.
  void Update(int64_t done, int64_t total);

  // On stderr, with stderr's own kind.
  [[nodiscard]] static Options ForStderr(std::string what, bool bytes);

 private:
  void Draw(int64_t done, int64_t total);

  Options options_;
  const Clock* clock_;
  Deadline start_;
  Deadline next_;
  bool drawn_ = false;
};

}  // namespace nibble
