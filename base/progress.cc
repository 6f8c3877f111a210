#include "base/progress.h"

#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/units.h"

namespace nibble {
namespace {

constexpr Duration kQuiet = std::chrono::seconds(2);
constexpr Duration kTerminalPeriod = std::chrono::milliseconds(100);
constexpr Duration kLinePeriod = std::chrono::seconds(5);
constexpr int64_t kBarCells = 30;

void WriteAll(int descriptor, const std::string& text) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = write(descriptor, text.data() + written, text.size() - written);
    if (count <= 0) return;  // progress is not worth an error
    written += static_cast<size_t>(count);
  }
}

}  // namespace

Progress::Progress(Options options, const Clock* clock)
    : options_(std::move(options)), clock_(clock), start_(clock->Now()), next_(start_ + kQuiet) {}

Progress::~Progress() {
  if (drawn_ && options_.terminal) WriteAll(options_.descriptor, "\n");
}

Progress::Options Progress::ForStderr(std::string what, bool bytes) {
  return {.what = std::move(what),
          .bytes = bytes,
          .terminal = isatty(STDERR_FILENO) == 1,
          .descriptor = STDERR_FILENO};
}

void Progress::Update(int64_t done, int64_t total) {
  CHECK(done >= 0 && done <= total);
  const Deadline now = clock_->Now();
  // The end is shown at once where anything has been shown.
  const bool last = drawn_ && done == total;
  if (now < next_ && !last) return;
  next_ = now + (options_.terminal ? kTerminalPeriod : kLinePeriod);
  drawn_ = true;
  Draw(done, total);
}

void Progress::Draw(int64_t done, int64_t total) {
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
  const auto shown = [this](int64_t amount) {
    return options_.bytes ? FormatBytes(amount) : absl::StrCat(amount);
  };
  const std::string numbers =
      absl::StrFormat("%3.0f %%  %s of %s, %.0f s", share * 100, shown(done), shown(total),
                      std::chrono::duration<double>(clock_->Now() - start_).count());
  if (!options_.terminal) {
    WriteAll(options_.descriptor, absl::StrCat(options_.what, ": ", numbers, "\n"));
    return;
  }
  const auto full = static_cast<size_t>(share * kBarCells);
  WriteAll(options_.descriptor,
           absl::StrCat("\r", options_.what, " [", std::string(full, '#'),
                        std::string(kBarCells - full, '.'), "] ", numbers, "\x1b[K"));
}

}  // namespace nibble
