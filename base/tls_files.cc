#include "base/tls_files.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace nibble {
namespace {

constexpr size_t kFileBytesMax = 1 << 20;

struct FreeBio {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
struct FreeCertificate {
  void operator()(X509* certificate) const { X509_free(certificate); }
};
struct FreeKey {
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};
using Certificate = std::unique_ptr<X509, FreeCertificate>;
using Key = std::unique_ptr<EVP_PKEY, FreeKey>;

// A file and what it is called in messages.
struct NamedFile {
  const std::string& option;
  const std::string& path;

  [[nodiscard]] absl::Status Bad(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(option, " \"", path, "\" ", what));
  }
};

absl::StatusOr<std::string> ReadPem(const NamedFile& file) {
  errno = 0;
  std::ifstream stream(file.path, std::ios::binary);
  if (!stream) {
    return file.Bad(absl::StrCat("cannot be read: ",
                                 errno == 0 ? "it cannot be opened" : std::strerror(errno)));
  }
  std::string text;
  text.resize(kFileBytesMax + 1);
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (stream.bad()) return file.Bad("cannot be read: it is no file");
  text.resize(static_cast<size_t>(stream.gcount()));
  if (text.empty()) return file.Bad("is empty, or no file");
  if (text.size() > kFileBytesMax) {
    return file.Bad(absl::StrCat("is longer than ", kFileBytesMax, " bytes"));
  }
  return text;
}

std::unique_ptr<BIO, FreeBio> BioOf(const std::string& text) {
  return std::unique_ptr<BIO, FreeBio>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// A key that asks for a passphrase is not asked for one on the terminal.
int NoPassphrase(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*context*/) { return -1; }

absl::StatusOr<std::vector<Certificate>> ParseCertificates(const NamedFile& file,
                                                           const std::string& text) {
  const auto bio = BioOf(text);
  std::vector<Certificate> found;
  while (X509* certificate = PEM_read_bio_X509(bio.get(), nullptr, NoPassphrase, nullptr)) {
    found.emplace_back(certificate);
  }
  ERR_clear_error();
  if (found.empty()) return file.Bad("holds no certificate in PEM");
  return found;
}

absl::Status CheckDates(const NamedFile& file, const std::vector<Certificate>& certificates,
                        std::time_t now) {
  for (const Certificate& certificate : certificates) {
    if (X509_cmp_time(X509_get0_notAfter(certificate.get()), &now) < 0) {
      return file.Bad("has expired");
    }
    if (X509_cmp_time(X509_get0_notBefore(certificate.get()), &now) > 0) {
      return file.Bad("is not valid yet");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadIdentity(const TlsFiles& files, const TlsOptionNames& names,
                                         std::time_t now) {
  const NamedFile certificate_file = {names.certificate, files.certificate};
  const NamedFile key_file = {names.key, files.key};
  ASSIGN_OR_RETURN(const std::string chain, ReadPem(certificate_file));
  ASSIGN_OR_RETURN(const std::string key_text, ReadPem(key_file));
  ASSIGN_OR_RETURN(const auto certificates, ParseCertificates(certificate_file, chain));
  RETURN_IF_ERROR(CheckDates(certificate_file, certificates, now));
  const auto bio = BioOf(key_text);
  const Key key(PEM_read_bio_PrivateKey(bio.get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (key == nullptr) return key_file.Bad("holds no private key in PEM without passphrase");
  const bool fits = X509_check_private_key(certificates.front().get(), key.get()) == 1;
  ERR_clear_error();
  if (!fits) {
    return key_file.Bad(
        absl::StrCat("is not the key of ", names.certificate, " \"", files.certificate, "\""));
  }
  return absl::StrCat(key_text, "\n", chain);
}

}  // namespace

absl::StatusOr<TlsContents> ReadTlsFiles(const TlsFiles& files, const TlsOptionNames& names,
                                         std::time_t now) {
  if (files.certificate.empty() != files.key.empty()) {
    const bool no_key = files.key.empty();
    return absl::InvalidArgumentError(absl::StrCat(no_key ? names.key : names.certificate,
                                                   " is not set; it goes with ",
                                                   no_key ? names.certificate : names.key));
  }
  TlsContents contents;
  if (!files.certificate.empty()) {
    ASSIGN_OR_RETURN(contents.identity, ReadIdentity(files, names, now));
  }
  if (!files.ca.empty()) {
    const NamedFile file = {names.ca, files.ca};
    ASSIGN_OR_RETURN(contents.ca, ReadPem(file));
    // A bundle may hold some that have expired: they sign nothing any more.
    ASSIGN_OR_RETURN(const auto certificates, ParseCertificates(file, contents.ca));
    const bool any_valid =
        std::any_of(certificates.begin(), certificates.end(), [&now](const Certificate& one) {
          return X509_cmp_time(X509_get0_notAfter(one.get()), &now) >= 0;
        });
    if (!any_valid) return file.Bad("has expired");
  }
  return contents;
}

}  // namespace nibble
