#include "kernels/cuda/trials.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "kernels/cuda/check.h"

namespace krait::cuda {

Trials::Trials(size_t n_way) : ms_(n_way, std::numeric_limits<float>::infinity()) {
  std::vector<size_t> all(n_way);
  std::iota(all.begin(), all.end(), size_t{0});
  plan_round(all, kFirst);
}

Trials::Event Trials::make_event() {
  cudaEvent_t event = nullptr;
  KRAIT_CUDA(cudaEventCreate(&event));
  return Event(event);
}

size_t Trials::begin(cudaStream_t stream) {
  if (!best_ && n_begun_ == trials_.size()) {
    const cudaError_t status = cudaEventQuery(trials_.back().end.get());
    if (status == cudaErrorNotReady) {
      (void)cudaGetLastError();
    } else {
      KRAIT_CUDA(status);
      end_round();
    }
  }
  if (n_begun_ == trials_.size()) return best_.value_or(0);
  const Trial& trial = trials_[n_begun_++];
  timing_ = true;
  KRAIT_CUDA(cudaEventRecord(trial.begin.get(), stream));
  return trial.way;
}

void Trials::end(cudaStream_t stream) {
  if (!timing_) return;
  timing_ = false;
  KRAIT_CUDA(cudaEventRecord(trials_[n_begun_ - 1].end.get(), stream));
}

void Trials::plan_round(const std::vector<size_t>& ways, int times) {
  trials_.clear();
  n_begun_ = 0;
  for (int i = 0; i < times; ++i) {
    for (const size_t way : ways) trials_.emplace_back().way = way;
  }
}

void Trials::end_round() {
  for (const Trial& trial : trials_) {
    float ms = 0;
    KRAIT_CUDA(cudaEventElapsedTime(&ms, trial.begin.get(), trial.end.get()));
    ms_[trial.way] = std::min(ms_[trial.way], ms);
  }
  const auto best = std::ranges::min_element(ms_);
  if (!std::exchange(second_, true)) {
    std::vector<size_t> near{0};
    for (size_t way = 1; way < ms_.size(); ++way) {
      if (ms_[way] <= *best * kNear) near.push_back(way);
    }
    if (near.size() > 1) return plan_round(near, kSecond);
  }
  best_ = *best * kGain <= ms_[0] ? static_cast<size_t>(best - ms_.begin()) : 0;
  trials_.clear();
  n_begun_ = 0;
}

}  // namespace krait::cuda
