#include "services/fetch/http_client.h"

#include <httplib.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace nibble::fetch {
namespace {

constexpr int kRedirectsMax = 10;
constexpr size_t kRefusalBytesMax = size_t{1} << 20;  // of a body that nobody reads
constexpr Duration kRetryAfterMax = std::chrono::minutes(2);

using Begin = std::function<absl::Status(const BodyHead&)>;
using Take = std::function<absl::Status(absl::string_view)>;

bool IsRedirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

// "bytes 100-299/300".
bool ReadContentRange(absl::string_view text, BodyHead* head) {
  if (!absl::ConsumePrefix(&text, "bytes ")) return false;
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(text, '/');
  if (!absl::SimpleAtoi(parts.first.substr(0, parts.first.find('-')), &head->from)) return false;
  return parts.second == "*" || absl::SimpleAtoi(parts.second, &head->total);
}

absl::StatusOr<BodyHead> HeadOf(const httplib::Response& response) {
  BodyHead head;
  if (response.status == 206) {
    if (ReadContentRange(response.get_header_value("Content-Range"), &head)) return head;
    return absl::FailedPreconditionError("answered 206 without saying which part");
  }
  int64_t length = 0;
  if (absl::SimpleAtoi(response.get_header_value("Content-Length"), &length) && length >= 0) {
    head.total = length;
  }
  return head;
}

// What a status that is neither a body nor a redirect means.
GetOutcome Refusal(const httplib::Response& response, const GetRequest& request, const Url& asked) {
  const int code = response.status;
  std::string text = absl::StrCat(asked.Shown(), " answered ", code);
  GetOutcome outcome;
  if (code == 401 || code == 403) {
    absl::StrAppend(&text, request.bearer.empty()
                               ? ": it wants to know who asks (HF_TOKEN for hf://)"
                               : ": HF_TOKEN is not known there, or may not read this");
    outcome.status = absl::PermissionDeniedError(text);
  } else if (code == 404 || code == 410) {
    outcome.status = absl::NotFoundError(absl::StrCat(text, ": there is no such thing"));
  } else if (code == 416) {
    outcome.status = absl::OutOfRangeError(text);
  } else {
    outcome.again = code == 408 || code == 425 || code == 429 || code >= 500;
    outcome.status =
        outcome.again ? absl::UnavailableError(text) : absl::FailedPreconditionError(text);
    int64_t seconds = 0;
    if (absl::SimpleAtoi(response.get_header_value("Retry-After"), &seconds) && seconds > 0) {
      const Duration limit = kRetryAfterMax;
      outcome.after =
          seconds > 3600 ? limit : std::min(limit, Duration(std::chrono::seconds(seconds)));
    }
  }
  return outcome;
}

// Certificates that do not hold will not hold the next time either.
GetOutcome Failure(httplib::Error error, const Url& asked) {
  const std::string where = asked.Shown();
  if (error == httplib::Error::SSLServerVerification || error == httplib::Error::SSLLoadingCerts) {
    return {.status = absl::FailedPreconditionError(
                absl::StrCat(where,
                             ": its certificate is by nobody who is trusted here, or for "
                             "another name (SSL_CERT_FILE names authorities)"))};
  }
  return {.status = absl::UnavailableError(absl::StrCat(where, ": ", httplib::to_string(error))),
          .again = true};
}

std::unique_ptr<httplib::ClientImpl> NewClient(const Url& url, const std::optional<Proxy>& proxy,
                                               const HttpClient::Options& options) {
  std::unique_ptr<httplib::ClientImpl> client;
  if (url.https) {
    auto secure = std::make_unique<httplib::SSLClient>(url.host, url.port);
    secure->enable_server_certificate_verification(true);
    client = std::move(secure);
  } else {
    client = std::make_unique<httplib::ClientImpl>(url.host, url.port);
  }
  client->set_follow_location(false);
  client->set_decompress(false);
  client->set_url_encode(false);  // targets are encoded already, and signed ones must stay as is
  client->set_connection_timeout(options.connect_timeout);
  client->set_read_timeout(options.stall_timeout);
  client->set_write_timeout(options.stall_timeout);
  if (proxy.has_value()) {
    client->set_proxy(proxy->host, proxy->port);
    if (!proxy->user.empty()) client->set_proxy_basic_auth(proxy->user, proxy->password);
  }
  return client;
}

// One request and its answer, without following it; where a redirect leads.
class Exchange {
 public:
  Exchange(const GetRequest& request, const Url& url, bool with_bearer)
      : request_(request), url_(url), with_bearer_(with_bearer) {}

  std::optional<std::string> Run(httplib::ClientImpl* client, const Begin& begin, const Take& take,
                                 GetOutcome* outcome);

 private:
  httplib::Headers RequestHeaders() const {
    // Parts of a file can only be put together where nobody has compressed them.
    httplib::Headers headers = {{"Accept-Encoding", "identity"}, {"User-Agent", "nibble-fetch"}};
    if (with_bearer_) headers.emplace("Authorization", absl::StrCat("Bearer ", request_.bearer));
    if (request_.from > 0) headers.emplace("Range", absl::StrCat("bytes=", request_.from, "-"));
    return headers;
  }

  const GetRequest& request_;
  const Url& url_;
  bool with_bearer_;
};

std::optional<std::string> Exchange::Run(httplib::ClientImpl* client, const Begin& begin,
                                         const Take& take, GetOutcome* outcome) {
  bool is_body = false;
  size_t unread = 0;
  absl::Status ours;
  const httplib::Result result = client->Get(
      url_.target, RequestHeaders(),
      [&](const httplib::Response& response) {
        is_body = response.status == 200 || response.status == 206;
        if (!is_body) return true;
        const absl::StatusOr<BodyHead> head = HeadOf(response);
        ours = head.ok() ? begin(*head) : head.status();
        return ours.ok();
      },
      [&](const char* bytes, size_t size) {
        if (is_body) {
          ours = take({bytes, size});
        } else if ((unread += size) > kRefusalBytesMax) {
          ours = absl::FailedPreconditionError(
              absl::StrCat(url_.Shown(), " answered with no end, and not with what was asked for"));
        }
        return ours.ok();
      });
  if (!ours.ok()) {
    *outcome = {.status = ours};
  } else if (!result) {
    *outcome = Failure(result.error(), url_);
  } else if (IsRedirect(result->status) && result->has_header("Location")) {
    return result->get_header_value("Location");
  } else if (is_body) {
    *outcome = {.status = absl::OkStatus()};
  } else {
    *outcome = Refusal(*result, request_, url_);
  }
  return std::nullopt;
}

GetOutcome Follow(const GetRequest& request, const HttpClient::Options& options, const Begin& begin,
                  const Take& take) {
  Url url = request.url;
  for (int hop = 0; hop <= kRedirectsMax; ++hop) {
    const absl::StatusOr<std::optional<Proxy>> proxy = ProxyFor(url, options.env);
    if (!proxy.ok()) return {.status = proxy.status()};
    const bool with_bearer = !request.bearer.empty() && url.SameOrigin(request.url);
    const auto client = NewClient(url, *proxy, options);
    GetOutcome outcome;
    const std::optional<std::string> location =
        Exchange(request, url, with_bearer).Run(client.get(), begin, take, &outcome);
    if (!location.has_value()) return outcome;
    absl::StatusOr<Url> next = ResolveUrl(url, *location);
    if (!next.ok() || (url.https && !next->https)) {
      return {.status = absl::FailedPreconditionError(
                  absl::StrCat(url.Shown(), " leads to ",
                               next.ok() ? next->Shown() + ", which is not https" : "no address"))};
    }
    url = *std::move(next);
  }
  return {.status = absl::FailedPreconditionError(
              absl::StrCat(request.url.Shown(), " leads on more than ", kRedirectsMax, " times"))};
}

}  // namespace

GetOutcome HttpClient::Get(const GetRequest& request, const Begin& begin, const Take& take) {
  try {
    return Follow(request, options_, begin, take);
  } catch (const std::exception& error) {
    return {.status = absl::InternalError(
                absl::StrCat(request.url.Shown(), ": HTTP library: ", error.what()))};
  }
}

}  // namespace nibble::fetch
