// CHECK: on in every build, for mistakes that only nibble itself can make.
#pragma once

#include <string_view>

namespace nibble {

// Prints file, line, the condition and the message to stderr, then aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              std::string_view message);

}  // namespace nibble

#define CHECK(condition)                                         \
  do {                                                           \
    if (!(condition)) [[unlikely]] {                             \
      ::nibble::CheckFailed(__FILE__, __LINE__, #condition, {}); \
    }                                                            \
  } while (false)

#define CHECK_MSG(condition, message)                                   \
  do {                                                                  \
    if (!(condition)) [[unlikely]] {                                    \
      ::nibble::CheckFailed(__FILE__, __LINE__, #condition, (message)); \
    }                                                                   \
  } while (false)
