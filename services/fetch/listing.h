// Where a model comes from, and which files it has there.
#pragma once

#include <cstdint>
#include <string>

#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/fetch/digest.h"
#include "services/fetch/url.h"

namespace nibble::fetch {

// hf://ORG/MODEL[@REVISION]: a repository of a model hub. https://HOST/FOLDER: a folder with a
// file SHA256SUMS.
struct Source {
  enum class Kind { kHub, kFolder };
  Kind kind = Kind::kFolder;
  std::string text;      // as it was given
  std::string repo;      // "ORG/MODEL"
  std::string revision;  // of a hub; "main" where none was given
  Url folder;            // of a folder; its target ends with a slash
};

// INVALID_ARGUMENT says what is allowed.
[[nodiscard]] absl::StatusOr<Source> ParseSource(absl::string_view text);

struct RemoteFile {
  std::string name;  // plain: it names a file of the folder and nothing else
  Url url;
  int64_t size = -1;  // -1: not known before it is asked for
  DigestKind digest = DigestKind::kSha256;
  std::string hex;
};

struct Listing {
  std::string revision;  // what the revision stands for now; empty for a folder
  std::vector<RemoteFile> files;
};

// Where the list itself is.
[[nodiscard]] Url ListingUrl(const Source& source, const Url& hub);

// DATA_LOSS: it is no such list, has a name that is not plain, a file twice, or no config.json.
// Of a hub's repository the files that a server can use: top level, safetensors, JSON, templates,
// vocabularies, licences.
[[nodiscard]] absl::StatusOr<Listing> ReadHubListing(absl::string_view json, const Source& source,
                                                     const Url& hub);
[[nodiscard]] absl::StatusOr<Listing> ReadSumsListing(absl::string_view text, const Source& source);

}  // namespace nibble::fetch
