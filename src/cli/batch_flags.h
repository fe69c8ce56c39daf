// The flags of krait batch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/options.h"

namespace krait {

struct BatchFlags {
  ModelFlags model;
  DeviceFlags device;
  SamplingFlags sampling;
  std::string random_weights;
  std::string chat_template;
  std::string input;
  std::string output;
  std::string errors;
  std::string format = "auto";
  bool ordered = false;
  bool strict = false;
  bool overwrite = false;
  bool score = false;
  bool print_ids = false;
  std::string shared_prefix;
  int64_t max_batch = 0;
  std::string shard = "1/1";
  std::vector<std::string> merge;
  std::string summary;
};

}  // namespace krait
