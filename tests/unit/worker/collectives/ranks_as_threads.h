// Runs the same function as every rank of a group, a thread each.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace nibble::collectives {

inline void RunRanks(int32_t ranks, const std::function<void(int32_t rank)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(ranks));
  for (int32_t rank = 0; rank < ranks; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace nibble::collectives
