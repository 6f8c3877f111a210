#include "services/cli/table.h"

#include <gtest/gtest.h>

namespace nibble::cli {
namespace {

TEST(Table, AlignsColumnsWithoutTrailingBlanks) {
  EXPECT_EQ(FormatTable({{"rank", "bytes", "x"}, {"0", "12", ""}, {"10", "1234567", "y"}}),
            "rank    bytes  x\n"
            "0          12\n"
            "10    1234567  y\n");
}

TEST(Table, OfNothingIsEmpty) { EXPECT_EQ(FormatTable({}), ""); }

}  // namespace
}  // namespace nibble::cli
