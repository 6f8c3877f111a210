#include "tests/sim/scenario.h"

#include <algorithm>
#include <random>

#include "worker/scheduling/scheduler.h"

namespace nibble::sim {
namespace {

using std::chrono::microseconds;

// Only integer arithmetic on the generator's output: the distributions of the standard library may
// differ between its versions.
class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed) {}
  int32_t Between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(int32_t n) { return Between(1, n) == 1; }
  uint64_t Raw() { return random_(); }
  // Mostly near `low`, seldom near `high`.
  int32_t HeavyTail(int32_t low, int32_t high) {
    int32_t top = high;
    while (top > low && OneIn(2)) top = low + (top - low) / 2;
    return Between(low, top);
  }

 private:
  std::mt19937_64 random_;
};

void MakeServer(Dice& dice, Scenario* scenario) {
  // A third of the servers has next to no room, a third plenty.
  const int32_t room = dice.Between(0, 2);
  scenario->limits = {
      .vocab_size = dice.Between(20, 1000),
      .max_context = dice.HeavyTail(16, 800),
      .max_slots = dice.Between(1, 12),
      .max_step_tokens = dice.HeavyTail(1, 256),
      .kv_blocks = room == 0 ? dice.Between(4, 8) : dice.Between(8, room == 1 ? 40 : 200),
  };
  engine::EngineOptions& options = scenario->engine;
  options.queue_size = dice.OneIn(3) ? dice.Between(1, 4) : dice.Between(5, 64);
  options.queue_prompt_tokens = dice.OneIn(3) ? dice.Between(20, 500) : 100000;
  options.prefill_chunk_tokens = dice.HeavyTail(1, 256);
  options.kv_watermark = dice.OneIn(2) ? 1.0 : 0.1 * dice.Between(3, 10);
  options.prefix_cache = !dice.OneIn(5);
  scenario->step_base = microseconds(dice.OneIn(6) ? 0 : dice.Between(100, 20000));
  scenario->step_per_token = microseconds(dice.Between(0, 300));
}

void MakeCancel(Dice& dice, ClientRequest* client) {
  if (!dice.OneIn(4)) return;
  client->cancel = static_cast<CancelWhen>(dice.Between(1, 5));
  client->cancel_after = microseconds(dice.HeavyTail(0, 2000000));
  client->cancel_token = static_cast<size_t>(dice.HeavyTail(1, 40));
}

ClientRequest MakeClient(Dice& dice, const Scenario& scenario, Deadline arrival) {
  const int32_t context = scheduling::ContextTokens(scenario.limits);
  const int32_t vocab = scenario.limits.vocab_size;
  ClientRequest client;
  client.arrival = arrival;
  engine::Request& request = client.request;
  request.seed = dice.Raw();
  // Now and then longer than may be.
  const int32_t longest = dice.OneIn(3) ? context + 2 : std::max(2, context / 4);
  request.prompt.resize(static_cast<size_t>(dice.HeavyTail(dice.OneIn(50) ? 0 : 1, longest)));
  // Many begin alike, up to a place of their own.
  const auto alike = dice.OneIn(3) ? size_t{0} : static_cast<size_t>(dice.Between(0, context));
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    const int32_t own = dice.Between(0, vocab - 1);
    request.prompt[i] = i < alike ? static_cast<int32_t>(i) % vocab : own;
  }
  request.prefix_salt.assign(static_cast<size_t>(dice.Between(0, 2)), 's');
  request.bypass_prefix_cache = dice.OneIn(10);
  request.max_tokens = dice.HeavyTail(1, context + 10);
  // Half of them run to their length; a stop id is met after some `vocab` tokens.
  for (int32_t stops = std::max(0, dice.Between(-1, 2)); stops > 0; --stops) {
    request.stop_ids.push_back(dice.Between(0, vocab - 1));
  }
  request.min_tokens = dice.OneIn(3) ? dice.Between(0, 20) : 0;
  request.logprobs = dice.OneIn(3) ? dice.Between(0, 3) : -1;
  if (dice.OneIn(4)) client.deadline_after = microseconds(dice.HeavyTail(1, 8000000));
  if (dice.OneIn(4)) client.queue_deadline_after = microseconds(dice.HeavyTail(1, 3000000));
  MakeCancel(dice, &client);
  return client;
}

}  // namespace

Scenario MakeScenario(uint64_t seed) {
  Dice dice(seed);
  Scenario scenario;
  scenario.seed = seed;
  MakeServer(dice, &scenario);
  const int32_t requests = dice.HeavyTail(1, 120);
  Deadline now{};
  while (static_cast<int32_t>(scenario.clients.size()) < requests) {
    for (int32_t burst = dice.HeavyTail(1, 30); burst > 0; --burst) {
      scenario.clients.push_back(MakeClient(dice, scenario, now));
    }
    now += microseconds(dice.HeavyTail(0, 1000000));
  }
  if (dice.OneIn(4)) scenario.drain_at = Deadline(microseconds(dice.HeavyTail(0, 2000000)));
  if (dice.OneIn(5)) scenario.non_finite_one_in = dice.Between(20, 2000);
  if (dice.OneIn(8)) {
    const auto step = static_cast<uint64_t>(dice.HeavyTail(1, 2000));
    const int32_t kind = dice.Between(0, 2);
    (kind == 0   ? scenario.launch_error_at
     : kind == 1 ? scenario.wait_error_at
                 : scenario.hang_at) = step;
  }
  return scenario;
}

}  // namespace nibble::sim
