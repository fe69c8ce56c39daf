// What a batch writes: the answer to a request, in the form in which it was asked.
#pragma once

#include <cstdint>
#include <string>

#include "cli/batch_request.h"
#include "runtime/continuous.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// What is kept of a request until its answer is written.
struct Asked {
  int64_t line = 0;
  BatchFormat format = BatchFormat::simple;
  std::string id;
  bool has_id = false;
  bool id_is_number = false;
  bool chat = false;
  std::string model;  ///< as the request names it
};

/// What all answers of a run share.
struct AnswerStyle {
  std::string model;                     ///< where the request names none
  const Tokenizer* tokenizer = nullptr;  ///< null: ids instead of text
  bool print_ids = false;
};

/// One line with its line break.
[[nodiscard]] std::string answer_line(const Asked& asked, const BatchResult& result,
                                      const AnswerStyle& style);
/// The line for a request that failed.
[[nodiscard]] std::string failure_line(const Asked& asked, const std::string& message);

}  // namespace krait
