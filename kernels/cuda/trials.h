// Which of several ways to do the same is the fastest, found in the course of the work.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

namespace krait::cuda {

/// Times uses of several equal ways by events on the stream that they run on: among the kernels,
/// with the caches and at the clock of the real work. A first round tries every way kFirst times in
/// turn, a second one those that came within kNear of the best kSecond times. The shortest trial of
/// a way counts, since what disturbs one makes it longer. Way 0 is the one to beat, by kGain.
/// The host never waits: until the device has done a round, way 0 is taken.
class Trials {
 public:
  explicit Trials(size_t n_way);

  /// Before a use: the way that it is to take.
  [[nodiscard]] size_t begin(cudaStream_t stream);
  /// After it.
  void end(cudaStream_t stream);

  /// The fastest way, once it is known.
  [[nodiscard]] std::optional<size_t> best() const noexcept { return best_; }

 private:
  static constexpr int kFirst = 2;
  static constexpr int kSecond = 4;
  static constexpr float kNear = 1.03F;
  static constexpr float kGain = 1.01F;

  struct Destroy {
    void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
  };
  using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy>;
  static Event make_event();
  struct Trial {
    size_t way = 0;
    Event begin = make_event();
    Event end = make_event();
  };

  void plan_round(const std::vector<size_t>& ways, int times);
  void end_round();

  std::vector<float> ms_;      ///< of each way, the shortest so far
  std::vector<Trial> trials_;  ///< of this round
  size_t n_begun_ = 0;         ///< of them
  bool timing_ = false;        ///< between begin() and end() of a trial
  bool second_ = false;        ///< round
  std::optional<size_t> best_;
};

}  // namespace krait::cuda
