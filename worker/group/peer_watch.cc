#include "worker/group/peer_watch.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"

namespace nibble::group {

absl::Status StartPeerWatch(int death_fd) {
  // A supervisor that died before this line closed its end of the pipe.
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) {
    return absl::InternalError(absl::StrCat("prctl failed: ", std::strerror(errno)));
  }
  std::thread([death_fd] {
    char byte = 0;
    while (::read(death_fd, &byte, 1) < 0 && errno == EINTR) {
    }
    ::_exit(kExitRankLost);
  }).detach();
  return absl::OkStatus();
}

}  // namespace nibble::group
