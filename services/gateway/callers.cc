#include "services/gateway/callers.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/logging.h"
#include "base/status.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

constexpr std::string_view kScheme = "Bearer ";
constexpr size_t kKeyBytesMax = 512;

std::string SaltOf(const std::string& tenant) {
  const Sha256 hash = HashOf(absl::StrCat("nibble prefix of tenant ", tenant));
  return std::string(reinterpret_cast<const char*>(hash.data()), hash.size());
}

// To see that it has changed.
std::string TextOf(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

}  // namespace

TenantAccount::TenantAccount(const Tenant& tenant, const TenantMetrics& metrics, Deadline now)
    : name_(tenant.name),
      prefix_salt_(SaltOf(tenant.name)),
      metrics_(metrics),
      tokens_per_minute_(tenant.tokens_per_minute),
      bucket_(tenant.tokens_per_minute, now) {
  places_.SetLimit(tenant.max_requests);
}

void TenantAccount::SetLimits(const Tenant& tenant, Deadline now) {
  places_.SetLimit(tenant.max_requests);
  const std::lock_guard lock(mutex_);
  if (tokens_per_minute_ == tenant.tokens_per_minute) return;
  tokens_per_minute_ = tenant.tokens_per_minute;
  bucket_.SetRate(tokens_per_minute_, now);
}

absl::Status TenantAccount::CheckQuota(Deadline now) {
  const std::lock_guard lock(mutex_);
  const Duration wait = bucket_.Wait(now);
  return wait == Duration::zero() ? absl::OkStatus() : TokenQuotaError(tokens_per_minute_, wait);
}

void TenantAccount::Charge(uint64_t tokens, Deadline now) {
  const std::lock_guard lock(mutex_);
  bucket_.Take(tokens, now);
}

void TenantAccount::ChargePrompt(uint64_t tokens, Deadline now) {
  Charge(tokens, now);
  metrics_.prompt_tokens->Increment(static_cast<double>(tokens));
}

void TenantAccount::ChargeGenerated(uint64_t tokens, Deadline now) {
  Charge(tokens, now);
  metrics_.generated_tokens->Increment(static_cast<double>(tokens));
}

bool Caller::MayUse(std::string_view model) const {
  return key.models.empty() ||
         std::find(key.models.begin(), key.models.end(), model) != key.models.end();
}

absl::Status Caller::Enter() const {
  if (!places->Enter()) return QuotaError("requests of this key in flight", places->limit());
  if (tenant->places().Enter()) return absl::OkStatus();
  places->Leave();
  return QuotaError("requests of this tenant in flight", tenant->places().limit());
}

void Caller::Leave() const {
  places->Leave();
  tenant->places().Leave();
}

absl::StatusOr<std::unique_ptr<Callers>> Callers::Open(const Options& options) {
  std::unique_ptr<Callers> callers(new Callers(options));
  callers->last_text_ = TextOf(options.path);
  ASSIGN_OR_RETURN(ApiKeyFile file, ReadApiKeys(options.path));
  callers->Take(std::move(file));
  callers->watch_ =
      std::make_unique<Periodic>(options.look_every, [raw = callers.get()] { raw->Look(); });
  return callers;
}

void Callers::Take(ApiKeyFile file) {
  const Deadline now = options_.clock->Now();
  for (const Tenant& tenant : file.tenants) {
    std::shared_ptr<TenantAccount>& account = tenants_[tenant.name];
    if (account == nullptr) {
      account =
          std::make_shared<TenantAccount>(tenant, options_.metrics->ForTenant(tenant.name), now);
    } else {
      account->SetLimits(tenant, now);
    }
  }
  auto list = std::make_shared<List>();
  for (ApiKey& key : file.keys) {
    std::shared_ptr<Places>& places = places_[key.id];
    if (places == nullptr) places = std::make_shared<Places>();
    places->SetLimit(key.max_requests);
    auto caller = std::make_shared<Caller>();
    caller->tenant = tenants_[key.tenant];
    caller->places = places;
    caller->key = std::move(key);
    list->push_back(std::move(caller));
  }
  const std::lock_guard lock(list_mutex_);
  list_ = std::move(list);
}

void Callers::Look() {
  std::string text = TextOf(options_.path);
  if (text == last_text_ && last_report_.empty()) return;
  auto file = ReadApiKeys(options_.path);
  if (!file.ok()) {
    std::string report(file.status().message());
    if (report == last_report_) return;  // once a second would be noise
    spdlog::error("keys_file {}; the keys read before stay in use", report);
    last_report_ = std::move(report);
    return;
  }
  last_text_ = std::move(text);
  last_report_.clear();
  spdlog::info("keys_file has been read again: {} keys", file->keys.size());
  Take(*std::move(file));
}

absl::StatusOr<std::shared_ptr<const Caller>> Callers::Find(std::string_view authorization) const {
  const absl::string_view value(authorization.data(), authorization.size());
  if (!absl::StartsWithIgnoreCase(value, absl::string_view(kScheme.data(), kScheme.size())) ||
      value.size() > kScheme.size() + kKeyBytesMax) {
    return UnauthenticatedError();
  }
  const Sha256 hash = HashOf(authorization.substr(kScheme.size()));
  std::shared_ptr<const List> list;
  {
    const std::lock_guard lock(list_mutex_);
    list = list_;
  }
  // All of them, whichever it is: how long it takes says nothing.
  std::shared_ptr<const Caller> found;
  for (const std::shared_ptr<const Caller>& caller : *list) {
    if (Equal(caller->key.hash, hash)) found = caller;
  }
  if (found == nullptr) return UnauthenticatedError();
  return found;
}

}  // namespace nibble::gateway
