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

// 0 for a date that is none.
std::time_t ExpiryOf(const Certificate& certificate) {
  std::tm parts{};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &parts) != 1) return 0;
  return timegm(&parts);
}

std::vector<std::time_t> ExpiriesOf(const std::vector<Certificate>& certificates) {
  std::vector<std::time_t> expiries(certificates.size());
  std::transform(certificates.begin(), certificates.end(), expiries.begin(), ExpiryOf);
  return expiries;
}

absl::Status ReadIdentity(const TlsFiles& files, const TlsOptionNames& names, std::time_t now,
                          TlsContents* contents) {
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
  contents->identity = absl::StrCat(key_text, "\n", chain);
  const auto expiries = ExpiriesOf(certificates);
  contents->certificate_expires = *std::min_element(expiries.begin(), expiries.end());
  return absl::OkStatus();
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
    RETURN_IF_ERROR(ReadIdentity(files, names, now, &contents));
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
    const auto expiries = ExpiriesOf(certificates);
    contents.ca_expires = *std::max_element(expiries.begin(), expiries.end());
  }
  return contents;
}

}  // namespace nibble
