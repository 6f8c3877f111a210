#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/api_keys.h"
#include "base/exit_codes.h"
#include "services/cli/commands.h"

namespace nibble::cli {
namespace {

int Fail(const std::string& message) {
  std::fprintf(stderr, "nibble keys: %s\n", message.c_str());
  return kExitConfiguration;
}

}  // namespace

int RunKeys(int argc, const char* const* argv) {
  std::string action;
  ApiKey key;
  ConfigParser parser(CommandProgram(
      "keys", "Makes an API key: prints it once, then the line that the gateway's keys file gets.",
      "nibble keys new --tenant acme"));
  parser.Group("Key");
  parser.Choice<std::string>("action", &action, {{"new", "new"}}, "What to do")
      .Positional()
      .Required();
  parser.String("tenant", &key.tenant, "Whose it is: keys of one tenant share quota and turn")
      .Required();
  parser.String("id", &key.id, "Its name in the file and in logs; empty: made from the tenant's");
  parser.Choice<Priority>(
      "priority", &key.priority,
      {{"low", Priority::kLow}, {"normal", Priority::kNormal}, {"high", Priority::kHigh}},
      "Higher ones get slots first, always");
  parser.Int("max_requests", &key.max_requests, {0, int64_t{1} << 40},
             "Requests in flight at one gateway; 0: no limit of its own");
  parser.List("models", &key.models, "Models that it may use; none: all");
  parser.Bool("admin", &key.admin, "It may use the admin service");
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  if (!IsKeyName(key.tenant) || (!key.id.empty() && !IsKeyName(key.id))) {
    return Fail("tenant and id allow 1 to 64 of a-z, A-Z, 0-9, - and _");
  }
  const std::string secret = NewApiKey();
  key.hash = HashOf(secret);
  if (key.id.empty()) {
    key.id = absl::StrCat(key.tenant.substr(0, 57), "-", HexOf(key.hash).substr(0, 6));
  }
  std::printf("%s\n%s\n", secret.c_str(), FormatApiKey(key).c_str());
  std::fputs(
      "The first line is the key: it is kept nowhere. The second goes into the table [keys] "
      "of the file that\nthe gateway's --keys-file names, and is in force within seconds.\n",
      stderr);
  return kExitDrained;
}

}  // namespace nibble::cli
