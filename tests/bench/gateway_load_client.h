// Clients of a load test: many streams at once from one process, every token checked and its
// distance to the one before noted.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"

namespace nibble::bench {

struct LoadPlan {
  std::string address;
  bool gateway = true;  // else the leader, with token ids
  int32_t streams = 0;
  int32_t tokens = 0;      // of each stream
  int32_t vocab_size = 0;  // of the fake executor
  Duration ramp{};         // streams begin spread over this time
  Duration measured{};     // the time looked at begins once every stream has had a token
  Duration limit{};        // for the whole; what still runs then is an error
  int32_t per_connection = 50;
  // Every stream reads until its first token and then no more, through a small window.
  bool stalled = false;
  // Of the streams this share, in percent, reads badly: every second of them one event a second,
  // the others nothing after their first token. Nothing of theirs is in the report.
  int32_t bad_percent = 0;
};

struct LoadReport {
  int32_t speaking = 0;           // streams that had had a token when that time began
  int64_t tokens = 0;             // in the time looked at
  std::vector<float> gaps_ms;     // there, one per token; tokens of one message are 0 apart
  std::vector<float> longest_ms;  // there, of each stream
  int32_t errors = 0;             // streams that did not end OK with all their tokens in order
  std::string first_error;
};

// The time looked at has begun, or is over. Called on the thread that runs the load.
class LoadObserver {
 public:
  virtual ~LoadObserver() = default;
  virtual void OnMeasuring() = 0;
  virtual void OnMeasured() = 0;
};

// Blocks until every stream has ended.
[[nodiscard]] LoadReport RunLoad(const LoadPlan& plan, LoadObserver* observer);

}  // namespace nibble::bench
