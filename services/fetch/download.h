// Fetches a model's files into a folder: continues what broke off, checks every byte, and shows
// the folder under its name only when it is whole.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "base/clock.h"
#include "services/fetch/http_client.h"
#include "services/fetch/listing.h"

namespace nibble::fetch {

// How far one of the files is. `total` is -1 while it is not known.
struct FileProgress {
  const std::string& name;
  size_t number = 0;  // from 1
  size_t count = 0;
  int64_t done = 0;
  int64_t total = -1;
};

struct FetchOptions {
  Source source;
  Url hub;            // its target ends with a slash
  std::string token;  // for the hub alone; empty = none
  std::string folder;
  int tries = 8;                                  // of one request in a row that bring nothing new
  Duration retry_wait = std::chrono::seconds(1);  // doubled with each, at most 30 s
  HttpClient::Options http;
  std::function<void(Duration)> sleep;
  std::function<void(const std::string& line)> say;  // for people; holds no secret
  std::function<void(const FileProgress&)> progress;
};

// INVALID_ARGUMENT, ALREADY_EXISTS: source or folder. NOT_FOUND, PERMISSION_DENIED, UNAVAILABLE,
// FAILED_PRECONDITION: what the other side said. DATA_LOSS: what came is not what was announced.
// RESOURCE_EXHAUSTED: no room.
[[nodiscard]] absl::Status FetchModel(const FetchOptions& options);

}  // namespace nibble::fetch
