// A list of small numbers, each at most once, whose links lie in an array that several lists share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nibble::scheduling {

struct IdLink {
  int32_t before = -1;
  int32_t after = -1;
};

// Every call takes the array of links, [id]. An id is in one of the lists of an array at most.
struct LinkedIds {
  int32_t first = -1;
  int32_t last = -1;
  int32_t size = 0;

  void Append(int32_t id, std::vector<IdLink>* links) {
    (*links)[static_cast<size_t>(id)] = {.before = last, .after = -1};
    (last < 0 ? first : (*links)[static_cast<size_t>(last)].after) = id;
    last = id;
    ++size;
  }
  // REQUIRES: it is in this list.
  void Remove(int32_t id, std::vector<IdLink>* links) {
    const IdLink link = (*links)[static_cast<size_t>(id)];
    (link.before < 0 ? first : (*links)[static_cast<size_t>(link.before)].after) = link.after;
    (link.after < 0 ? last : (*links)[static_cast<size_t>(link.after)].before) = link.before;
    --size;
  }
};

}  // namespace nibble::scheduling
