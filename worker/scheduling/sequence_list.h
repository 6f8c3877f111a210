// Lists of sequences in the order of their first admissions.
#pragma once

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "worker/scheduling/sequence.h"

namespace nibble::scheduling {

inline void InsertByAge(Sequence* sequence, std::vector<Sequence*>* list) {
  const auto place =
      std::upper_bound(list->begin(), list->end(), sequence,
                       [](const Sequence* a, const Sequence* b) { return a->order < b->order; });
  list->insert(place, sequence);
}

inline void Remove(Sequence* sequence, std::vector<Sequence*>* list) {
  const auto place = std::find(list->begin(), list->end(), sequence);
  CHECK(place != list->end());
  list->erase(place);
}

}  // namespace nibble::scheduling
