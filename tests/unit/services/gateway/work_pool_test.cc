#include "services/gateway/work_pool.h"

#include <gtest/gtest.h>

#include <atomic>

#include "absl/synchronization/notification.h"

namespace nibble::gateway {
namespace {

TEST(WorkPool, RefusesWhatDoesNotFit) {
  absl::Notification go;
  absl::Notification busy;
  std::atomic<int> ran{0};
  {
    WorkPool pool({.threads = 1, .queue_tasks = 2, .queue_bytes = 100});
    ASSERT_TRUE(pool.Submit(1, [&] {
      busy.Notify();
      go.WaitForNotification();
    }));
    busy.WaitForNotification();
    EXPECT_TRUE(pool.Submit(1000, [&] { ++ran; }));  // alone, whatever its size
    EXPECT_FALSE(pool.Submit(1, [&] { ++ran; }));    // by bytes
    go.Notify();
    while (pool.depth() > 0) std::this_thread::yield();
    EXPECT_TRUE(pool.Submit(60, [&] { ++ran; }));
  }
  EXPECT_EQ(ran, 2);  // what was queued ran before the pool went
}

TEST(WorkPool, RefusesByCount) {
  absl::Notification go;
  absl::Notification busy;
  WorkPool pool({.threads = 1, .queue_tasks = 2, .queue_bytes = 100});
  ASSERT_TRUE(pool.Submit(1, [&] {
    busy.Notify();
    go.WaitForNotification();
  }));
  busy.WaitForNotification();
  EXPECT_TRUE(pool.Submit(1, [] {}));
  EXPECT_TRUE(pool.Submit(1, [] {}));
  EXPECT_FALSE(pool.Submit(1, [] {}));
  EXPECT_EQ(pool.depth(), 2U);
  go.Notify();
}

}  // namespace
}  // namespace nibble::gateway
