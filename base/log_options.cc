#include "base/log_options.h"

namespace nibble {

void DeclareLogOptions(ConfigParser* parser, std::string* level, std::string* format) {
  parser->Choice<std::string>("log.level", level,
                              {{"trace", "trace"},
                               {"debug", "debug"},
                               {"info", "info"},
                               {"warn", "warn"},
                               {"error", "error"},
                               {"off", "off"}},
                              "Least important lines shown");
  parser->Choice<std::string>("log.format", format, {{"text", "text"}, {"json", "json"}},
                              "Form of the lines");
}

}  // namespace nibble
