// The options that every serving program has for its log.
#pragma once

#include <string>

#include "base/config.h"

namespace nibble {

// Declares termination_log in the parser's current group, with the default of the place
// (base/last_words.h).
void DeclareTerminationLog(ConfigParser* parser, std::string* path);

// Declares log.level and log.format in the parser's current group. Both targets are borrowed until
// the parser has run, and fit LoggingOptions (base/logging.h).
void DeclareLogOptions(ConfigParser* parser, std::string* level, std::string* format);

}  // namespace nibble
