#include "services/fetch/listing.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"

namespace nibble::fetch {
namespace {

constexpr size_t kNameBytesMax = 200;
constexpr size_t kFilesMax = 10000;
constexpr char kAllowed[] =
    "allowed: hf://ORG/MODEL, hf://ORG/MODEL@REVISION, https://HOST/FOLDER with a SHA256SUMS";

bool HasOnly(absl::string_view text, absl::string_view marks) {
  return std::all_of(text.begin(), text.end(), [marks](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains(marks, c);
  });
}

// A word of a repository's name or of a revision.
bool IsWord(absl::string_view text) {
  return !text.empty() && text.size() <= kNameBytesMax && text.front() != '.' &&
         text.front() != '-' && HasOnly(text, "-._") && !absl::StrContains(text, "..");
}

bool IsPlainName(absl::string_view name) {
  return !name.empty() && name.size() <= kNameBytesMax && name.front() != '.' &&
         HasOnly(name, "-._ +=@~()") && !absl::EndsWith(name, ".part");
}

bool IsWanted(absl::string_view name) {
  if (!IsPlainName(name) || absl::StartsWith(name, "consolidated")) return false;
  static constexpr absl::string_view kEndings[] = {".json", ".safetensors", ".jinja",
                                                   ".txt",  ".model",       ".tiktoken"};
  return absl::StartsWith(name, "LICENSE") || absl::StartsWith(name, "NOTICE") ||
         std::any_of(std::begin(kEndings), std::end(kEndings),
                     [name](absl::string_view ending) { return absl::EndsWith(name, ending); });
}

absl::StatusOr<Source> ParseHub(absl::string_view rest, Source source) {
  source.kind = Source::Kind::kHub;
  const std::pair<absl::string_view, absl::string_view> at =
      absl::StrSplit(rest, absl::MaxSplits('@', 1));
  source.repo = std::string(at.first);
  source.revision = std::string(absl::StrContains(rest, '@') ? at.second : "main");
  const std::vector<absl::string_view> words = absl::StrSplit(at.first, '/');
  const std::vector<absl::string_view> revision = absl::StrSplit(source.revision, '/');
  if (words.size() != 2 || !std::all_of(words.begin(), words.end(), IsWord) ||
      !std::all_of(revision.begin(), revision.end(), IsWord)) {
    return absl::InvalidArgumentError(absl::StrCat("no model is called that; ", kAllowed));
  }
  return source;
}

// What both lists have to be before anything is fetched.
absl::StatusOr<Listing> Checked(Listing listing, absl::string_view what) {
  std::set<absl::string_view> names;
  for (const RemoteFile& file : listing.files) {
    if (!names.insert(file.name).second) {
      return absl::DataLossError(absl::StrCat(what, " has ", file.name, " twice"));
    }
  }
  if (names.size() > kFilesMax) {
    return absl::DataLossError(
        absl::StrCat(what, " has ", names.size(), " files; at most ", kFilesMax));
  }
  if (!names.contains("config.json")) {
    return absl::DataLossError(absl::StrCat(what, " has no config.json: it is no model"));
  }
  return listing;
}

// A file of a hub's answer.
absl::StatusOr<RemoteFile> ReadSibling(const nlohmann::json& entry, const std::string& name,
                                       const Url& base) {
  RemoteFile file;
  file.name = name;
  file.url = base;
  absl::StrAppend(&file.url.target, EncodePath(name, /*keep_slash=*/false));
  const auto large = entry.find("lfs");
  const bool is_large = large != entry.end() && large->is_object();
  const auto text = [](const nlohmann::json& object, const char* key) {
    const auto found = object.find(key);
    return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  file.digest = is_large ? DigestKind::kSha256 : DigestKind::kGitBlob;
  file.hex = is_large ? text(*large, "sha256") : text(entry, "blobId");
  const nlohmann::json& sized = is_large ? *large : entry;
  const auto size = sized.find("size");
  if (!IsDigest(file.digest, file.hex) || size == sized.end() || !size->is_number_unsigned() ||
      size->get<uint64_t>() > INT64_MAX) {
    return absl::DataLossError(absl::StrCat("the hub's list has no size or no sum of ", file.name));
  }
  file.size = size->get<int64_t>();
  return file;
}

}  // namespace

absl::StatusOr<Source> ParseSource(absl::string_view text) {
  Source source;
  source.text = std::string(text);
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "hf://")) return ParseHub(rest, std::move(source));
  if (absl::StartsWith(text, "oci://")) {
    return absl::InvalidArgumentError(
        "oci:// is mounted by Kubernetes as an image volume (the chart's models[].source) and "
        "not fetched");
  }
  if (!absl::StartsWith(text, "https://") && !absl::StartsWith(text, "http://")) {
    return absl::InvalidArgumentError(absl::StrCat("it is no source; ", kAllowed));
  }
  if (text.find_first_of("?#") != absl::string_view::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("a folder's address has no ? and no #; ", kAllowed));
  }
  ASSIGN_OR_RETURN(source.folder, ParseUrl(text));
  if (!absl::EndsWith(source.folder.target, "/")) source.folder.target += '/';
  return source;
}

Url ListingUrl(const Source& source, const Url& hub) {
  if (source.kind == Source::Kind::kFolder) {
    Url url = source.folder;
    url.target += "SHA256SUMS";
    return url;
  }
  Url url = hub;
  absl::StrAppend(&url.target, "api/models/", source.repo, "/revision/",
                  EncodePath(source.revision, /*keep_slash=*/false), "?blobs=true");
  return url;
}

absl::StatusOr<Listing> ReadHubListing(absl::string_view json, const Source& source,
                                       const Url& hub) {
  const nlohmann::json answer = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!answer.is_object() || !answer.contains("siblings") || !answer["siblings"].is_array() ||
      !answer.contains("sha") || !answer["sha"].is_string()) {
    return absl::DataLossError("the hub's answer is no list of files");
  }
  Listing listing;
  listing.revision = answer["sha"].get<std::string>();
  if (!IsDigest(DigestKind::kGitBlob, listing.revision)) {
    return absl::DataLossError("the hub's answer names no revision");
  }
  Url base = hub;
  absl::StrAppend(&base.target, source.repo, "/resolve/", listing.revision, "/");
  for (const nlohmann::json& entry : answer["siblings"]) {
    const auto name = entry.find("rfilename");
    if (!entry.is_object() || name == entry.end() || !name->is_string()) {
      return absl::DataLossError("the hub's list has a file without a name");
    }
    if (!IsWanted(name->get<std::string>())) continue;
    ASSIGN_OR_RETURN(RemoteFile file, ReadSibling(entry, name->get<std::string>(), base));
    listing.files.push_back(std::move(file));
  }
  return Checked(std::move(listing), source.repo);
}

absl::StatusOr<Listing> ReadSumsListing(absl::string_view text, const Source& source) {
  Listing listing;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    absl::ConsumeSuffix(&line, "\r");
    if (line.empty()) continue;
    // "SUM  NAME" or "SUM *NAME", as sha256sum writes it.
    const size_t space = std::min(line.find(' '), line.size());
    RemoteFile file;
    file.hex = std::string(line.substr(0, space));
    absl::string_view name = line.substr(space);
    const bool split = absl::ConsumePrefix(&name, "  ") || absl::ConsumePrefix(&name, " *");
    absl::ConsumePrefix(&name, "./");
    if (!split || !IsDigest(DigestKind::kSha256, file.hex) || !IsPlainName(name)) {
      return absl::DataLossError(absl::StrCat(
          "SHA256SUMS, line ", number, ": not a sum and the plain name of a file in its folder"));
    }
    if (name == "SHA256SUMS") continue;
    file.name = std::string(name);
    file.url = source.folder;
    absl::StrAppend(&file.url.target, EncodePath(name, /*keep_slash=*/false));
    listing.files.push_back(std::move(file));
  }
  return Checked(std::move(listing), "SHA256SUMS");
}

}  // namespace nibble::fetch
