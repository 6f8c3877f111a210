#include "base/config.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/exit_codes.h"
#include "base/status.h"
#include "base/units.h"
#include "base/version.h"

namespace nibble {
namespace {

constexpr size_t kHelpColumn = 30;
constexpr size_t kShownValueMax = 200;

std::string FlagName(const std::string& key) {
  return absl::StrCat("--", absl::StrReplaceAll(key, {{".", "-"}, {"_", "-"}}));
}

std::string EnvName(const std::string& key) {
  return absl::StrCat("NIBBLE_", absl::AsciiStrToUpper(absl::StrReplaceAll(key, {{".", "_"}})));
}

template <typename T>
bool ParseNumber(std::string_view text, T* value) {
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, *value);
  return error == std::errc() && rest == end;
}

template <typename T>
bool Within(const Allowed<T>& allowed, const T& value) {
  return value >= allowed.min && value <= allowed.max;
}

// "1 to 64", "at least 1", "at most 64".
template <typename T, typename Format>
std::string RangeText(const Allowed<T>& allowed, const Format& format) {
  const bool low = allowed.min != Allowed<T>().min;
  const bool high = allowed.max != Allowed<T>().max;
  if (low && high) return absl::StrCat(format(allowed.min), " to ", format(allowed.max));
  if (low) return absl::StrCat("at least ", format(allowed.min));
  if (high) return absl::StrCat("at most ", format(allowed.max));
  return "";
}

template <typename T>
std::string NumberText(const T& value) {
  return absl::StrCat(value);
}

// A value as it stands in an error line: bounded, and on one line whatever it holds.
std::string Shown(const std::vector<std::string>& texts) {
  std::string joined = absl::StrJoin(texts, ",");
  for (char& c : joined) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  if (joined.size() > kShownValueMax) joined = joined.substr(0, kShownValueMax) + "…";
  return joined;
}

std::vector<std::string> SplitItems(const std::vector<std::string>& texts) {
  std::vector<std::string> items;
  for (const std::string& text : texts) {
    for (absl::string_view item : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
      items.emplace_back(absl::StripAsciiWhitespace(item));
    }
  }
  return items;
}

// Target is T or std::optional<T>.
template <typename T, typename Target>
auto NumberSetter(Target* target, Allowed<T> allowed) {
  return [target, allowed](const std::vector<std::string>& texts) {
    T value{};
    if (!ParseNumber(texts.front(), &value) || !Within(allowed, value)) return false;
    *target = value;
    return true;
  };
}

}  // namespace

struct ConfigParser::Flags {
  std::map<std::string, std::vector<std::string>> values;  // by key
  std::optional<std::string> config;
  bool help = false;
  bool version = false;
};

ConfigParser::ConfigParser(ConfigProgram program) : program_(std::move(program)) {}
ConfigParser::~ConfigParser() = default;

ConfigOption& ConfigParser::Add(std::string key, std::string help, std::string value_name,
                                std::string default_text, ConfigOption::Setter set) {
  auto option = std::make_unique<ConfigOption>();
  option->key_ = std::move(key);
  option->group_ = group_;
  option->help_ = std::move(help);
  option->value_name_ = std::move(value_name);
  option->default_text_ = std::move(default_text);
  option->set_ = std::move(set);
  options_.push_back(std::move(option));
  return *options_.back();
}

ConfigOption& ConfigParser::String(std::string key, std::string* target, std::string help) {
  return Add(std::move(key), std::move(help), "TEXT", *target,
             [target](const std::vector<std::string>& texts) {
               *target = texts.front();
               return true;
             });
}

ConfigOption& ConfigParser::Folder(std::string key, std::string* target, std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "FOLDER", *target,
                             [target](const std::vector<std::string>& texts) {
                               *target = texts.front();
                               std::error_code error;
                               return std::filesystem::is_directory(*target, error);
                             });
  option.allowed_ = "a folder that exists";
  return option;
}

ConfigOption& ConfigParser::Bool(std::string key, bool* target, std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "", *target ? "on" : "off",
                             [target](const std::vector<std::string>& texts) {
                               const std::string text = absl::AsciiStrToLower(texts.front());
                               const bool on = text == "true" || text == "1" || text == "on";
                               const bool off = text == "false" || text == "0" || text == "off";
                               if (on || off) *target = on;
                               return on || off;
                             });
  option.allowed_ = "true, false";
  return option;
}

ConfigOption& ConfigParser::Int(std::string key, int32_t* target, Allowed<int32_t> allowed,
                                std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "INT", absl::StrCat(*target),
                             NumberSetter(target, allowed));
  option.allowed_ = RangeText(allowed, NumberText<int32_t>);
  if (option.allowed_.empty()) option.allowed_ = "a whole number";
  return option;
}

ConfigOption& ConfigParser::Int(std::string key, int64_t* target, Allowed<int64_t> allowed,
                                std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "INT", absl::StrCat(*target),
                             NumberSetter(target, allowed));
  option.allowed_ = RangeText(allowed, NumberText<int64_t>);
  if (option.allowed_.empty()) option.allowed_ = "a whole number";
  return option;
}

ConfigOption& ConfigParser::Number(std::string key, double* target, Allowed<double> allowed,
                                   std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "NUMBER", absl::StrCat(*target),
                             NumberSetter(target, allowed));
  option.allowed_ = RangeText(allowed, NumberText<double>);
  if (option.allowed_.empty()) option.allowed_ = "a number";
  return option;
}

ConfigOption& ConfigParser::Int(std::string key, std::optional<int64_t>* target,
                                Allowed<int64_t> allowed, std::string help) {
  ConfigOption& option =
      Add(std::move(key), std::move(help), "INT", "", NumberSetter(target, allowed));
  option.allowed_ = RangeText(allowed, NumberText<int64_t>);
  return option;
}

ConfigOption& ConfigParser::Number(std::string key, std::optional<double>* target,
                                   Allowed<double> allowed, std::string help) {
  ConfigOption& option =
      Add(std::move(key), std::move(help), "NUMBER", "", NumberSetter(target, allowed));
  option.allowed_ = RangeText(allowed, NumberText<double>);
  return option;
}

ConfigOption& ConfigParser::Bytes(std::string key, int64_t* target, Allowed<int64_t> allowed,
                                  std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "SIZE", FormatBytes(*target),
                             [target, allowed](const std::vector<std::string>& texts) {
                               const auto value = ParseBytes(texts.front());
                               if (!value || !Within(allowed, *value)) return false;
                               *target = *value;
                               return true;
                             });
  option.allowed_ = absl::StrCat("a size such as 24GiB, ", RangeText(allowed, FormatBytes));
  return option;
}

ConfigOption& ConfigParser::Time(std::string key, Duration* target, Allowed<Duration> allowed,
                                 std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "TIME", FormatDuration(*target),
                             [target, allowed](const std::vector<std::string>& texts) {
                               const auto value = ParseDuration(texts.front());
                               if (!value || !Within(allowed, *value)) return false;
                               *target = *value;
                               return true;
                             });
  option.allowed_ = absl::StrCat("a time such as 500ms, ", RangeText(allowed, FormatDuration));
  return option;
}

ConfigOption& ConfigParser::List(std::string key, std::vector<std::string>* target,
                                 std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "TEXT,…", absl::StrJoin(*target, ","),
                             [target](const std::vector<std::string>& texts) {
                               *target = SplitItems(texts);
                               return true;
                             });
  option.is_list_ = true;
  return option;
}

ConfigOption& ConfigParser::Ints(std::string key, std::vector<int32_t>* target,
                                 Allowed<int32_t> allowed, std::string help) {
  ConfigOption& option = Add(std::move(key), std::move(help), "INT,…", absl::StrJoin(*target, ","),
                             [target, allowed](const std::vector<std::string>& texts) {
                               std::vector<int32_t> values;
                               for (const std::string& item : SplitItems(texts)) {
                                 int32_t value = 0;
                                 if (!ParseNumber(item, &value) || !Within(allowed, value)) {
                                   return false;
                                 }
                                 values.push_back(value);
                               }
                               *target = std::move(values);
                               return !target->empty();
                             });
  option.is_list_ = true;
  option.allowed_ =
      absl::StrCat("whole numbers with commas, each ", RangeText(allowed, NumberText<int32_t>));
  return option;
}

namespace {

void CollectOption(const CLI::Option& from, const std::string& key, bool is_list,
                   std::map<std::string, std::vector<std::string>>* values) {
  if (from.count() == 0) return;
  std::vector<std::string> texts = from.results();
  // A scalar that is given twice has its last value.
  if (!is_list) texts.erase(texts.begin(), texts.end() - 1);
  (*values)[key] = std::move(texts);
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ConfigParser::SplitEmptyValues(
    const std::vector<std::string>& args) const {
  std::vector<std::string> words;
  words.reserve(args.size());
  bool flags_end = false;
  for (const std::string& arg : args) {
    flags_end = flags_end || arg == "--";
    const bool empty_value = arg.starts_with("--") && arg.find('=') + 1 == arg.size();
    if (flags_end || !empty_value) {
      words.push_back(arg);
      continue;
    }
    const std::string name = arg.substr(0, arg.size() - 1);
    for (const auto& option : options_) {
      const std::string flag = FlagName(option->key_);
      if (option->value_name_.empty() && (name == flag || name == "--no-" + flag.substr(2))) {
        return absl::InvalidArgumentError(
            absl::StrCat(option->key_, " is \"\" (from ", name, "); allowed: ", option->allowed_));
      }
    }
    words.insert(words.end(), {name, ""});
  }
  return words;
}

absl::StatusOr<ConfigParser::Flags> ConfigParser::ParseFlags(
    const std::vector<std::string>& args) const {
  Flags flags;
  // CLI11 takes the argument after "--flag=" for its value; after "--flag" it takes an empty one.
  ASSIGN_OR_RETURN(const std::vector<std::string> words, SplitEmptyValues(args));
  // CLI11 reports through exceptions; they end here.
  try {
    CLI::App app;
    app.set_help_flag();
    std::vector<std::pair<const ConfigOption*, CLI::Option*>> declared;
    for (const auto& option : options_) {
      const std::string flag = FlagName(option->key_);
      std::string names = option->short_flag_ != '\0'
                              ? absl::StrCat("-", std::string(1, option->short_flag_), ",")
                              : "";
      CLI::Option* target = nullptr;
      if (option->value_name_.empty()) {
        target = app.add_flag(absl::StrCat(names, flag, ",!--no-", flag.substr(2)));
      } else {
        target = app.add_option(
            absl::StrCat(names, flag, option->positional_ ? "," + option->key_ : ""));
        target->expected(1)->allow_extra_args(false);
      }
      target->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
      declared.emplace_back(option.get(), target);
    }
    CLI::Option* config = app.add_option("--config");
    config->expected(1)->allow_extra_args(false)->multi_option_policy(
        CLI::MultiOptionPolicy::TakeLast);
    app.add_flag("-h,--help", flags.help);
    app.add_flag("--version", flags.version);
    app.parse(std::vector<std::string>(words.rbegin(), words.rend()));
    if (config->count() > 0) flags.config = config->results().back();
    for (const auto& [option, target] : declared) {
      CollectOption(*target, option->key_, option->is_list_, &flags.values);
    }
  } catch (const CLI::ExtrasError& error) {
    return absl::InvalidArgumentError(absl::StrCat("unknown ", Shown({error.what()})));
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(Shown({error.what()}));
  }
  return flags;
}

absl::StatusOr<ConfigParser::FileValues> ConfigParser::ReadFile(const std::string& path) const {
  ASSIGN_OR_RETURN(FileValues all, ReadTomlFile(path));
  const std::string prefix = program_.section.empty() ? "" : program_.section + ".";
  FileValues values;
  for (auto& [key, texts] : all) {
    std::string name;  // stays empty for a key outside the program's table
    if (key.starts_with(prefix)) {
      name = key.substr(prefix.size());
    } else {
      const std::string table = key.substr(0, key.find('.'));
      if (std::find(program_.other_sections.begin(), program_.other_sections.end(), table) !=
          program_.other_sections.end()) {
        continue;
      }
    }
    const bool known = std::any_of(options_.begin(), options_.end(),
                                   [&](const auto& option) { return option->key_ == name; });
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat("unknown key ", Shown({key}), " is ", "\"", Shown(texts), "\" in ", path,
                       "; allowed: the options of ", program_.name, " --help",
                       prefix.empty() ? "" : absl::StrCat(", in [", program_.section, "]")));
    }
    values.emplace_back(name, std::move(texts));
  }
  return values;
}

std::optional<ConfigParser::Given> ConfigParser::Find(const ConfigOption& option,
                                                      const Flags& flags, const GetEnv& env,
                                                      const FileValues& file,
                                                      const std::string& path) const {
  if (const auto flag = flags.values.find(option.key_); flag != flags.values.end()) {
    return Given{.texts = flag->second, .origin = FlagName(option.key_)};
  }
  if (const char* text = env(EnvName(option.key_).c_str())) {
    return Given{.texts = {text}, .origin = EnvName(option.key_)};
  }
  for (const auto& [key, texts] : file) {
    if (key == option.key_) return Given{.texts = texts, .origin = path};
  }
  return std::nullopt;
}

absl::Status ConfigParser::Apply(const Flags& flags, const GetEnv& env) {
  // Either may be empty: no file.
  std::string path = flags.config.value_or("");
  if (!flags.config.has_value()) {
    if (const char* text = env("NIBBLE_CONFIG")) path = text;
  }
  FileValues file;
  if (!path.empty()) {
    ASSIGN_OR_RETURN(file, ReadFile(path));
  }
  for (const auto& option : options_) {
    const auto given = Find(*option, flags, env, file, path);
    if (!given) {
      if (!option->required_) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          option->key_, " is not given; give ",
          option->positional_ ? absl::StrCat(absl::AsciiStrToUpper(option->key_), " or ") : "",
          FlagName(option->key_), " or ", EnvName(option->key_)));
    }
    const bool one_text = option->is_list_ || given->texts.size() == 1;
    if (one_text && option->set_(given->texts)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(option->key_, " is \"", Shown(given->texts), "\" (from ", given->origin,
                     "); allowed: ", option->allowed_.empty() ? "one text" : option->allowed_));
  }
  return absl::OkStatus();
}

ConfigOutcome ConfigParser::Parse(const std::vector<std::string>& args, const GetEnv& env) {
  const auto fail = [this](const absl::Status& status) {
    return ConfigOutcome{
        .exit_code = kExitConfiguration,
        .out = {},
        .error = absl::StrCat(program_.name, ": ", status.message(), " (try --help)\n")};
  };
  const auto flags = ParseFlags(args);
  if (!flags.ok()) return fail(flags.status());
  if (flags->help) return {.exit_code = 0, .out = Help(), .error = {}};
  if (flags->version) {
    return {.exit_code = 0, .out = VersionLine(program_.name) + "\n", .error = {}};
  }
  const absl::Status applied = Apply(*flags, env);
  if (!applied.ok()) return fail(applied);
  return {};
}

std::optional<int> ConfigParser::ParseMain(int argc, const char* const* argv) {
  const std::vector<std::string> args(argv + std::min(argc, 1), argv + argc);
  const ConfigOutcome outcome = Parse(args, [](const char* name) { return std::getenv(name); });
  std::fputs(outcome.out.c_str(), stdout);
  std::fputs(outcome.error.c_str(), stderr);
  return outcome.exit_code;
}

std::string ConfigParser::Help() const {
  std::string usage = absl::StrCat("Usage: ", program_.name);
  for (const auto& option : options_) {
    if (!option->positional_) continue;
    const std::string name = absl::AsciiStrToUpper(option->key_);
    absl::StrAppend(&usage, " ", option->required_ ? name : absl::StrCat("[", name, "]"));
  }
  std::string help = absl::StrCat(program_.summary, "\n\n", usage, " [options]\n\nExample:\n  ",
                                  absl::StrReplaceAll(program_.example, {{"\n", "\n  "}}), "\n");
  std::string group;
  const auto line = [&help](const std::string& left, const std::string& right) {
    const size_t gap = left.size() < kHelpColumn ? kHelpColumn - left.size() : 1;
    absl::StrAppend(&help, "  ", left, std::string(gap, ' '), right, "\n");
  };
  for (const auto& option : options_) {
    if (option->group_ != group) absl::StrAppend(&help, "\n", option->group_, ":\n");
    group = option->group_;
    std::string left = option->short_flag_ != '\0'
                           ? absl::StrCat("-", std::string(1, option->short_flag_), ", ")
                           : "";
    absl::StrAppend(&left, FlagName(option->key_), option->value_name_.empty() ? "" : " ",
                    option->value_name_);
    std::string right = option->help_;
    if (!option->value_name_.empty() && !option->allowed_.empty()) {
      absl::StrAppend(&right, " (", option->allowed_, ")");
    }
    if (!option->default_text_.empty()) absl::StrAppend(&right, " [", option->default_text_, "]");
    line(left, right);
  }
  absl::StrAppend(&help, "\nAlways:\n");
  line("--config FILE", "TOML file with these options as keys (queue_size, or level in [log])");
  line("-h, --help", "This text");
  line("--version", "Version and build");
  absl::StrAppend(&help,
                  "\nEvery option is also an environment variable: --log-level is "
                  "NIBBLE_LOG_LEVEL.\nA flag wins over the environment, the environment over the "
                  "file.\n");
  return help;
}

}  // namespace nibble
