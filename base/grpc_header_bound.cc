#include "base/grpc_header_bound.h"

#include <grpcpp/version_info.h>

// gRPC 1.51 collects headers until they end, and only then looks whether there are too many
// (CVE-2023-33953, mended in 1.53.2); for other versions nothing is known to fit.
#if GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR == 51

#include <dlfcn.h>
#include <grpc/slice.h>

#include <atomic>
#include <memory>
#include <span>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/header_blocks.h"

// The library's own, which its headers do not show: it calls both through its table of dynamic
// symbols, where those of the program come first.
struct grpc_chttp2_transport;
struct grpc_endpoint;
struct grpc_transport;
namespace grpc_core {
class ChannelArgs;
}
// NOLINTBEGIN(readability-identifier-naming): they are gRPC's names
grpc_transport* grpc_create_chttp2_transport(const grpc_core::ChannelArgs& arguments,
                                             grpc_endpoint* endpoint, bool is_client);
absl::Status grpc_chttp2_perform_read(grpc_chttp2_transport* transport, const grpc_slice& bytes);
// NOLINTEND(readability-identifier-naming)

namespace nibble {
namespace {

// Of the library's functions there is one a process, so of these there is, too.
struct Connections {
  std::atomic<size_t> bytes_max{0};  // 0: no bound
  absl::Mutex mutex;
  // By transport. Nothing of the library's says that one has gone: its entry stays until the heap
  // gives its address to the next, so there are hardly more than there were connections at once.
  absl::flat_hash_map<const void*, std::unique_ptr<HeaderBlocks>> servers ABSL_GUARDED_BY(mutex);
};

Connections& TheConnections() {
  static auto* const kConnections = new Connections;  // gRPC's threads may outlive main()
  return *kConnections;
}

template <typename Function>
Function* Original(const char* symbol) {
  void* const found = ::dlsym(RTLD_NEXT, symbol);
  CHECK_MSG(found != nullptr, symbol);
  return reinterpret_cast<Function*>(found);
}

void Opened(const void* transport, bool is_client) {
  Connections& connections = TheConnections();
  const size_t bytes_max = connections.bytes_max.load();
  const absl::MutexLock lock(&connections.mutex);
  if (is_client || bytes_max == 0) {
    connections.servers.erase(transport);
  } else {
    connections.servers[transport] = std::make_unique<HeaderBlocks>(bytes_max);
  }
}

// Null: a client's, or one that nothing bounds. A transport reads on one thread at a time.
HeaderBlocks* Find(const void* transport) {
  Connections& connections = TheConnections();
  const absl::ReaderMutexLock lock(&connections.mutex);
  const auto found = connections.servers.find(transport);
  return found == connections.servers.end() ? nullptr : found->second.get();
}

}  // namespace

void BoundGrpcHeaderBlocks(size_t metadata_bytes) {
  TheConnections().bytes_max.store(2 * metadata_bytes);
}

}  // namespace nibble

grpc_transport* grpc_create_chttp2_transport(const grpc_core::ChannelArgs& arguments,
                                             grpc_endpoint* endpoint, bool is_client) {
  static auto* const kOriginal = nibble::Original<decltype(grpc_create_chttp2_transport)>(
      "_Z28grpc_create_chttp2_transportRKN9grpc_core11ChannelArgsEP13grpc_endpointb");
  grpc_transport* const transport = kOriginal(arguments, endpoint, is_client);
  nibble::Opened(transport, is_client);
  return transport;
}

absl::Status grpc_chttp2_perform_read(grpc_chttp2_transport* transport, const grpc_slice& bytes) {
  static auto* const kOriginal = nibble::Original<decltype(grpc_chttp2_perform_read)>(
      "_Z24grpc_chttp2_perform_readP21grpc_chttp2_transportRK10grpc_slice");
  if (nibble::HeaderBlocks* const blocks = nibble::Find(transport);
      blocks != nullptr && !blocks->Take({GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes)})) {
    return absl::ResourceExhaustedError("the headers of a call are too long");
  }
  return kOriginal(transport, bytes);
}

#else

namespace nibble {

void BoundGrpcHeaderBlocks(size_t /*metadata_bytes*/) {}

}  // namespace nibble

#endif
