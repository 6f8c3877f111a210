// The page that looks at one process from its own /metrics: plain HTML and JavaScript, compiled in
// from base/status_page.html.
#pragma once

#include <string_view>

namespace nibble {

// UTF-8 text/html, for the whole life of the program.
[[nodiscard]] std::string_view StatusPage();

}  // namespace nibble
