#include "worker/collectives/store.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace nibble::collectives {
namespace {

constexpr uint64_t kGroupKey = 0x1234567890;

Deadline In(Duration duration) { return std::chrono::steady_clock::now() + duration; }

class StoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto server = StoreServer::Listen({.group_key = kGroupKey, .connections_max = 4});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
  }

  std::unique_ptr<StoreClient> Connect(uint64_t key = kGroupKey) {
    auto client =
        StoreClient::Connect("127.0.0.1", server_->port(), key, In(std::chrono::seconds(10)));
    EXPECT_TRUE(client.ok()) << client.status();
    return std::move(*client);
  }

  // A bare connection, as a stranger makes it.
  int ConnectRaw() {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(server_->port());
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }

  const Deadline soon_ = In(std::chrono::seconds(10));
  std::unique_ptr<StoreServer> server_;
};

TEST_F(StoreTest, ReturnsWhatAnotherClientSet) {
  auto writer = Connect(), reader = Connect();
  const std::string value = std::string(100'000, 'x') + '\0' + "end";
  ASSERT_TRUE(writer->Set("key", value, soon_).ok());
  auto read = reader->Get("key", soon_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, value);
}

TEST_F(StoreTest, AReaderWaitsForTheKey) {
  auto reader = Connect();
  std::thread writer([this] {
    auto client = Connect();
    EXPECT_TRUE(client->Set("other", "1", soon_).ok());
    EXPECT_TRUE(client->Set("late", "2", soon_).ok());
  });
  auto read = reader->Get("late", soon_);
  writer.join();
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, "2");
}

TEST_F(StoreTest, AKeyThatNobodySetsEndsInDeadlineExceeded) {
  auto reader = Connect();
  EXPECT_EQ(reader->Get("never", In(std::chrono::milliseconds(30))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(StoreTest, AnotherGroupsKeyIsRefused) {
  auto stranger = Connect(kGroupKey + 1);
  EXPECT_EQ(stranger->Get("key", soon_).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(StoreTest, GarbageAndIdleStrangersDoNotHarmTheGroup) {
  std::vector<int> strangers;
  for (int i = 0; i < 10; ++i) {
    strangers.push_back(ConnectRaw());
    const std::string garbage = i % 2 == 0 ? "GET / HTTP/1.1\r\n\r\n________________" : "";
    EXPECT_EQ(send(strangers.back(), garbage.data(), garbage.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(garbage.size()));
  }
  auto client = Connect();
  ASSERT_TRUE(client->Set("key", "value", soon_).ok());
  EXPECT_EQ(*client->Get("key", soon_), "value");
  for (const int fd : strangers) close(fd);
}

TEST_F(StoreTest, TooLongEntriesAreRefusedByTheClient) {
  auto client = Connect();
  EXPECT_EQ(client->Set(std::string(257, 'k'), "", soon_).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Set("k", std::string((1 << 20) + 1, 'v'), soon_).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(client->Set("k", std::string(1 << 20, 'v'), soon_).ok());
}

TEST_F(StoreTest, AnAddressInUseIsNamedAsSuch) {
  EXPECT_EQ(StoreServer::Listen({.port = server_->port()}).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(StoreTest, NobodyListeningEndsInUnavailable) {
  const uint16_t port = server_->port();
  server_.reset();
  EXPECT_EQ(StoreClient::Connect("127.0.0.1", port, kGroupKey, In(std::chrono::milliseconds(120)))
                .status()
                .code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace nibble::collectives
