#include "tests/support/test_ca.h"

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <fstream>

#include "base/check.h"

namespace nibble::testing {
namespace {

void AddExtension(X509* certificate, X509* issuer, int kind, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, kind, value);
  CHECK(extension != nullptr);
  CHECK(X509_add_ext(certificate, extension, -1) == 1);
  X509_EXTENSION_free(extension);
}

X509* NewCertificate(const std::string& name, EVP_PKEY* key, long serial, long from_seconds,
                     long until_seconds) {
  X509* certificate = X509_new();
  X509_set_version(certificate, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate), serial);
  X509_gmtime_adj(X509_getm_notBefore(certificate), from_seconds);
  X509_gmtime_adj(X509_getm_notAfter(certificate), until_seconds);
  X509_set_pubkey(certificate, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

template <typename Write>
std::string ToPem(const Write& write) {
  BIO* bio = BIO_new(BIO_s_mem());
  CHECK(write(bio) == 1);
  char* text = nullptr;
  const long size = BIO_get_mem_data(bio, &text);
  std::string pem(text, static_cast<size_t>(size));
  BIO_free(bio);
  return pem;
}

std::string CertificatePem(X509* certificate) {
  return ToPem([certificate](BIO* bio) { return PEM_write_bio_X509(bio, certificate); });
}

}  // namespace

struct TestCa::State {
  EVP_PKEY* key = nullptr;
  X509* certificate = nullptr;
  long serial = 1;
};

TestCa::TestCa(const std::string& name) : state_(std::make_unique<State>()) {
  state_->key = EVP_EC_gen("P-256");
  constexpr long kHour = 3600;
  state_->certificate = NewCertificate(name, state_->key, state_->serial++, -kHour, 2 * kHour);
  X509_set_issuer_name(state_->certificate, X509_get_subject_name(state_->certificate));
  AddExtension(state_->certificate, state_->certificate, NID_basic_constraints, "critical,CA:TRUE");
  AddExtension(state_->certificate, state_->certificate, NID_key_usage, "critical,keyCertSign");
  CHECK(X509_sign(state_->certificate, state_->key, EVP_sha256()) > 0);
  pem_ = CertificatePem(state_->certificate);
}

TestCa::~TestCa() {
  X509_free(state_->certificate);
  EVP_PKEY_free(state_->key);
}

TestIdentity TestCa::Issue(const std::string& name, long from_seconds, long until_seconds) {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = NewCertificate(name, key, state_->serial++, from_seconds, until_seconds);
  X509_set_issuer_name(certificate, X509_get_subject_name(state_->certificate));
  AddExtension(certificate, state_->certificate, NID_subject_alt_name,
               "DNS:localhost,IP:127.0.0.1");
  CHECK(X509_sign(certificate, state_->key, EVP_sha256()) > 0);
  TestIdentity identity;
  identity.certificate = CertificatePem(certificate);
  identity.key = ToPem([key](BIO* bio) {
    return PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  });
  X509_free(certificate);
  EVP_PKEY_free(key);
  return identity;
}

void ReplaceFile(const std::string& path, const std::string& contents) {
  const std::string next = path + ".next";
  std::ofstream(next, std::ios::binary) << contents;
  CHECK(std::rename(next.c_str(), path.c_str()) == 0);
}

}  // namespace nibble::testing
