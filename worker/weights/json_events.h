// One JSON document as events, for headers of which a stranger chose the length.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include "nlohmann/json.hpp"

namespace nibble::weights {

struct JsonEnd {
  bool whole = false;              // every event was given and wanted
  std::optional<size_t> wrong_at;  // the byte at which the text is no JSON; none: not wanted
};

// As nlohmann::json::sax_parse, with the same events for the same text, several times as fast: what
// lies between quotes, blanks or digits costs about a nanosecond a byte. Stops where an event is
// not wanted (false). A byte-order mark is no JSON, and a zero byte ends nothing. Never calls
// parse_error; sizes of containers are not known. The handler bounds the depth.
[[nodiscard]] JsonEnd ReadJsonEvents(std::string_view text,
                                     nlohmann::json_sax<nlohmann::json>* events);

}  // namespace nibble::weights
