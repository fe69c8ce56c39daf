// The one error type of krait. It is thrown where the fact is known and caught once, in main.cpp.
//
// A message is one sentence: what was expected, what was found, where. The hint, if any, says what
// the user can do about it.
#pragma once

#ifndef __CUDACC__  // nvcc can't parse fmt; device code leaves its messages to functions in .cpp
                    // files
#include <fmt/format.h>
#endif

#include <exception>
#include <string>
#include <utility>

namespace krait {

/// What went wrong, in the terms of the exit code (see exit_code()).
enum class ErrorKind {
  runtime,      ///< failed while running, through no fault of the input
  usage,        ///< a flag or argument that makes no sense
  file,         ///< a file is missing or unreadable
  format,       ///< a file is corrupt or contradicts itself
  unsupported,  ///< a valid file of an architecture, tensor type or component that krait does not
                ///< build
  device,       ///< no such device, or it is out of memory
};

class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message, std::string hint = {})
      : kind_(kind), message_(std::move(message)), hint_(std::move(hint)) {}

  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }
  [[nodiscard]] const std::string& message() const noexcept { return message_; }
  [[nodiscard]] const std::string& hint() const noexcept { return hint_; }
  [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
  std::string hint_;
};

/// Exit code of the process for an error: 1 run time, 2 usage, 3 file or format, 4 unsupported, 5
/// device.
[[nodiscard]] constexpr int exit_code(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::runtime:
      return 1;
    case ErrorKind::usage:
      return 2;
    case ErrorKind::file:
    case ErrorKind::format:
      return 3;
    case ErrorKind::unsupported:
      return 4;
    case ErrorKind::device:
      return 5;
  }
  return 1;
}

}  // namespace krait
