// A bound of header blocks for gRPC libraries that have none.
#pragma once

#include <cstddef>

namespace nibble {

// From now on a connection to a gRPC server of this process is closed as soon as the encoded
// headers of one call take twice `metadata_bytes`, the servers' bound of a call's metadata: no
// client's encoder needs more. Once, before the first server; docs/decisions/0010 says why and
// how. Does nothing with a gRPC that bounds them itself.
void BoundGrpcHeaderBlocks(size_t metadata_bytes);

}  // namespace nibble
