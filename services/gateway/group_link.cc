#include "services/gateway/group_link.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/grpc_status.h"
#include "base/logging.h"
#include "base/status.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;

constexpr Duration kInfoTimeout = std::chrono::seconds(5);
constexpr Duration kTokenizerTimeout = std::chrono::seconds(60);
constexpr size_t kTokenizerBytesMax = size_t{256} << 20;

absl::Status CheckInfo(const wire::GetModelInfoResponse& info) {
  if (info.model().empty() || info.vocab_size() == 0 || info.context_length() == 0) {
    return absl::FailedPreconditionError(
        "the worker names no model, or one without vocabulary or context");
  }
  return absl::OkStatus();
}

}  // namespace

std::shared_ptr<grpc::Channel> NewWorkerChannel(const std::string& address,
                                                const WorkerChannelOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // the gateway decides what is sent again
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  // A group whose pod was replaced has another address under the same name, at once.
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 1'000);
  // What a worker may send ahead of a stream that is not read, for a slow client's sake.
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 32 << 10);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_MAX_METADATA_SIZE, options.limits.metadata_bytes);
  arguments.SetMaxReceiveMessageSize(options.limits.send_message_bytes);
  if (!options.tls_name.empty()) {
    arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, options.tls_name);
  }
  return grpc::CreateCustomChannel(
      address, options.tls == nullptr ? grpc::InsecureChannelCredentials() : options.tls,
      arguments);
}

GroupLink::GroupLink(Core* core, Options options)
    : core_(*core), options_(std::move(options)), thread_([this] { Run(); }) {}

GroupLink::~GroupLink() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
  }
  thread_.join();
}

bool GroupLink::Begin(grpc::ClientContext* context, Duration timeout) {
  absl::MutexLock lock(&mutex_);
  if (stopping_) return false;
  context_ = context;
  if (timeout != Duration::max()) {
    context->set_deadline(gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                       gpr_time_from_nanos(timeout.count(), GPR_TIMESPAN)));
  }
  return true;
}

void GroupLink::End() {
  absl::MutexLock lock(&mutex_);
  context_ = nullptr;
}

void GroupLink::Run() {
  Duration retry = options_.retry_min;
  while (true) {
    const Deadline began = core_.clock->Now();
    const absl::Status status = Follow();
    core_.router.Lost(options_.group);
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return;
    }
    Report(status);
    // A group that was there for a while is likely to be back soon.
    if (core_.clock->Now() - began > options_.retry_max) retry = options_.retry_min;
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), absl::FromChrono(retry))) return;
    retry = std::min(retry * 2, options_.retry_max);
  }
}

void GroupLink::Report(const absl::Status& status) {
  std::string report =
      absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
  if (report == last_report_) return;  // once a second would be noise
  spdlog::warn("group {} is not in use: {}", core_.router.group_name(options_.group), report);
  last_report_ = std::move(report);
}

absl::Status GroupLink::Follow() {
  ASSIGN_OR_RETURN(std::shared_ptr<const ServedModel> model, Describe());
  RETURN_IF_ERROR(core_.router.Connected(options_.group, model));
  (void)core_.metrics.ForModel(model->name());  // its series exist before its first request
  for (const std::string& warning : model->defaults.warnings) spdlog::warn("{}", warning);
  spdlog::info("group {} serves model \"{}\": {}, context {}, {} sequences",
               core_.router.group_name(options_.group), model->name(), model->info.quantization(),
               model->info.context_length(), model->info.max_sequences());
  last_report_.clear();
  return Watch();
}

absl::StatusOr<std::shared_ptr<const ServedModel>> GroupLink::Describe() {
  auto model = std::make_shared<ServedModel>();
  {
    grpc::ClientContext context;
    if (!Begin(&context, kInfoTimeout)) return absl::CancelledError();
    const grpc::Status status =
        core_.workers[options_.group]->GetModelInfo(&context, {}, &model->info);
    End();
    if (!status.ok()) return FromGrpcStatus(status);
  }
  RETURN_IF_ERROR(CheckInfo(model->info));
  if (const auto known = core_.router.WithTokenizer(model->info.tokenizer_hash())) {
    model->tokenizer = known->tokenizer;
    model->defaults = known->defaults;
  } else {
    RETURN_IF_ERROR(FetchTokenizer(model.get()));
  }
  return model;
}

absl::Status GroupLink::FetchTokenizer(ServedModel* model) {
  std::map<std::string, std::string> files;
  {
    grpc::ClientContext context;
    if (!Begin(&context, kTokenizerTimeout)) return absl::CancelledError();
    auto reader = core_.workers[options_.group]->GetTokenizer(&context, {});
    wire::GetTokenizerResponse response;
    size_t bytes = 0;
    while (bytes <= kTokenizerBytesMax && reader->Read(&response)) {
      bytes += response.chunk().size();
      files[response.file()].append(response.chunk());
    }
    if (bytes > kTokenizerBytesMax) context.TryCancel();
    const grpc::Status status = reader->Finish();
    End();
    if (!status.ok()) return FromGrpcStatus(status);
  }
  ASSIGN_OR_RETURN(model->tokenizer, options_.tokenizer_factory(
                                         {.tokenizer_json = files["tokenizer.json"],
                                          .tokenizer_config_json = files["tokenizer_config.json"],
                                          .chat_template = files["chat_template.jinja"]}));
  ASSIGN_OR_RETURN(
      model->defaults,
      ReadGenerationDefaults({.config_json = files["config.json"],
                              .generation_config_json = files["generation_config.json"],
                              .tokenizer_eos = model->tokenizer->eos_id(),
                              .vocab_size = static_cast<int32_t>(model->info.vocab_size())},
                             options_.sampling));
  return absl::OkStatus();
}

absl::Status GroupLink::Watch() {
  grpc::ClientContext context;
  if (!Begin(&context, Duration::max())) return absl::OkStatus();
  auto reader = core_.workers[options_.group]->WatchLoad(&context, {});
  wire::WatchLoadResponse response;
  while (reader->Read(&response)) core_.router.Beat(options_.group, response.load());
  const grpc::Status status = reader->Finish();
  End();
  if (status.ok()) return absl::UnavailableError("the group ended its heartbeat");
  return FromGrpcStatus(status);
}

}  // namespace nibble::gateway
