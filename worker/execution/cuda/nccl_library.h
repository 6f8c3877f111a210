// NCCL, found when it is needed: a group of one rank runs without it. The declarations are those of
// NCCL's stable interface (2.14 and later), as far as they are used.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace nibble::execution {

struct NcclId {
  char bytes[128];
};
struct NcclCommunicator;  // NCCL's

enum NcclResult : int { kNcclSuccess = 0, kNcclInProgress = 7 };
enum NcclType : int { kNcclByte = 1, kNcclHalf = 6, kNcclFloat = 7, kNcclBfloat16 = 9 };
inline constexpr int kNcclSum = 0;

// As of NCCL 2.14; later versions fill in what they added.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21400;
  int blocking = 0;
};

// The functions of libnccl.so.2, which stays loaded with this.
struct NcclLibrary {
  // FAILED_PRECONDITION in one line where there is none.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<NcclLibrary>> Open();
  ~NcclLibrary();
  NcclLibrary() = default;
  NcclLibrary(const NcclLibrary&) = delete;
  NcclLibrary& operator=(const NcclLibrary&) = delete;

  int (*get_version)(int* version) = nullptr;
  int (*get_unique_id)(NcclId* id) = nullptr;
  int (*init_rank_config)(NcclCommunicator** communicator, int ranks, NcclId id, int rank,
                          NcclConfig* config) = nullptr;
  int (*get_async_error)(NcclCommunicator* communicator, int* error) = nullptr;
  int (*abort)(NcclCommunicator* communicator) = nullptr;
  int (*all_reduce)(const void* send, void* receive, size_t count, int type, int operation,
                    NcclCommunicator* communicator, cudaStream_t stream) = nullptr;
  int (*all_gather)(const void* send, void* receive, size_t count, int type,
                    NcclCommunicator* communicator, cudaStream_t stream) = nullptr;
  const char* (*get_error_string)(int result) = nullptr;

 private:
  void* handle_ = nullptr;
};

}  // namespace nibble::execution
