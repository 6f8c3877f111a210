#include "worker/execution/cuda/launch_timer.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "worker/execution/cuda/device_memory.h"

namespace nibble::execution {
namespace {

// A step's launches take the host about 5 us each, and there are a few hundred.
constexpr auto kHeadStart = std::chrono::milliseconds(4);

void HoldBack(void* /*unused*/) { std::this_thread::sleep_for(kHeadStart); }

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

LaunchTimer::~LaunchTimer() {
  for (const auto& step : steps_) {
    for (const Point& point : step) static_cast<void>(cudaEventDestroy(point.event));
  }
}

absl::Status LaunchTimer::Mark(std::string_view name, int64_t bytes, int64_t flops) {
  cudaEvent_t event = nullptr;
  RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&event), "creating an event"));
  steps_.back().push_back({.name = name, .bytes = bytes, .flops = flops, .event = event});
  return CudaStatus(cudaEventRecord(event, stream_), "recording an event");
}

absl::Status LaunchTimer::BeginStep() {
  RETURN_IF_ERROR(CudaStatus(cudaLaunchHostFunc(stream_, HoldBack, nullptr), "calling the host"));
  steps_.emplace_back();
  return Mark("", 0, 0);
}

absl::StatusOr<std::vector<OperationTime>> LaunchTimer::Times() {
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "timing"));
  std::vector<OperationTime> times;
  std::vector<std::vector<double>> of_steps;  // microseconds, by operation and step
  const auto find = [&](std::string_view name) {
    const auto found = std::find_if(times.begin(), times.end(),
                                    [&](const OperationTime& time) { return time.name == name; });
    const auto index = static_cast<size_t>(found - times.begin());
    if (found == times.end()) {
      times.push_back({.name = std::string(name)});
      of_steps.emplace_back(steps_.size(), 0.0);
    }
    return index;
  };
  for (size_t step = 0; step < steps_.size(); ++step) {
    for (size_t i = 1; i < steps_[step].size(); ++i) {
      const Point& point = steps_[step][i];
      float milliseconds = 0;
      RETURN_IF_ERROR(CudaStatus(
          cudaEventElapsedTime(&milliseconds, steps_[step][i - 1].event, point.event), "timing"));
      const size_t index = find(point.name);
      of_steps[index][step] += static_cast<double>(milliseconds) * 1e3;
      if (step + 1 < steps_.size()) continue;
      ++times[index].calls;
      times[index].bytes += point.bytes;
      times[index].flops += point.flops;
    }
  }
  for (size_t i = 0; i < times.size(); ++i) times[i].microseconds = Median(of_steps[i]);
  return times;
}

}  // namespace nibble::execution
