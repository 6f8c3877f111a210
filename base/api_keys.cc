#include "base/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/rand.h>

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/config.h"
#include "base/digest.h"
#include "base/status.h"

namespace nibble {
namespace {

constexpr size_t kKeysMax = 4096;
constexpr size_t kNameMax = 64;
constexpr int64_t kCountMax = int64_t{1} << 40;
constexpr std::array<const char*, kPriorities> kPriorityWords = {"low", "normal", "high"};

// One value of the file, with its place for messages.
struct Field {
  const std::string& path;
  const std::string& key;  // "keys.alice-1.sha256"
  const std::vector<std::string>& texts;

  [[nodiscard]] absl::Status Bad(const std::string& allowed) const {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", key, " is not ", allowed));
  }
};

absl::Status ReadWord(const Field& field, std::string* target) {
  if (field.texts.size() != 1 || !IsKeyName(field.texts[0])) {
    return field.Bad("a name: 1 to 64 of a-z, A-Z, 0-9, - and _");
  }
  *target = field.texts[0];
  return absl::OkStatus();
}

absl::Status ReadCount(const Field& field, int64_t* target) {
  if (field.texts.size() != 1 || !absl::SimpleAtoi(field.texts[0], target) || *target < 1 ||
      *target > kCountMax) {
    return field.Bad(absl::StrCat("a number from 1 to ", kCountMax, "; left out: no limit"));
  }
  return absl::OkStatus();
}

absl::Status ReadHash(const Field& field, Sha256* target) {
  const std::string text = field.texts.size() == 1 ? field.texts[0] : "";
  if (text.size() != 2 * target->size() ||
      !std::all_of(text.begin(), text.end(), absl::ascii_isxdigit)) {
    return field.Bad("64 hexadecimal digits");
  }
  const std::string bytes = absl::HexStringToBytes(text);
  std::copy(bytes.begin(), bytes.end(), target->begin());
  return absl::OkStatus();
}

absl::Status ReadPriority(const Field& field, Priority* target) {
  for (size_t i = 0; i < kPriorities; ++i) {
    if (field.texts.size() != 1 || field.texts[0] != kPriorityWords[i]) continue;
    *target = static_cast<Priority>(i);
    return absl::OkStatus();
  }
  return field.Bad("low, normal or high");
}

absl::Status ReadSwitch(const Field& field, bool* target) {
  if (field.texts.size() != 1 || (field.texts[0] != "true" && field.texts[0] != "false")) {
    return field.Bad("true or false");
  }
  *target = field.texts[0] == "true";
  return absl::OkStatus();
}

absl::Status ReadKeyField(const Field& field, std::string_view name, ApiKey* key) {
  if (name == "sha256") return ReadHash(field, &key->hash);
  if (name == "tenant") return ReadWord(field, &key->tenant);
  if (name == "priority") return ReadPriority(field, &key->priority);
  if (name == "max_requests") return ReadCount(field, &key->max_requests);
  if (name == "admin") return ReadSwitch(field, &key->admin);
  if (name == "models") {
    key->models = field.texts;
    return key->models.empty() ? field.Bad("a list of one model or more; left out: all")
                               : absl::OkStatus();
  }
  return field.Bad("sha256, tenant, priority, max_requests, models or admin");
}

absl::Status ReadTenantField(const Field& field, std::string_view name, Tenant* tenant) {
  if (name == "max_requests") return ReadCount(field, &tenant->max_requests);
  if (name == "tokens_per_minute") return ReadCount(field, &tenant->tokens_per_minute);
  return field.Bad("max_requests or tokens_per_minute");
}

// "keys.alice-1.sha256" in its three parts.
absl::Status SplitKey(const Field& field, std::string* table, std::string* name,
                      std::string* entry) {
  const size_t first = field.key.find('.');
  const size_t last = field.key.rfind('.');
  if (first == std::string::npos || first == last) {
    return field.Bad("in a table of its own: [keys] NAME = {…} or [tenants] NAME = {…}");
  }
  *table = field.key.substr(0, first);
  *name = field.key.substr(first + 1, last - first - 1);
  *entry = field.key.substr(last + 1);
  if (*table != "keys" && *table != "tenants") return field.Bad("in [keys] or [tenants]");
  if (!IsKeyName(*name)) return field.Bad("named by 1 to 64 of a-z, A-Z, 0-9, - and _");
  return absl::OkStatus();
}

absl::Status CheckKeys(const std::string& path, const std::map<std::string, ApiKey>& keys) {
  const auto bad = [&path](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", parts...));
  };
  if (keys.empty()) return bad("has no key; nobody could call");
  if (keys.size() > kKeysMax) return bad("has more than ", kKeysMax, " keys");
  std::map<Sha256, std::string> by_hash;
  for (const auto& [id, key] : keys) {
    if (key.hash == Sha256{}) return bad("keys.", id, ".sha256 is not set");
    if (key.tenant.empty()) return bad("keys.", id, ".tenant is not set");
    const auto [other, fresh] = by_hash.emplace(key.hash, id);
    if (!fresh) return bad("keys.", id, " is the same key as keys.", other->second);
  }
  return absl::OkStatus();
}

}  // namespace

const char* PriorityWord(Priority priority) {
  return kPriorityWords[static_cast<size_t>(priority)];
}

bool IsKeyName(std::string_view name) {
  return !name.empty() && name.size() <= kNameMax &&
         std::all_of(name.begin(), name.end(), [](char letter) {
           return absl::ascii_isalnum(static_cast<unsigned char>(letter)) || letter == '-' ||
                  letter == '_';
         });
}

absl::StatusOr<ApiKeyFile> ReadApiKeys(const std::string& path) {
  ASSIGN_OR_RETURN(const auto values, ReadTomlFile(path));
  std::map<std::string, ApiKey> keys;
  std::map<std::string, Tenant> tenants;
  for (const auto& [key, texts] : values) {
    const Field field = {path, key, texts};
    std::string table;
    std::string name;
    std::string entry;
    RETURN_IF_ERROR(SplitKey(field, &table, &name, &entry));
    RETURN_IF_ERROR(table == "keys" ? ReadKeyField(field, entry, &keys[name])
                                    : ReadTenantField(field, entry, &tenants[name]));
  }
  RETURN_IF_ERROR(CheckKeys(path, keys));
  ApiKeyFile file;
  for (auto& [id, key] : keys) {
    key.id = id;
    tenants.try_emplace(key.tenant);
    file.keys.push_back(std::move(key));
  }
  for (auto& [name, tenant] : tenants) {
    tenant.name = name;
    file.tenants.push_back(std::move(tenant));
  }
  return file;
}

Sha256 HashOf(std::string_view text) {
  Digest digest;
  digest.Add(text);
  return digest.Finish();
}

std::string HexOf(const Sha256& hash) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(hash.data()), hash.size()));
}

bool Equal(const Sha256& a, const Sha256& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

std::string NewApiKey() {
  std::array<unsigned char, 32> bytes;
  CHECK(RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1);
  const absl::string_view view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  std::string text = absl::WebSafeBase64Escape(view);
  while (!text.empty() && text.back() == '=') text.pop_back();
  OPENSSL_cleanse(bytes.data(), bytes.size());
  return absl::StrCat("nbl_", text);
}

std::string FormatApiKey(const ApiKey& key) {
  std::string line =
      absl::StrCat(key.id, " = { sha256 = \"", HexOf(key.hash), "\", tenant = \"", key.tenant,
                   "\", priority = \"", PriorityWord(key.priority), "\"");
  if (key.max_requests > 0) absl::StrAppend(&line, ", max_requests = ", key.max_requests);
  if (!key.models.empty()) {
    absl::StrAppend(&line, ", models = [",
                    absl::StrJoin(key.models, ", ",
                                  [](auto* out, auto& one) {
                                    absl::StrAppend(out, "\"", absl::CEscape(one), "\"");
                                  }),
                    "]");
  }
  if (key.admin) absl::StrAppend(&line, ", admin = true");
  return line + " }";
}

}  // namespace nibble
