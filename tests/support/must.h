// For what a test cannot go on without.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/check.h"

namespace nibble::testing {

inline void Must(const absl::Status& status) { CHECK_MSG(status.ok(), status.ToString()); }

template <typename T>
T Must(absl::StatusOr<T> made) {
  Must(made.status());
  return std::move(*made);
}

}  // namespace nibble::testing
