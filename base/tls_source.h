// TLS for gRPC ports and channels from PEM files that are read again while they are in use.
//
// What a port or a channel works with is always a set that was checked as a whole: the key fits its
// certificate, everything parses and nothing has expired. A new set that does not hold is named in
// one line of the log, and the one before it stays in use; connections that are open are not
// touched by a change.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/periodic.h"
#include "base/tls_files.h"
#include "base/tls_stats.h"

namespace grpc::experimental {
class CertificateProviderInterface;
class TlsCredentialsOptions;
}  // namespace grpc::experimental

namespace nibble {

// The files of one port or of one kind of channel. Owns a thread that looks at them; outlives the
// servers and channels made from it.
class TlsSource {
 public:
  struct Options {
    TlsFiles files;
    TlsOptionNames names = {};
    Duration look_every = std::chrono::seconds(1);
    TlsStats* stats = nullptr;  // borrowed; null: nobody counts
  };
  // As ReadTlsFiles; nothing runs then.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<TlsSource>> Open(Options options);
  TlsSource(const TlsSource&) = delete;
  TlsSource& operator=(const TlsSource&) = delete;

  // Of a port: shows the certificate and, where there is a CA, takes only clients that show one
  // signed by it. REQUIRES: a certificate was given.
  [[nodiscard]] std::shared_ptr<grpc::ServerCredentials> ServerCredentials() const;
  // Of a channel: the server's certificate must be signed by the CA (without one: by the system's)
  // and carry the name that was dialled; shows its own where there is one.
  [[nodiscard]] std::shared_ptr<grpc::ChannelCredentials> ChannelCredentials() const;

 private:
  // Contents under a path of this process alone, replaced as a whole.
  class Published {
   public:
    Published() = default;
    ~Published();
    Published(const Published&) = delete;
    Published& operator=(const Published&) = delete;
    [[nodiscard]] absl::Status Replace(const std::string& contents);
    [[nodiscard]] std::string path() const;

   private:
    int fd_ = -1;
  };

  explicit TlsSource(Options options)
      : options_(std::move(options)),
        stats_(options_.stats == nullptr ? &nobodys_stats_ : options_.stats) {}
  [[nodiscard]] absl::Status Publish(const TlsContents& contents);
  void TellExpiry();
  void SetUp(grpc::experimental::TlsCredentialsOptions* options) const;
  void Look();

  const Options options_;
  TlsStats nobodys_stats_;
  TlsStats* const stats_;
  TlsContents contents_;     // the thread's, once it runs
  std::string last_report_;  // likewise
  Published identity_;
  Published ca_;
  std::shared_ptr<grpc::experimental::CertificateProviderInterface> provider_;  // null: none given
  std::unique_ptr<Periodic> watch_;  // null: nothing to look after
};

}  // namespace nibble
