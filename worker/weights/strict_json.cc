#include "worker/weights/strict_json.h"

#include <set>
#include <string>
#include <vector>

#include "worker/model/message.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;
using nlohmann::json;

// Sees every token before the document is built, so that hostile nesting is never recursed into.
class Checker final : public json::json_sax_t {
 public:
  explicit Checker(int depth_max) : depth_max_(depth_max) {}

  [[nodiscard]] const std::string& problem() const { return problem_; }

  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  bool number_integer(number_integer_t /*value*/) override { return true; }
  bool number_unsigned(number_unsigned_t /*value*/) override { return true; }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override { return true; }
  bool string(string_t& /*value*/) override { return true; }
  bool binary(binary_t& /*value*/) override { return true; }

  bool start_object(std::size_t /*count*/) override {
    keys_.emplace_back();
    return Enter();
  }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem_ = Message("key ", Printable(name), " appears twice");
    return false;
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(std::size_t /*count*/) override { return Enter(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    problem_ = Message("not valid JSON at byte ", position);
    return false;
  }

 private:
  bool Enter() {
    if (++depth_ <= depth_max_) return true;
    problem_ = Message("nested deeper than ", depth_max_, " levels");
    return false;
  }

  const int depth_max_;
  int depth_ = 0;
  std::vector<std::set<std::string>> keys_;
  std::string problem_;
};

}  // namespace

absl::StatusOr<json> ParseStrictJson(std::string_view text, std::string_view source,
                                     int depth_max) {
  if (text.starts_with("\xEF\xBB\xBF")) {
    return absl::InvalidArgumentError(Message(source, ": begins with a byte-order mark"));
  }
  Checker checker(depth_max);
  if (!json::sax_parse(text, &checker)) {
    return absl::InvalidArgumentError(Message(source, ": ", checker.problem()));
  }
  json document = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) {
    return absl::InvalidArgumentError(Message(source, ": not valid JSON"));
  }
  return document;
}

}  // namespace nibble::weights
