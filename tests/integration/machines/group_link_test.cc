// The link between the machines of a group, both ends in one process: plans come over as they were,
// strangers cannot end the group, and with TLS only machines of the same authority are taken in.
#include "worker/group/group_host.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "base/tls_source.h"
#include "nibble/worker/v1/group.grpc.pb.h"
#include "tests/support/test_ca.h"
#include "worker/group/group_member.h"
#include "worker/step/plan_ring.h"

namespace nibble::group {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

constexpr MachinePlace kFirst = {.index = 0, .machines = 2, .ranks_each = 1};
constexpr MachinePlace kSecond = {.index = 1, .machines = 2, .ranks_each = 1};
constexpr RankFacts kFacts = {.model_hash = 1, .config_hash = 2, .build_hash = 3, .rank_count = 2};
constexpr seconds kPatience{20};

// The shared memory of one machine, and a ring with one reader.
struct Machine {
  explicit Machine(const Clock* clock) {
    const auto made =
        step::CreatePlanRing({.readers = 1, .ring_bytes = 1 << 20, .record_bytes_max = 1 << 18});
    EXPECT_TRUE(made.ok());
    fd = OwnedFd(made.value_or(-1));
    const step::PlanRingWait wait = {.clock = clock, .spin = Duration::zero()};
    writer = *step::PlanRingWriter::Attach(fd.get(), kPatience, wait);
    reader = *step::PlanRingReader::Attach(fd.get(), 0, wait);
  }
  OwnedFd fd;
  std::unique_ptr<step::PlanRingWriter> writer;
  std::unique_ptr<step::PlanReceiver> reader;
  std::unique_ptr<GroupControl> control = std::make_unique<GroupControl>();
  std::unique_ptr<step::GroupStats> stats = std::make_unique<step::GroupStats>();
};

class GroupLinkTest : public ::testing::Test {
 protected:
  [[nodiscard]] absl::Status Host(const std::shared_ptr<grpc::ServerCredentials>& credentials) {
    GroupHostOptions options;
    options.listen = "127.0.0.1:0";
    options.credentials = credentials;
    options.place = kFirst;
    options.facts = kFacts;
    options.control = first_.control.get();
    options.stats = first_.stats.get();
    options.clock = &clock_;
    options.plans.push_back(std::move(first_.reader));
    auto host = GroupHost::Start(std::move(options));
    if (!host.ok()) return host.status();
    host_ = *std::move(host);
    return absl::OkStatus();
  }
  [[nodiscard]] absl::Status Join(const std::shared_ptr<grpc::ChannelCredentials>& credentials,
                                  Duration limit = kPatience, const MachinePlace& place = kSecond) {
    GroupMemberOptions options;
    options.leader = host_->address();
    options.credentials = credentials;
    options.place = place;
    options.facts = kFacts;
    options.control = second_.control.get();
    options.stats = second_.stats.get();
    options.clock = &clock_;
    options.plans = second_.writer.get();
    options.join_timeout = limit;
    auto member = JoinGroup(std::move(options));
    if (!member.ok()) return member.status();
    member_ = *std::move(member);
    return absl::OkStatus();
  }
  // Until both ends have asked for a while, nobody has lost anybody.
  void ExpectAlive() {
    const Deadline until = clock_.Now() + milliseconds(700);
    while (clock_.Now() < until) {
      ASSERT_FALSE(host_->Lost(clock_.Now()).has_value());
      ASSERT_FALSE(member_->Lost(clock_.Now()).has_value());
      std::this_thread::sleep_for(milliseconds(20));
    }
  }

  const SteadyClock clock_;
  Machine first_{&clock_};
  Machine second_{&clock_};
  std::unique_ptr<GroupHost> host_;
  std::unique_ptr<MachineLink> member_;
};

TEST_F(GroupLinkTest, PlansAndStatesComeOverAsTheyWere) {
  ASSERT_TRUE(Host(grpc::InsecureServerCredentials()).ok());
  EXPECT_FALSE(host_->Joined());
  ASSERT_TRUE(Join(grpc::InsecureChannelCredentials()).ok());
  EXPECT_TRUE(host_->Joined());
  second_.control->ranks[1].kv_blocks = 77;
  second_.control->ranks[1].phase = RankPhase::kLoaded;
  first_.control->address.Set("somewhere");

  step::StepPlan plan;
  step::MaskBatch masks;
  for (uint64_t id = 1; id <= 200; ++id) {
    plan.step_id = id;
    plan.closed = {static_cast<int32_t>(id % 7)};
    ASSERT_TRUE(first_.writer->Publish(plan).ok());
  }
  ASSERT_TRUE(first_.writer->Stop().ok());
  step::StepPlan came;
  for (uint64_t id = 1; id <= 200; ++id) {
    const auto message = second_.reader->Receive(clock_.Now() + kPatience, &came, &masks);
    ASSERT_TRUE(message.ok()) << message.status();
    EXPECT_EQ(came.step_id, id);
    EXPECT_THAT(came.closed, ::testing::ElementsAre(static_cast<int32_t>(id % 7)));
  }
  EXPECT_EQ(*second_.reader->Receive(clock_.Now() + kPatience, &came, &masks),
            step::PlanMessage::kStop);
  const Deadline until = clock_.Now() + kPatience;
  while (first_.control->ranks[1].phase.load() != RankPhase::kLoaded && clock_.Now() < until) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(first_.control->ranks[1].kv_blocks, 77);
  while (!second_.control->address.written() && clock_.Now() < until) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(second_.control->address.Get(), "somewhere");
}

TEST_F(GroupLinkTest, StrangersCannotEndTheGroup) {
  ASSERT_TRUE(Host(grpc::InsecureServerCredentials()).ok());
  ASSERT_TRUE(Join(grpc::InsecureChannelCredentials()).ok());
  const auto stub = worker::v1::GroupService::NewStub(
      grpc::CreateChannel(host_->address(), grpc::InsecureChannelCredentials()));
  const auto says = [&](const worker::v1::JoinRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    const auto stream = stub->Join(&context);
    stream->Write(request);
    stream->WritesDone();
    worker::v1::JoinResponse response;
    EXPECT_FALSE(stream->Read(&response));
    return stream->Finish().error_code();
  };
  worker::v1::JoinRequest request;
  request.mutable_end()->set_exit_code(7);
  EXPECT_EQ(says(request), grpc::StatusCode::INVALID_ARGUMENT);
  for (const uint32_t index : {0U, 2U, 4294967295U}) {
    request.mutable_hello()->set_index(index);
    request.mutable_hello()->set_group_size(2);
    EXPECT_EQ(says(request), grpc::StatusCode::INVALID_ARGUMENT) << index;
  }
  // The right one, twice.
  request.mutable_hello()->set_index(1);
  request.mutable_hello()->set_model_hash(1);
  request.mutable_hello()->set_config_hash(2);
  request.mutable_hello()->set_build_hash(3);
  request.mutable_hello()->set_rank_count(2);
  EXPECT_EQ(says(request), grpc::StatusCode::ALREADY_EXISTS);
  ExpectAlive();
}

TEST_F(GroupLinkTest, TheEndOfOneMachineTellsTheOther) {
  ASSERT_TRUE(Host(grpc::InsecureServerCredentials()).ok());
  ASSERT_TRUE(Join(grpc::InsecureChannelCredentials()).ok());
  member_->End({.exit_code = 6, .reason = "rank 1 hangs"}, kPatience);
  const std::optional<GroupEnd> lost = host_->Lost(clock_.Now());
  ASSERT_TRUE(lost.has_value());
  EXPECT_EQ(lost->exit_code, 6);
  EXPECT_EQ(lost->reason, "machine 1: rank 1 hangs");
}

// PEM files of one machine.
TlsFiles Write(const std::string& folder, const std::string& name,
               const testing::TestIdentity& identity, const std::string& ca) {
  const TlsFiles files = {.certificate = folder + "/" + name + ".pem",
                          .key = folder + "/" + name + ".key",
                          .ca = folder + "/" + name + ".ca"};
  testing::ReplaceFile(files.certificate, identity.certificate);
  testing::ReplaceFile(files.key, identity.key);
  testing::ReplaceFile(files.ca, ca);
  return files;
}

TEST_F(GroupLinkTest, WithTlsOnlyMachinesOfTheSameAuthorityAreTakenIn) {
  std::string folder = ::testing::TempDir() + "/nibble-link-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  testing::TestCa ours;
  testing::TestCa theirs("another CA");
  const auto first = TlsSource::Open({.files = Write(folder, "a", ours.Issue("a"), ours.pem())});
  const auto second = TlsSource::Open({.files = Write(folder, "b", ours.Issue("b"), ours.pem())});
  // It trusts ours, but nobody here has signed it.
  const auto wrong = TlsSource::Open({.files = Write(folder, "c", theirs.Issue("c"), ours.pem())});
  ASSERT_TRUE(first.ok() && second.ok() && wrong.ok());
  ASSERT_TRUE(Host((*first)->ServerCredentials()).ok());
  EXPECT_TRUE(absl::IsUnavailable(Join(grpc::InsecureChannelCredentials(), seconds(1))));
  EXPECT_TRUE(absl::IsUnavailable(Join((*wrong)->ChannelCredentials(), seconds(1))));
  EXPECT_TRUE(Join((*second)->ChannelCredentials()).ok());
  host_->End({.exit_code = 5, .reason = "over"}, kPatience);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace nibble::group
