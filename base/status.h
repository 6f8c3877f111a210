// Status macros (the distribution's abseil has none).
//
// Errors of a caller or of the environment travel as absl::Status; the message
// says what, which and the limit. Our own mistakes are CHECKed (base/check.h).
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)             \
  do {                                          \
    absl::Status nibble_status_ = (expression); \
    if (!nibble_status_.ok()) [[unlikely]] {    \
      return nibble_status_;                    \
    }                                           \
  } while (false)

#define NIBBLE_STATUS_CONCAT_INNER(a, b) a##b
#define NIBBLE_STATUS_CONCAT(a, b) NIBBLE_STATUS_CONCAT_INNER(a, b)

// ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(path));
#define ASSIGN_OR_RETURN(declaration, expression)                                \
  auto NIBBLE_STATUS_CONCAT(nibble_statusor_, __LINE__) = (expression);          \
  if (!NIBBLE_STATUS_CONCAT(nibble_statusor_, __LINE__).ok()) [[unlikely]] {     \
    return std::move(NIBBLE_STATUS_CONCAT(nibble_statusor_, __LINE__)).status(); \
  }                                                                              \
  declaration = std::move(NIBBLE_STATUS_CONCAT(nibble_statusor_, __LINE__)).value()
