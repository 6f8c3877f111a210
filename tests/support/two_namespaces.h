// Two network namespaces joined by a cable, as two machines would be. Needs root.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace nibble::testing {

// Gone with the object.
class TwoNamespaces {
 public:
  TwoNamespaces() {
    const std::string id = std::to_string(getpid());
    for (int side = 0; side < 2; ++side) {
      names_[side] = "nibble" + id + (side == 0 ? "a" : "b");
      links_[side] = "nb" + id.substr(id.size() > 6 ? id.size() - 6 : 0) + (side == 0 ? "a" : "b");
      made_ &= Run("ip netns add " + names_[side]);
    }
    made_ = made_ && Run("ip link add " + links_[0] + " netns " + names_[0] +
                         " type veth peer name " + links_[1] + " netns " + names_[1]);
    for (int side = 0; side < 2 && made_; ++side) {
      const std::string in = "ip -n " + names_[side];
      made_ = Run(in + " addr add " + address(side) + "/24 dev " + links_[side]) &&
              Run(in + " link set " + links_[side] + " up") && Run(in + " link set lo up");
    }
  }
  ~TwoNamespaces() {
    for (const std::string& name : names_) Run("ip netns del " + name);
  }

  TwoNamespaces(const TwoNamespaces&) = delete;
  TwoNamespaces& operator=(const TwoNamespaces&) = delete;

  // False where it is not permitted.
  [[nodiscard]] bool made() const { return made_; }
  [[nodiscard]] std::string address(int side) const {
    return side == 0 ? "10.231.7.1" : "10.231.7.2";
  }
  [[nodiscard]] std::string link(int side) const { return links_[side]; }
  // Words that start a program on that side.
  [[nodiscard]] std::vector<std::string> Prefix(int side) const {
    return {"/usr/sbin/ip", "netns", "exec", names_[side]};
  }
  // Pulls the cable: what is sent vanishes without a word.
  [[nodiscard]] bool Cut() const {
    return Run("ip -n " + names_[0] + " neigh replace " + address(1) + kNobody + links_[0]) &&
           Run("ip -n " + names_[1] + " neigh replace " + address(0) + kNobody + links_[1]);
  }

  // Moves the calling process.
  [[nodiscard]] bool Enter(int side) const {
    const int fd = open(("/run/netns/" + names_[side]).c_str(), O_RDONLY | O_CLOEXEC);
    const bool entered = fd >= 0 && setns(fd, CLONE_NEWNET) == 0;
    if (fd >= 0) close(fd);
    return entered;
  }

 private:
  static constexpr const char* kNobody = " lladdr 02:00:00:00:00:99 nud permanent dev ";

  static bool Run(const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  }

  std::string names_[2];
  std::string links_[2];
  bool made_ = true;
};

}  // namespace nibble::testing
