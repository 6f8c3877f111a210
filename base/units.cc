#include "base/units.h"

#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nibble {
namespace {

using Suffix = std::pair<std::string_view, double>;

constexpr std::array<Suffix, 10> kByteSuffixes = {{{"", 1},
                                                   {"B", 1},
                                                   {"KiB", 1024.0},
                                                   {"MiB", 1048576.0},
                                                   {"GiB", 1073741824.0},
                                                   {"TiB", 1099511627776.0},
                                                   {"KB", 1e3},
                                                   {"MB", 1e6},
                                                   {"GB", 1e9},
                                                   {"TB", 1e12}}};

constexpr std::array<Suffix, 6> kTimeSuffixes = {
    {{"ns", 1}, {"us", 1e3}, {"ms", 1e6}, {"s", 1e9}, {"m", 6e10}, {"h", 3.6e12}}};

// number * suffix, rounded; nullopt unless all of `text` is used and the result fits.
template <size_t kCount>
std::optional<int64_t> ParseScaled(std::string_view text, const std::array<Suffix, kCount>& table) {
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number, std::chars_format::fixed);
  if (error != std::errc() || !(number >= 0)) return std::nullopt;
  const std::string_view suffix(rest, static_cast<size_t>(end - rest));
  for (const auto& [name, factor] : table) {
    if (name != suffix) continue;
    const double value = std::round(number * factor);
    if (value >= 9223372036854775807.0) return std::nullopt;
    return static_cast<int64_t>(value);
  }
  return std::nullopt;
}

}  // namespace

std::optional<int64_t> ParseBytes(std::string_view text) {
  return ParseScaled(text, kByteSuffixes);
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  double value = static_cast<double>(bytes);
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  const bool whole = value == std::floor(value);
  return whole ? absl::StrFormat("%.0f%s", value, kUnits[unit])
               : absl::StrFormat("%.2f%s", value, kUnits[unit]);
}

std::optional<Duration> ParseDuration(std::string_view text) {
  if (text == "0") return Duration::zero();
  const auto ns = ParseScaled(text, kTimeSuffixes);
  return ns ? std::optional(Duration(*ns)) : std::nullopt;
}

std::string FormatDuration(Duration duration) {
  constexpr std::array<std::pair<const char*, int64_t>, 6> kUnits = {{{"h", 3'600'000'000'000},
                                                                      {"m", 60'000'000'000},
                                                                      {"s", 1'000'000'000},
                                                                      {"ms", 1'000'000},
                                                                      {"us", 1'000},
                                                                      {"ns", 1}}};
  const int64_t ns = duration.count();
  if (ns == 0) return "0";
  for (const auto& [name, length] : kUnits) {
    if (ns % length == 0) return absl::StrCat(ns / length, name);
  }
  return absl::StrCat(ns, "ns");
}

}  // namespace nibble
