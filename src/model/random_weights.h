// Models of random weights in the published shapes, made in memory: speed does not depend on what
// the weights say, so `bench` and tests need no download.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "checkpoint/checkpoint.h"
#include "model/config.h"

namespace krait {

/// The shape of a published model: state-spaces/mamba-NAME by its size ("130m", ... "2.8b"), others
/// by their names ("falcon-mamba-7b", "mamba2-2.7b", "codestral-mamba-7b"). Error usage: any other
/// name, with those that are known.
[[nodiscard]] ModelConfig published_config(std::string_view name);

enum class RandomMemory {
  distinct,  ///< each tensor has its own memory, as in a file: needed where weights are used in
             ///< place
  shared,    ///< layers overlap: a fraction of the memory, enough where the weights are copied
};

/// A checkpoint of `config`'s tensors in state-spaces names, matrices of type `dtype` and the rest
/// f32, initialised as the reference does (A = -1 .. -N, softplus(dt bias) from 0.001 to 0.1, D =
/// 1) so that activations stay finite. The same seed gives the same weights, however the memory
/// lies.
[[nodiscard]] std::unique_ptr<Checkpoint> make_random_checkpoint(const ModelConfig& config,
                                                                 DType dtype, uint64_t seed,
                                                                 RandomMemory memory);

}  // namespace krait
