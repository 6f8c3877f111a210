// Who may call: keys, their tenants, and what each has in use.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/api_keys.h"
#include "base/clock.h"
#include "base/periodic.h"
#include "services/gateway/metrics.h"
#include "services/gateway/token_bucket.h"

namespace nibble::gateway {

// Requests in flight against a bound. Thread-safe.
class Places {
 public:
  // 0 = no bound. Those inside stay.
  void SetLimit(int64_t limit) { limit_.store(limit); }
  [[nodiscard]] int64_t limit() const { return limit_.load(); }
  // True: the caller owes one Leave.
  [[nodiscard]] bool Enter() {
    const int64_t limit = limit_.load();
    if (taken_.fetch_add(1) < limit || limit == 0) return true;
    taken_.fetch_sub(1);
    return false;
  }
  void Leave() { taken_.fetch_sub(1); }
  [[nodiscard]] int64_t taken() const { return taken_.load(); }

 private:
  std::atomic<int64_t> limit_{0};
  std::atomic<int64_t> taken_{0};
};

// What all keys of a tenant share; it outlives a new reading of the file. Thread-safe.
class TenantAccount {
 public:
  TenantAccount(const Tenant& tenant, const TenantMetrics& metrics, Deadline now);
  void SetLimits(const Tenant& tenant, Deadline now);

  [[nodiscard]] const std::string& name() const { return name_; }
  // For the identity of prefixes that are kept: different for each tenant.
  [[nodiscard]] const std::string& prefix_salt() const { return prefix_salt_; }
  [[nodiscard]] Places& places() { return places_; }
  // RESOURCE_EXHAUSTED with the delay while the quota is used up.
  [[nodiscard]] absl::Status CheckQuota(Deadline now);
  void ChargePrompt(uint64_t tokens, Deadline now);
  void ChargeGenerated(uint64_t tokens, Deadline now);

 private:
  void Charge(uint64_t tokens, Deadline now);

  const std::string name_;
  const std::string prefix_salt_;
  const TenantMetrics metrics_;
  Places places_;
  // Of the standard library: the thread sanitizer cannot see into the distribution's abseil.
  std::mutex mutex_;
  int64_t tokens_per_minute_;  // guarded by mutex_, as what follows
  TokenBucket bucket_;
};

// One key. Immutable but for what is in use.
struct Caller {
  ApiKey key;
  std::shared_ptr<TenantAccount> tenant;
  std::shared_ptr<Places> places;  // the key's own; outlives a new reading of the file

  [[nodiscard]] bool MayUse(std::string_view model) const;
  // A place of the key and one of the tenant; RESOURCE_EXHAUSTED where one has none left. On
  // success the caller owes one Leave.
  [[nodiscard]] absl::Status Enter() const;
  void Leave() const;
};

// The keys file, read again while it is in use: a new one that does not hold is named in one line
// of the log and changes nothing. Thread-safe.
class Callers {
 public:
  struct Options {
    std::string path;
    const Clock* clock = nullptr;
    GatewayMetrics* metrics = nullptr;
    Duration look_every = std::chrono::seconds(1);
  };
  // INVALID_ARGUMENT in one line that names file and entry.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<Callers>> Open(const Options& options);
  Callers(const Callers&) = delete;
  Callers& operator=(const Callers&) = delete;

  // By the value of the metadata "authorization"; UNAUTHENTICATED where it is no known key's.
  [[nodiscard]] absl::StatusOr<std::shared_ptr<const Caller>> Find(
      std::string_view authorization) const;

 private:
  using List = std::vector<std::shared_ptr<const Caller>>;

  explicit Callers(const Options& options) : options_(options) {}
  void Take(ApiKeyFile file);
  void Look();

  const Options options_;
  mutable std::mutex list_mutex_;
  std::shared_ptr<const List> list_;  // guarded by list_mutex_
  // The thread's, once it runs.
  std::map<std::string, std::shared_ptr<TenantAccount>> tenants_;
  std::map<std::string, std::shared_ptr<Places>> places_;
  std::string last_text_;
  std::string last_report_;
  std::unique_ptr<Periodic> watch_;
};

}  // namespace nibble::gateway
