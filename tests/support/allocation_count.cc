#include "tests/support/allocation_count.h"

#include <cstdlib>
#include <new>

namespace nibble::testing {
namespace {

thread_local size_t allocation_count = 0;

}  // namespace

size_t AllocationCount() { return allocation_count; }

}  // namespace nibble::testing

void* operator new(size_t size) {
  ++nibble::testing::allocation_count;
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
