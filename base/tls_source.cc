#include "base/tls_source.h"

#include <fcntl.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/logging.h"
#include "base/status.h"

namespace nibble {
namespace {

constexpr unsigned kGrpcLooksEverySeconds = 1;

}  // namespace

TlsSource::Published::~Published() {
  if (fd_ >= 0) ::close(fd_);
}

std::string TlsSource::Published::path() const { return absl::StrCat("/proc/self/fd/", fd_); }

// gRPC reads files alone. A file in memory that takes the other's descriptor is whole at any time.
absl::Status TlsSource::Published::Replace(const std::string& contents) {
  const int fd = ::memfd_create("nibble-tls", MFD_CLOEXEC);
  if (fd < 0) return absl::InternalError(absl::StrCat("memfd_create: ", std::strerror(errno)));
  const ssize_t written = ::write(fd, contents.data(), contents.size());
  if (written != static_cast<ssize_t>(contents.size())) {
    ::close(fd);
    return absl::InternalError("a certificate does not fit into memory");
  }
  if (fd_ < 0) {
    fd_ = fd;
    return absl::OkStatus();
  }
  const bool replaced = ::dup3(fd, fd_, O_CLOEXEC) == fd_;
  ::close(fd);
  return replaced ? absl::OkStatus()
                  : absl::InternalError(absl::StrCat("dup3: ", std::strerror(errno)));
}

absl::StatusOr<std::unique_ptr<TlsSource>> TlsSource::Open(Options options) {
  std::unique_ptr<TlsSource> source(new TlsSource(std::move(options)));
  const TlsFiles& files = source->options_.files;
  ASSIGN_OR_RETURN(source->contents_,
                   ReadTlsFiles(files, source->options_.names, std::time(nullptr)));
  if (!files.any()) return source;
  RETURN_IF_ERROR(source->Publish(source->contents_));
  source->TellExpiry();
  const std::string identity = files.certificate.empty() ? "" : source->identity_.path();
  const std::string ca = files.ca.empty() ? "" : source->ca_.path();
  source->provider_ = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
      identity, identity, ca, kGrpcLooksEverySeconds);
  source->watch_ = std::make_unique<Periodic>(source->options_.look_every,
                                              [raw = source.get()] { raw->Look(); });
  return source;
}

absl::Status TlsSource::Publish(const TlsContents& contents) {
  if (!contents.identity.empty()) RETURN_IF_ERROR(identity_.Replace(contents.identity));
  if (!contents.ca.empty()) RETURN_IF_ERROR(ca_.Replace(contents.ca));
  return absl::OkStatus();
}

void TlsSource::TellExpiry() {
  stats_->certificate_expires.Set(contents_.certificate_expires);
  stats_->ca_expires.Set(contents_.ca_expires);
}

// What is counted is counted by the time that the files are said to hold, or not to.
void TlsSource::Look() {
  auto contents = ReadTlsFiles(options_.files, options_.names, std::time(nullptr));
  absl::Status status = contents.status();
  const bool news = contents.ok() && *contents != contents_;
  if (news) status = Publish(*contents);
  if (!status.ok()) {
    std::string report(status.message());
    if (report == last_report_) return;  // once a second would be noise
    spdlog::error("{}; what was read before stays in use", report);
    last_report_ = std::move(report);
    stats_->reloads_failed.Add();
    stats_->stale.Set(1);
    return;
  }
  last_report_.clear();
  if (news) {
    contents_ = *std::move(contents);
    TellExpiry();
    stats_->reloads_ok.Add();
    const std::string& which =
        options_.files.certificate.empty() ? options_.names.ca : options_.names.certificate;
    spdlog::info("{} and what goes with it have been read again", which);
  }
  stats_->stale.Set(0);
}

void TlsSource::SetUp(grpc::experimental::TlsCredentialsOptions* options) const {
  if (provider_ == nullptr) return;
  options->set_certificate_provider(provider_);
  if (!options_.files.certificate.empty()) options->watch_identity_key_cert_pairs();
  if (!options_.files.ca.empty()) options->watch_root_certs();
}

std::shared_ptr<grpc::ServerCredentials> TlsSource::ServerCredentials() const {
  CHECK(!options_.files.certificate.empty());
  grpc::experimental::TlsServerCredentialsOptions options(provider_);
  SetUp(&options);
  options.set_cert_request_type(options_.files.ca.empty()
                                    ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                    : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  return grpc::experimental::TlsServerCredentials(options);
}

std::shared_ptr<grpc::ChannelCredentials> TlsSource::ChannelCredentials() const {
  grpc::experimental::TlsChannelCredentialsOptions options;
  SetUp(&options);
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace nibble
