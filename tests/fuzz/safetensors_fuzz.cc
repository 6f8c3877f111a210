// Bytes as a safetensors file: whatever is accepted lies inside the file, every byte of data in
// exactly one tensor, and reads the same after being written again.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iomanip>
#include <iterator>
#include <map>
#include <span>
#include <sstream>
#include <string>

#include "base/check.h"
#include "worker/weights/safetensors.h"

namespace nibble::weights {
namespace {

using Tensors = std::map<std::string, TensorView, std::less<>>;

int64_t BytesOf(const TensorView& view) {
  int64_t bytes = TensorTypeBytes(view.type);
  for (const int64_t dimension : view.shape) bytes *= dimension;
  return bytes;
}

// Names of parsed tensors are valid UTF-8 already.
void WriteQuoted(const std::string& text, std::ostream& out) {
  out << '"';
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) {
      out << "\\u00" << std::hex << std::setw(2) << std::setfill('0') << int{c} << std::dec;
      continue;
    }
    if (c == '"' || c == '\\') out << '\\';
    out << c;
  }
  out << '"';
}

std::string Header(const Tensors& tensors, const std::byte* data) {
  std::ostringstream out;
  const char* separator = "";
  out << '{';
  for (const auto& [name, view] : tensors) {
    out << separator;
    WriteQuoted(name, out);
    out << ":{\"dtype\":\"" << TensorTypeName(view.type) << "\",\"shape\":[";
    for (size_t i = 0; i < view.shape.size(); ++i) out << (i > 0 ? "," : "") << view.shape[i];
    const auto begin = view.data.data() - data;
    out << "],\"data_offsets\":[" << begin << ',' << begin + std::ssize(view.data) << "]}";
    separator = ",";
  }
  out << '}';
  return out.str();
}

std::string Written(const Tensors& tensors, std::span<const std::byte> data) {
  const std::string header = Header(tensors, data.data());
  const uint64_t length = header.size();
  std::string file(sizeof(length) + header.size() + data.size(), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  std::memcpy(file.data() + sizeof(length), header.data(), header.size());
  if (!data.empty()) {
    std::memcpy(file.data() + sizeof(length) + header.size(), data.data(), data.size());
  }
  return file;
}

void Try(std::span<const std::byte> file) {
  std::map<std::string, std::string> metadata;
  const auto tensors = ParseSafetensors(file, &metadata);
  if (!tensors.ok()) {
    CHECK(!tensors.status().message().empty());
    return;
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  const std::span<const std::byte> data = file.subspan(sizeof(header_bytes) + header_bytes);
  size_t covered = 0;
  for (const auto& [name, view] : *tensors) {
    CHECK(static_cast<int64_t>(view.data.size()) == BytesOf(view));
    CHECK(view.data.data() >= data.data());
    CHECK(view.data.data() + view.data.size() <= data.data() + data.size());
    covered += view.data.size();
  }
  CHECK(covered == data.size());
  const std::string again = Written(*tensors, data);
  if (again.size() > sizeof(uint64_t) + kHeaderBytesMax) return;
  const auto second = ParseSafetensors(std::as_bytes(std::span(again)), nullptr);
  CHECK(second.ok());
  CHECK(second->size() == tensors->size());
  for (const auto& [name, view] : *tensors) {
    const TensorView& other = second->at(name);
    CHECK(other.type == view.type && other.shape == view.shape);
    CHECK(other.data.size() == view.data.size());
  }
}

}  // namespace
}  // namespace nibble::weights

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nibble::weights::Try(std::as_bytes(std::span(data, size)));
  return 0;
}
