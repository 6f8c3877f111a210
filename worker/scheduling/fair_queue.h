// Requests that have never had a slot, and who of them gets the next one.
//
// Classes are strict: nothing of a lower one goes while something of a higher one waits. In a
// class, slots are shared between tenants by virtual token counters (Sheng et al., "Fairness in
// Serving Large Language Models", OSDI 2024): each tenant is charged for what it is served,
// weighted, and the one with the least goes first; a tenant that comes back after a pause is lifted
// to the least of those who wait, so that a pause saves nothing up. Of two tenants that always have
// something waiting, neither is ever served more than 2 * max(prompt, 2 * tokens that run at once)
// weighted tokens ahead of the other. Within a tenant: first come, first served.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "base/priority.h"
#include "worker/scheduling/sequence.h"

namespace nibble::scheduling {

// What a token of a prompt and one that is generated count. A prompt's go through the model
// together, each generated one needs a pass of its own.
inline constexpr uint64_t kPromptWeight = 1;
inline constexpr uint64_t kOutputWeight = 2;

// A tenant in one class. Belongs to the queue that made it.
struct FairShare {
  std::string tenant;
  size_t priority = 0;
  uint64_t service = 0;       // weighted tokens charged; only differences mean something
  int32_t sequences = 0;      // that have not ended, waiting or not
  int32_t waiting = 0;        // in the list below
  Sequence* first = nullptr;  // linked by Sequence::next_waiting
  Sequence* last = nullptr;
};

// One thread. Allocates only for tenants that it has not seen for long.
class FairQueue {
 public:
  // The share of a new sequence, which holds it until Leave. REQUIRES: sequence->share is null.
  void Join(std::string_view tenant, Priority priority, Sequence* sequence);
  // The sequence has ended and waits nowhere.
  void Leave(Sequence* sequence);

  // Behind all others of its share. REQUIRES: it has a share and waits nowhere.
  void Push(Sequence* sequence);
  // Who is next, or nullptr. Stays so until something is pushed, removed or charged.
  [[nodiscard]] Sequence* Next() const;
  // Out of its share's list, wherever it stands.
  void Remove(Sequence* sequence);
  // The share has been served this much.
  static void Charge(Sequence* sequence, uint64_t weighted_tokens) {
    sequence->share->service += weighted_tokens;
  }

  [[nodiscard]] int32_t size() const { return size_; }
  // Tenants and classes remembered.
  [[nodiscard]] size_t shares() const { return shares_.size(); }
  [[nodiscard]] Sequence* Find(uint64_t id) const;
  // Every sequence that waits, of each share in its order. `visit` may remove the one it is given.
  void ForEach(const std::function<void(Sequence*)>& visit) const;

  // INTERNAL names what does not hold. For tests.
  [[nodiscard]] absl::Status CheckInvariants() const;

 private:
  struct Key {
    std::string_view tenant;  // the share's own
    size_t priority;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct HashKey {
    size_t operator()(const Key& key) const {
      return std::hash<std::string_view>()(key.tenant) * kPriorities + key.priority;
    }
  };

  FairShare* ShareOf(std::string_view tenant, size_t priority);
  void ForgetIdle();
  void Lift(FairShare* share);

  std::unordered_map<Key, std::unique_ptr<FairShare>, HashKey> shares_;
  std::array<std::vector<FairShare*>, kPriorities> waiting_;   // those with anything waiting
  std::array<const FairShare*, kPriorities> last_to_leave_{};  // that emptied its class
  int32_t size_ = 0;
};

}  // namespace nibble::scheduling
