#include "worker/execution/cuda/nccl_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace nibble::execution {
namespace {

constexpr const char* kFile = "libnccl.so.2";

template <typename Function>
absl::Status Find(void* handle, const char* name, Function* target) {
  void* symbol = ::dlsym(handle, name);
  if (symbol == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(kFile, " has no ", name));
  }
  *target = reinterpret_cast<Function>(symbol);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<NcclLibrary>> NcclLibrary::Open() {
  auto library = std::make_unique<NcclLibrary>();
  library->handle_ = ::dlopen(kFile, RTLD_NOW | RTLD_LOCAL);
  if (library->handle_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("several GPUs need NCCL, and ", kFile,
                     " is not found (LD_LIBRARY_PATH, or beside the programs under lib)"));
  }
  void* handle = library->handle_;
  RETURN_IF_ERROR(Find(handle, "ncclGetVersion", &library->get_version));
  RETURN_IF_ERROR(Find(handle, "ncclGetUniqueId", &library->get_unique_id));
  RETURN_IF_ERROR(Find(handle, "ncclCommInitRankConfig", &library->init_rank_config));
  RETURN_IF_ERROR(Find(handle, "ncclCommGetAsyncError", &library->get_async_error));
  RETURN_IF_ERROR(Find(handle, "ncclCommAbort", &library->abort));
  RETURN_IF_ERROR(Find(handle, "ncclAllReduce", &library->all_reduce));
  RETURN_IF_ERROR(Find(handle, "ncclAllGather", &library->all_gather));
  RETURN_IF_ERROR(Find(handle, "ncclGetErrorString", &library->get_error_string));
  return library;
}

NcclLibrary::~NcclLibrary() {
  if (handle_ != nullptr) static_cast<void>(::dlclose(handle_));
}

}  // namespace nibble::execution
