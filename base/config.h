// One declaration per option gives its flag, its environment variable and its key in a TOML file.
//
//   ConfigParser parser({.name = "nibble-worker", .summary = "...", .example = "..."});
//   parser.Group("Model");
//   parser.Int("tp", &options.tp, {1, 64}, "Ranks that share the model");
//   if (auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
//
// The key "log.level" is --log-level, NIBBLE_LOG_LEVEL and `level` in the table [log]; the key
// "queue_size" is --queue-size, NIBBLE_QUEUE_SIZE and `queue_size`. A flag wins over the
// environment, that over the file, that over the default, which is the target's value when it is
// declared. The file is named by --config or NIBBLE_CONFIG. An unknown key or a bad value is one
// line that names key, value, origin and what is allowed, and exit code 2. An empty value is a
// value: "--announce=", NIBBLE_ANNOUNCE= and `announce = ""` all say the empty text.
//
// Not thread-safe; used once, at the start of main(). Targets outlive the parser.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"

namespace nibble {

struct ConfigProgram {
  std::string name;     // "nibble-worker", "nibble serve"
  std::string summary;  // one sentence
  std::string example;  // works as pasted
  // The table of the file that this program reads; empty = the whole file. Where it is set, only
  // that table and `other_sections` may stand in the file.
  std::string section = {};
  std::vector<std::string> other_sections = {};
};

// Inclusive.
template <typename T>
struct Allowed {
  T min = std::numeric_limits<T>::lowest();
  T max = std::numeric_limits<T>::max();
};
template <>
struct Allowed<Duration> {
  Duration min = Duration::min();
  Duration max = Duration::max();
};

struct ConfigOutcome {
  std::optional<int> exit_code;  // set: the program ends with it
  std::string out;               // for stdout: help or version
  std::string error;             // for stderr: one line
};

// One declared option. Its setters chain: parser.String(...).Positional().Required().
class ConfigOption {
 public:
  // Also taken from the command line's place, in order of declaration.
  ConfigOption& Positional() {
    positional_ = true;
    return *this;
  }
  // Must be given somewhere.
  ConfigOption& Required() {
    required_ = true;
    return *this;
  }
  // A one-letter flag beside the long one.
  ConfigOption& Short(char letter) {
    short_flag_ = letter;
    return *this;
  }

 private:
  friend class ConfigParser;
  // Sets the target from the texts; false when they are not a value.
  using Setter = std::function<bool(const std::vector<std::string>& texts)>;

  std::string key_;
  std::string group_;
  std::string help_;
  std::string value_name_;    // "INT", "SIZE"; empty = a switch
  std::string allowed_;       // "1 to 64"; empty = anything
  std::string default_text_;  // empty = none shown
  Setter set_;
  bool is_list_ = false;
  bool positional_ = false;
  bool required_ = false;
  char short_flag_ = '\0';
};

class ConfigParser {
 public:
  using GetEnv = std::function<const char*(const char* name)>;

  explicit ConfigParser(ConfigProgram program);
  ~ConfigParser();
  ConfigParser(const ConfigParser&) = delete;
  ConfigParser& operator=(const ConfigParser&) = delete;

  // Options declared after this stand under `title` in --help.
  void Group(std::string title) { group_ = std::move(title); }

  ConfigOption& String(std::string key, std::string* target, std::string help);
  // Of a folder that exists.
  ConfigOption& Folder(std::string key, std::string* target, std::string help);
  ConfigOption& Bool(std::string key, bool* target, std::string help);  // --x, --no-x
  ConfigOption& Int(std::string key, int32_t* target, Allowed<int32_t> allowed, std::string help);
  ConfigOption& Int(std::string key, int64_t* target, Allowed<int64_t> allowed, std::string help);
  ConfigOption& Number(std::string key, double* target, Allowed<double> allowed, std::string help);
  // Stay unset where nothing is given.
  ConfigOption& Int(std::string key, std::optional<int64_t>* target, Allowed<int64_t> allowed,
                    std::string help);
  ConfigOption& Number(std::string key, std::optional<double>* target, Allowed<double> allowed,
                       std::string help);
  // "24GiB", "512MB", "4096".
  ConfigOption& Bytes(std::string key, int64_t* target, Allowed<int64_t> allowed, std::string help);
  // "500ms", "10s", "2m".
  ConfigOption& Time(std::string key, Duration* target, Allowed<Duration> allowed,
                     std::string help);
  // A flag takes one item or several with commas and may be repeated; a file has an array.
  ConfigOption& List(std::string key, std::vector<std::string>* target, std::string help);
  ConfigOption& Ints(std::string key, std::vector<int32_t>* target, Allowed<int32_t> allowed,
                     std::string help);
  // One of a few words, each with its value.
  template <typename T>
  ConfigOption& Choice(const std::string& key, T* target,
                       const std::vector<std::pair<std::string, T>>& choices,
                       const std::string& help);

  // `args` without the program's name.
  [[nodiscard]] ConfigOutcome Parse(const std::vector<std::string>& args, const GetEnv& env);
  // Parses main()'s arguments and the process's environment and prints; the exit code where the
  // program ends here.
  [[nodiscard]] std::optional<int> ParseMain(int argc, const char* const* argv);

  [[nodiscard]] std::string Help() const;

 private:
  struct Flags;  // what stood on the command line

  // The texts given for an option, and where: "--tp", "NIBBLE_TP", "nibble.toml".
  struct Given {
    std::vector<std::string> texts;
    std::string origin;
  };
  using FileValues = std::vector<std::pair<std::string, std::vector<std::string>>>;

  ConfigOption& Add(std::string key, std::string help, std::string value_name,
                    std::string default_text, ConfigOption::Setter set);
  // "--flag=" as two words; INVALID_ARGUMENT where it is a switch.
  [[nodiscard]] absl::StatusOr<std::vector<std::string>> SplitEmptyValues(
      const std::vector<std::string>& args) const;
  [[nodiscard]] absl::StatusOr<Flags> ParseFlags(const std::vector<std::string>& args) const;
  [[nodiscard]] absl::StatusOr<FileValues> ReadFile(const std::string& path) const;
  [[nodiscard]] std::optional<Given> Find(const ConfigOption& option, const Flags& flags,
                                          const GetEnv& env, const FileValues& file,
                                          const std::string& path) const;
  [[nodiscard]] absl::Status Apply(const Flags& flags, const GetEnv& env);

  ConfigProgram program_;
  std::string group_ = "Options";
  std::vector<std::unique_ptr<ConfigOption>> options_;
};

// The values of a TOML file as texts, keyed by dotted path, in file order. INVALID_ARGUMENT with
// file and line where it is no TOML, or where a value is none that a flag could say.
[[nodiscard]] absl::StatusOr<std::vector<std::pair<std::string, std::vector<std::string>>>>
ReadTomlFile(const std::string& path);

template <typename T>
ConfigOption& ConfigParser::Choice(const std::string& key, T* target,
                                   const std::vector<std::pair<std::string, T>>& choices,
                                   const std::string& help) {
  std::string allowed;
  std::string default_text;
  for (const auto& [word, value] : choices) {
    allowed += (allowed.empty() ? "" : ", ") + word;
    if (value == *target) default_text = word;
  }
  ConfigOption& option = Add(key, help, "WORD", std::move(default_text),
                             [target, choices](const std::vector<std::string>& texts) {
                               for (const auto& [word, value] : choices) {
                                 if (word != texts.front()) continue;
                                 *target = value;
                                 return true;
                               }
                               return false;
                             });
  option.allowed_ = std::move(allowed);
  return option;
}

}  // namespace nibble
