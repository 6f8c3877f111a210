// Why a process ended, where Kubernetes looks for it.
#pragma once

#include <string>
#include <string_view>

namespace nibble {

// "/dev/termination-log" where there is such a file, as in a pod; else empty.
[[nodiscard]] std::string DefaultTerminationLog();

// Replaces the file's contents by the text, cut to what Kubernetes keeps. Does nothing where the
// path is empty; a path that cannot be written is one line in the log, for the process ends anyway.
void WriteLastWords(const std::string& path, int exit_code, std::string_view why);

}  // namespace nibble
