#include "services/gateway/callers.h"

#include <filesystem>
#include <fstream>
#include <thread>

#include "base/grpc_status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

using std::chrono::seconds;

class ManualClock final : public Clock {
 public:
  Deadline Now() const override { return now_; }
  void Pass(Duration time) { now_ += time; }

 private:
  Deadline now_{seconds(1000)};
};

TEST(TokenBucketTest, AMinutesWorthAtOnceAndThenTheRate) {
  Deadline now{};
  TokenBucket bucket(600, now);
  EXPECT_EQ(bucket.Wait(now), Duration::zero());
  bucket.Take(600, now);
  EXPECT_NEAR(std::chrono::duration<double>(bucket.Wait(now)).count(), 0.1, 1e-6);
  now += seconds(3);  // 30 tokens
  EXPECT_EQ(bucket.Wait(now), Duration::zero());
  now += seconds(3600);  // no more than a minute's worth is saved up
  bucket.Take(601, now);
  EXPECT_GT(bucket.Wait(now), Duration::zero());
}

TEST(TokenBucketTest, WhatWasOverdrawnIsPaidOff) {
  Deadline now{};
  TokenBucket bucket(60, now);
  bucket.Take(60 + 120, now);
  EXPECT_NEAR(std::chrono::duration<double>(bucket.Wait(now)).count(), 121, 1e-6);
  now += seconds(120);
  EXPECT_GT(bucket.Wait(now), Duration::zero());
  now += seconds(2);
  EXPECT_EQ(bucket.Wait(now), Duration::zero());
}

// Whatever is asked for and when, what goes through stays below rate * time + a minute's worth +
// the last request's overdraft.
TEST(TokenBucketTest, TheRateHoldsOverAnyTime) {
  Deadline now{};
  TokenBucket bucket(600, now);
  uint64_t through = 0;
  for (int64_t i = 0; i < 100000; ++i) {
    now += std::chrono::milliseconds(i * 7919 % 100);
    if (bucket.Wait(now) > Duration::zero()) continue;
    const uint64_t tokens = 1 + static_cast<uint64_t>(i * 104729 % 200);
    bucket.Take(tokens, now);
    through += tokens;
  }
  const double minutes = std::chrono::duration<double>(now.time_since_epoch()).count() / 60;
  EXPECT_LE(static_cast<double>(through), 600 * minutes + 600 + 200);
  EXPECT_GE(static_cast<double>(through), 600 * minutes);
}

TEST(TokenBucketTest, ANewRateKeepsWhatWasUsedAndNoneIsNoBound) {
  Deadline now{};
  TokenBucket bucket(100, now);
  bucket.Take(90, now);
  bucket.SetRate(80, now);
  EXPECT_GT(bucket.Wait(now), Duration::zero());
  bucket.SetRate(0, now);
  bucket.Take(1 << 30, now);
  EXPECT_EQ(bucket.Wait(now), Duration::zero());
  bucket.SetRate(100, now);
  EXPECT_EQ(bucket.Wait(now), Duration::zero());
}

class CallersTest : public ::testing::Test {
 protected:
  CallersTest() : metrics_({"g0"}) {}
  ~CallersTest() override { std::filesystem::remove(path_); }

  void Write(const std::string& text) {
    std::ofstream(path_ + ".next") << text;
    std::filesystem::rename(path_ + ".next", path_);
  }
  // A line of the file for this key.
  static std::string Line(const std::string& id, const std::string& key, const std::string& more) {
    return id + " = { sha256 = \"" + HexOf(HashOf(key)) + "\", " + more + " }\n";
  }
  void Open() {
    auto callers = Callers::Open({.path = path_,
                                  .clock = &clock_,
                                  .metrics = &metrics_,
                                  .look_every = std::chrono::milliseconds(5)});
    ASSERT_TRUE(callers.ok()) << callers.status();
    callers_ = *std::move(callers);
  }
  std::shared_ptr<const Caller> Find(const std::string& authorization) {
    const auto caller = callers_->Find(authorization);
    if (caller.ok()) return *caller;
    EXPECT_EQ(caller.status().code(), absl::StatusCode::kUnauthenticated);
    EXPECT_EQ(ErrorReason(caller.status()), reason::kUnauthenticated);
    return nullptr;
  }
  bool WaitFor(const std::function<bool()>& condition) {
    for (int i = 0; i < 2000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }

  const std::string path_ = ::testing::TempDir() + "/callers-" + std::to_string(getpid());
  ManualClock clock_;
  GatewayMetrics metrics_;
  std::unique_ptr<Callers> callers_;
};

TEST_F(CallersTest, OnlyTheWholeKeyIsTheKey) {
  Write("[keys]\n" + Line("a", "nbl_secret", "tenant = \"t\"") +
        Line("b", "nbl_other", "tenant = \"u\""));
  Open();
  ASSERT_NE(Find("Bearer nbl_secret"), nullptr);
  EXPECT_EQ(Find("Bearer nbl_secret")->key.id, "a");
  EXPECT_EQ(Find("bearer nbl_other")->tenant->name(), "u");
  for (const std::string& wrong :
       {std::string(), std::string("Bearer"), std::string("Bearer "), std::string("nbl_secret"),
        std::string("Basic nbl_secret"), std::string("Bearer nbl_secre"),
        std::string("Bearer nbl_secret "), std::string("Bearer  nbl_secret"),
        std::string("Bearer NBL_SECRET"), "Bearer " + HexOf(HashOf("nbl_secret")),
        "Bearer nbl_secret" + std::string(1, '\0'), "Bearer " + std::string(100000, 'x')}) {
    EXPECT_EQ(Find(wrong), nullptr) << wrong.substr(0, 40);
  }
}

TEST_F(CallersTest, LimitsOfKeyAndTenantHoldTogether) {
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\", max_requests = 2") +
        Line("b", "y", "tenant = \"t\"") + "[tenants]\nt = { max_requests = 3 }\n");
  Open();
  const auto a = Find("Bearer x");
  const auto b = Find("Bearer y");
  EXPECT_TRUE(a->Enter().ok());
  EXPECT_TRUE(a->Enter().ok());
  const absl::Status full = a->Enter();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(full), reason::kQuota);
  EXPECT_EQ(Pushback(full), "-1");
  EXPECT_TRUE(b->Enter().ok());
  EXPECT_FALSE(b->Enter().ok());  // the tenant's
  a->Leave();
  EXPECT_TRUE(b->Enter().ok());
  a->Leave();
  b->Leave();
  b->Leave();
  EXPECT_EQ(a->places->taken(), 0);
  EXPECT_EQ(a->tenant->places().taken(), 0);
}

TEST_F(CallersTest, AUsedUpQuotaSaysWhenToComeBack) {
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\"") +
        "[tenants]\nt = { tokens_per_minute = 60 }\n");
  Open();
  const auto caller = Find("Bearer x");
  EXPECT_TRUE(caller->tenant->CheckQuota(clock_.Now()).ok());
  caller->tenant->ChargePrompt(50, clock_.Now());
  caller->tenant->ChargeGenerated(19, clock_.Now());
  const absl::Status used = caller->tenant->CheckQuota(clock_.Now());
  EXPECT_EQ(used.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(used), reason::kQuota);
  EXPECT_EQ(Pushback(used), "10000");
  clock_.Pass(seconds(10));
  EXPECT_TRUE(caller->tenant->CheckQuota(clock_.Now()).ok());
}

TEST_F(CallersTest, ANewFileIsTakenWithWhatIsInUse) {
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\", max_requests = 1") +
        "[tenants]\nt = { tokens_per_minute = 60 }\n");
  Open();
  const auto before = Find("Bearer x");
  ASSERT_TRUE(before->Enter().ok());
  before->tenant->ChargePrompt(100, clock_.Now());
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\", max_requests = 2") +
        Line("b", "y", "tenant = \"t\"") + "[tenants]\nt = { tokens_per_minute = 60 }\n");
  ASSERT_TRUE(WaitFor([&] { return callers_->Find("Bearer y").ok(); }));
  const auto after = Find("Bearer x");
  EXPECT_EQ(after->places->taken(), 1);
  EXPECT_TRUE(after->Enter().ok());
  EXPECT_FALSE(after->tenant->CheckQuota(clock_.Now()).ok());
  after->Leave();
  before->Leave();  // by what it was entered with
  EXPECT_EQ(after->places->taken(), 0);
  // Taken out: unknown from now on, and what it began ends as it may.
  Write("[keys]\n" + Line("b", "y", "tenant = \"t\""));
  EXPECT_TRUE(WaitFor([&] { return !callers_->Find("Bearer x").ok(); }));
}

TEST_F(CallersTest, AFileThatDoesNotHoldChangesNothing) {
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\""));
  Open();
  Write("[keys]\nb = { tenant = \"t\" }\n");
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_NE(Find("Bearer x"), nullptr);
  std::filesystem::remove(path_);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_NE(Find("Bearer x"), nullptr);
  Write("[keys]\n" + Line("c", "z", "tenant = \"t\""));
  EXPECT_TRUE(WaitFor([&] { return callers_->Find("Bearer z").ok(); }));
}

TEST_F(CallersTest, TenantsAreCountedByNameUpToABound) {
  for (int i = 0; i < 300; ++i) (void)metrics_.ForTenant(std::to_string(i));
  metrics_.ForTenant("0").prompt_tokens->Increment(5);
  EXPECT_EQ(metrics_.ForTenant("0").prompt_tokens->Value(), 5);
  metrics_.ForTenant("299").generated_tokens->Increment(7);
  EXPECT_EQ(metrics_.ForTenant("298").generated_tokens->Value(), 7);  // both are "other"
}

TEST_F(CallersTest, PrefixesOfTenantsHaveSaltsOfTheirOwn) {
  Write("[keys]\n" + Line("a", "x", "tenant = \"t\"") + Line("b", "y", "tenant = \"u\"") +
        Line("c", "z", "tenant = \"t\""));
  Open();
  EXPECT_EQ(Find("Bearer x")->tenant->prefix_salt().size(), 32u);
  EXPECT_NE(Find("Bearer x")->tenant->prefix_salt(), Find("Bearer y")->tenant->prefix_salt());
  EXPECT_EQ(Find("Bearer x")->tenant->prefix_salt(), Find("Bearer z")->tenant->prefix_salt());
}

}  // namespace
}  // namespace nibble::gateway
