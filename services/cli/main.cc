// The program `nibble`: finds the command and runs it.
#include <array>
#include <cstdio>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "base/exit_codes.h"
#include "base/version.h"
#include "services/cli/commands.h"

namespace nibble::cli {
namespace {

struct Command {
  const char* name;
  const char* summary;
  int (*run)(int argc, const char* const* argv);
};

constexpr std::array kCommands = {
    Command{"serve", "Serve a model: a gateway and a group of workers on this machine", RunServe},
    Command{"chat", "Talk to a server, one question or many", RunChat},
    Command{"generate", "Continue a text", RunGenerate},
    Command{"drain", "Let a gateway take no new work and finish what it has", RunDrain},
    Command{"undrain", "Let it take work again", RunUndrain},
    Command{"keys", "Make an API key for a gateway", RunKeys},
    Command{"fetch", "Fetch a model folder from a hub or a web server", RunFetch},
    Command{"inspect", "Say what is in a model folder and how it splits over ranks", RunInspect},
    Command{"plan", "Say what a model takes in memory, before anything is loaded", RunPlan},
    Command{"quantize", "Turn a 16-bit model into a 4-bit AWQ checkpoint", RunQuantize},
    Command{"bench", "Measure a model on this machine", RunBench},
};

std::string Help() {
  std::string help =
      "Serve language models whose weights are 4-bit AWQ.\n\n"
      "Usage: nibble COMMAND [options]\n\nExample:\n"
      "  nibble serve .cache/models/smollm2-135m-awq --tp 2\n\nCommands:\n";
  for (const Command& command : kCommands) {
    help += absl::StrFormat("  %-10s %s\n", command.name, command.summary);
  }
  return help +
         "  version    Version and build\n\n"
         "`nibble COMMAND --help` lists a command's options. A file named by --config or\n"
         "NIBBLE_CONFIG holds a table per command ([serve], [chat], …) with the same options.\n";
}

int Main(int argc, const char* const* argv) {
  const std::string_view name = argc > 1 ? argv[1] : "--help";
  if (name == "--help" || name == "-h" || name == "help") {
    std::fputs(Help().c_str(), argc > 1 ? stdout : stderr);
    return argc > 1 ? kExitDrained : kExitConfiguration;
  }
  if (name == "--version" || name == "version") {
    std::puts(VersionLine("nibble").c_str());
    return kExitDrained;
  }
  for (const Command& command : kCommands) {
    if (name == command.name) return command.run(argc - 1, argv + 1);
  }
  std::fprintf(stderr, "nibble: no command is called \"%.100s\" (try --help)\n", argv[1]);
  return kExitConfiguration;
}

}  // namespace

ConfigProgram CommandProgram(const std::string& command, std::string summary, std::string example) {
  ConfigProgram program{.name = "nibble " + command,
                        .summary = std::move(summary),
                        .example = std::move(example),
                        .section = command};
  for (const Command& other : kCommands) {
    if (command != other.name) program.other_sections.emplace_back(other.name);
  }
  return program;
}

}  // namespace nibble::cli

int main(int argc, char** argv) { return nibble::cli::Main(argc, argv); }
