// Rows of text as aligned columns.
#pragma once

#include <string>
#include <vector>

namespace nibble::cli {

// The first row is the heading. Columns are two blanks apart; the first is aligned to the left,
// the others to the right. Every row has as many cells as the first.
[[nodiscard]] std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace nibble::cli
