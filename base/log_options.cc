#include "base/log_options.h"

#include "base/last_words.h"

namespace nibble {

void DeclareTerminationLog(ConfigParser* parser, std::string* path) {
  *path = DefaultTerminationLog();
  parser->String("termination_log", path,
                 "File that gets the reason of an end that was no drain; empty: none. In a pod: "
                 "/dev/termination-log");
}

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
