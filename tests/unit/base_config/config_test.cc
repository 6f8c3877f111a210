#include "base/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

namespace nibble {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

enum class Color { kRed, kBlue };

struct Options {
  std::string model;
  int32_t tp = 1;
  int64_t memory = int64_t{1} << 30;
  Duration timeout = std::chrono::seconds(60);
  Color color = Color::kRed;
  std::string log_level = "info";
  bool warm = true;
  std::vector<std::string> groups;
  std::vector<int32_t> batches = {1, 8};
  double share = 0.5;
  std::optional<int64_t> seed;
  std::string folder;
};

class ConfigTest : public ::testing::Test {
 protected:
  ConfigTest() { path_ = ::testing::TempDir() + "config_" + std::to_string(getpid()) + ".toml"; }
  ~ConfigTest() override { std::filesystem::remove(path_); }

  void WriteFile(const std::string& text) { std::ofstream(path_) << text; }

  ConfigOutcome Parse(const std::vector<std::string>& args, const std::string& section = "") {
    ConfigParser parser({.name = "prog",
                         .summary = "Does things.",
                         .example = "prog model --tp 2",
                         .section = section,
                         .other_sections = {"other"}});
    parser.String("model", &options_.model, "Folder").Positional().Required();
    parser.Group("Limits");
    parser.Int("tp", &options_.tp, {1, 64}, "Ranks").Short('t');
    parser.Bytes("memory", &options_.memory, {1 << 20, int64_t{1} << 40}, "Budget");
    parser.Time("drain_timeout", &options_.timeout,
                {std::chrono::seconds(0), std::chrono::minutes(10)}, "Drain");
    parser.Choice<Color>("color", &options_.color, {{"red", Color::kRed}, {"blue", Color::kBlue}},
                         "Paint");
    parser.String("log.level", &options_.log_level, "Level");
    parser.Bool("warm", &options_.warm, "Warm up");
    parser.List("groups", &options_.groups, "Addresses");
    parser.Ints("batches", &options_.batches, {1, 256}, "Sizes");
    parser.Number("share", &options_.share, {0, 1}, "Share");
    parser.Folder("folder", &options_.folder, "Place");
    parser.Int("seed", &options_.seed, {0, 9}, "Seed");
    return parser.Parse(args, [this](const char* name) -> const char* {
      const auto found = env_.find(name);
      return found == env_.end() ? nullptr : found->second.c_str();
    });
  }

  Options options_;
  std::map<std::string, std::string> env_;
  std::string path_;
};

TEST_F(ConfigTest, KeepsDefaultsWhereNothingIsGiven) {
  EXPECT_EQ(Parse({"dir"}).exit_code, std::nullopt);
  EXPECT_EQ(options_.model, "dir");
  EXPECT_EQ(options_.tp, 1);
  EXPECT_EQ(options_.log_level, "info");
}

TEST_F(ConfigTest, FlagWinsOverEnvironmentOverFileOverDefault) {
  WriteFile("tp = 2\nmodel = \"file\"\n[log]\nlevel = \"warn\" # why\n");
  EXPECT_EQ(Parse({"--config", path_}).error, "");
  EXPECT_EQ(options_.tp, 2);
  EXPECT_EQ(options_.model, "file");
  EXPECT_EQ(options_.log_level, "warn");

  env_ = {{"NIBBLE_TP", "3"}, {"NIBBLE_LOG_LEVEL", "error"}, {"NIBBLE_CONFIG", path_}};
  EXPECT_EQ(Parse({}).error, "");
  EXPECT_EQ(options_.tp, 3);
  EXPECT_EQ(options_.log_level, "error");
  EXPECT_EQ(options_.model, "file");

  EXPECT_EQ(Parse({"--tp=4", "--log-level", "debug", "flag"}).error, "");
  EXPECT_EQ(options_.tp, 4);
  EXPECT_EQ(options_.log_level, "debug");
  EXPECT_EQ(options_.model, "flag");
}

TEST_F(ConfigTest, ReadsEveryTypeFromFlags) {
  EXPECT_EQ(Parse({"-t", "8", "--memory", "24GiB", "--drain-timeout=500ms", "--color", "blue",
                   "--no-warm", "--groups", "a:1,b:2", "--groups", "c:3", "--batches", "1,2,4",
                   "--share", "0.25", "--model", "m"})
                .error,
            "");
  EXPECT_EQ(options_.tp, 8);
  EXPECT_EQ(options_.memory, int64_t{24} << 30);
  EXPECT_EQ(options_.timeout, std::chrono::milliseconds(500));
  EXPECT_EQ(options_.color, Color::kBlue);
  EXPECT_FALSE(options_.warm);
  EXPECT_THAT(options_.groups, ElementsAre("a:1", "b:2", "c:3"));
  EXPECT_THAT(options_.batches, ElementsAre(1, 2, 4));
  EXPECT_EQ(options_.share, 0.25);
}

TEST_F(ConfigTest, ReadsEveryTypeFromAFile) {
  WriteFile(R"(tp = 8
memory = "24GiB"
drain_timeout = "2m"
color = "blue"
warm = false
groups = ["a#1:1",
  "b:2"]
batches = [1, 2, 4]
share = 0.25
)");
  EXPECT_EQ(Parse({"m", "--config", path_}).error, "");
  EXPECT_EQ(options_.memory, int64_t{24} << 30);
  EXPECT_EQ(options_.timeout, std::chrono::minutes(2));
  EXPECT_EQ(options_.color, Color::kBlue);
  EXPECT_FALSE(options_.warm);
  EXPECT_THAT(options_.groups, ElementsAre("a#1:1", "b:2"));
  EXPECT_THAT(options_.batches, ElementsAre(1, 2, 4));
  EXPECT_EQ(options_.share, 0.25);
}

TEST_F(ConfigTest, BadValueNamesKeyValueOriginAndRangeOnOneLine) {
  const ConfigOutcome flag = Parse({"m", "--tp", "0"});
  EXPECT_EQ(flag.exit_code, 2);
  EXPECT_EQ(flag.error, "prog: tp is \"0\" (from --tp); allowed: 1 to 64 (try --help)\n");

  env_ = {{"NIBBLE_MEMORY", "lots\nmore"}};
  EXPECT_EQ(Parse({"m"}).error,
            "prog: memory is \"lots?more\" (from NIBBLE_MEMORY); allowed: a size such as 24GiB, "
            "1MiB to 1TiB (try --help)\n");
  env_.clear();

  WriteFile("drain_timeout = 30\n");
  EXPECT_EQ(Parse({"m", "--config", path_}).error,
            "prog: drain_timeout is \"30\" (from " + path_ +
                "); allowed: a time such as 500ms, 0 to 10m (try --help)\n");
}

TEST_F(ConfigTest, RefusesTextsThatAreAlmostValues) {
  for (const std::string text : {"", "1x", " 1", "+1", "0x1", "1.0", "65", "99999999999999"}) {
    EXPECT_EQ(Parse({"m", "--tp=" + text}).exit_code, 2) << text;
  }
  EXPECT_EQ(Parse({"m", "--share", "nan"}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--color", "green"}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--batches", "1,x"}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--warm=perhaps"}).exit_code, 2);
}

TEST_F(ConfigTest, AnEmptyValueIsAValueAndNeverTheNextArgument) {
  EXPECT_EQ(Parse({"--log-level=", "m", "--groups=", "--tp=2"}).error, "");
  EXPECT_EQ(options_.log_level, "");
  EXPECT_EQ(options_.model, "m");
  EXPECT_THAT(options_.groups, IsEmpty());
  EXPECT_EQ(options_.tp, 2);

  EXPECT_EQ(Parse({"--log-level", "", "m"}).error, "");
  EXPECT_EQ(options_.log_level, "");
  EXPECT_EQ(options_.model, "m");

  EXPECT_EQ(Parse({"--tp=", "m"}).error,
            "prog: tp is \"\" (from --tp); allowed: 1 to 64 (try --help)\n");
  EXPECT_EQ(Parse({"m", "--warm="}).error,
            "prog: warm is \"\" (from --warm); allowed: true, false (try --help)\n");
  EXPECT_EQ(Parse({"m", "--no-warm="}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--tpp=", "2"}).exit_code, 2);
}

TEST_F(ConfigTest, AnEmptyValueOfTheEnvironmentOrTheFileIsAValue) {
  options_.log_level = "info";
  env_ = {{"NIBBLE_LOG_LEVEL", ""}};
  EXPECT_EQ(Parse({"m"}).error, "");
  EXPECT_EQ(options_.log_level, "");
  env_ = {{"NIBBLE_TP", ""}};
  EXPECT_EQ(Parse({"m"}).error,
            "prog: tp is \"\" (from NIBBLE_TP); allowed: 1 to 64 (try --help)\n");
  env_ = {};

  options_.log_level = "info";
  WriteFile("[log]\nlevel = \"\"\n");
  EXPECT_EQ(Parse({"m", "--config", path_}).error, "");
  EXPECT_EQ(options_.log_level, "");
  WriteFile("tp = \"\"\n");
  EXPECT_EQ(Parse({"m", "--config=" + path_}).exit_code, 2);
}

TEST_F(ConfigTest, AnEmptyConfigMeansNoFile) {
  env_ = {{"NIBBLE_CONFIG", path_ + ".absent"}};
  EXPECT_EQ(Parse({"m"}).exit_code, 2);
  EXPECT_EQ(Parse({"--config=", "m"}).error, "");
  EXPECT_EQ(options_.model, "m");
  env_ = {{"NIBBLE_CONFIG", ""}};
  EXPECT_EQ(Parse({"m"}).error, "");
}

TEST_F(ConfigTest, RefusesWhatItDoesNotKnow) {
  EXPECT_THAT(Parse({"m", "--tpp", "2"}).error, HasSubstr("--tpp"));
  EXPECT_EQ(Parse({"m", "--tpp", "2"}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "another"}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--tp"}).exit_code, 2);

  WriteFile("[log]\nlevle = \"info\"\n");
  const ConfigOutcome outcome = Parse({"m", "--config", path_});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.error, HasSubstr("unknown key log.levle is \"info\" in " + path_));
}

TEST_F(ConfigTest, RefusesFilesThatAreNotToml) {
  WriteFile("tp = 2\nmemory is lots\n");
  EXPECT_THAT(Parse({"m", "--config", path_}).error, HasSubstr(path_ + ":2: "));
  WriteFile("tp = 2\ntp = 3\n");
  EXPECT_EQ(Parse({"m", "--config", path_}).exit_code, 2);
  WriteFile("tp = 1979-05-27\n");
  EXPECT_THAT(Parse({"m", "--config", path_}).error, HasSubstr(":1: tp is neither"));
  WriteFile("tp = [1, 2]\n");
  EXPECT_EQ(Parse({"m", "--config", path_}).exit_code, 2);
  EXPECT_EQ(Parse({"m", "--config", path_ + ".absent"}).exit_code, 2);
}

TEST_F(ConfigTest, ReadsItsOwnTableAndSkipsTheOthersThatItKnows) {
  WriteFile("[prog]\ntp = 2\n[prog.log]\nlevel = \"warn\"\n[other]\nanything = 1\n");
  EXPECT_EQ(Parse({"m", "--config", path_}, "prog").error, "");
  EXPECT_EQ(options_.tp, 2);
  EXPECT_EQ(options_.log_level, "warn");
  WriteFile("tp = 2\n");
  EXPECT_EQ(Parse({"m", "--config", path_}, "prog").exit_code, 2);
}

TEST_F(ConfigTest, SaysWhatIsMissing) {
  EXPECT_EQ(Parse({}).exit_code, 2);
  EXPECT_EQ(Parse({}).error,
            "prog: model is not given; give MODEL or --model or NIBBLE_MODEL (try --help)\n");
}

TEST_F(ConfigTest, HelpShowsGroupsExampleDefaultsAndRanges) {
  const ConfigOutcome outcome = Parse({"--help"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("Usage: prog MODEL [options]"));
  EXPECT_THAT(outcome.out, HasSubstr("Example:\n  prog model --tp 2\n"));
  EXPECT_THAT(outcome.out, HasSubstr("\nLimits:\n  -t, --tp INT"));
  EXPECT_THAT(outcome.out, HasSubstr("Ranks (1 to 64) [1]"));
  EXPECT_THAT(outcome.out, HasSubstr("Paint (red, blue) [red]"));
  EXPECT_THAT(outcome.error, IsEmpty());
}

TEST_F(ConfigTest, VersionNamesTheBuild) {
  const ConfigOutcome outcome = Parse({"--version"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, ::testing::MatchesRegex("prog [0-9]+\\.[0-9]+\\.[0-9]+ \\(.*\\)\n"));
}

TEST_F(ConfigTest, AFolderMustExist) {
  EXPECT_EQ(Parse({"m", "--folder", ::testing::TempDir()}).error, "");
  EXPECT_EQ(options_.folder, ::testing::TempDir());
  EXPECT_EQ(Parse({"m", "--folder", "/nonexistent"}).error,
            "prog: folder is \"/nonexistent\" (from --folder); allowed: a folder that exists (try "
            "--help)\n");
  EXPECT_EQ(Parse({"m", "--folder="}).exit_code, 2);
  WriteFile("folder = \"" + path_ + "\"\n");  // a file
  EXPECT_EQ(Parse({"m", "--config", path_}).exit_code, 2);
}

TEST_F(ConfigTest, OptionalNumbersStayUnset) {
  EXPECT_EQ(Parse({"m"}).error, "");
  EXPECT_EQ(options_.seed, std::nullopt);
  EXPECT_EQ(Parse({"m", "--seed", "0"}).error, "");
  EXPECT_EQ(options_.seed, 0);
  EXPECT_EQ(Parse({"m", "--seed", "10"}).exit_code, 2);
}

TEST_F(ConfigTest, LastOfARepeatedScalarWins) {
  EXPECT_EQ(Parse({"m", "--tp", "2", "--tp", "3"}).error, "");
  EXPECT_EQ(options_.tp, 3);
}

}  // namespace
}  // namespace nibble
