// A certificate authority that lives as long as a test, and certificates by it.
#pragma once

#include <openssl/x509.h>

#include <memory>
#include <string>

namespace nibble::testing {

// PEM texts.
struct TestIdentity {
  std::string certificate;
  std::string key;
};

// One thread.
class TestCa {
 public:
  explicit TestCa(const std::string& name = "test CA");
  ~TestCa();
  TestCa(const TestCa&) = delete;
  TestCa& operator=(const TestCa&) = delete;

  [[nodiscard]] const std::string& pem() const { return pem_; }
  // For localhost and 127.0.0.1, valid from and until these many seconds from now.
  [[nodiscard]] TestIdentity Issue(const std::string& name, long from_seconds = -3600,
                                   long until_seconds = 3600);

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::string pem_;
};

// Replaces the file as a whole, as an operator's tools do.
void ReplaceFile(const std::string& path, const std::string& contents);

}  // namespace nibble::testing
