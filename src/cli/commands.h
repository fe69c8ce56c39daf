// The commands of the program, one file each.
#pragma once

namespace krait {

/// Parses the command line, runs the command, prints an Error as one sentence on stderr, and
/// returns the exit code (design: 0 done, 1 run time, 2 usage, 3 file, 4 unsupported, 5 device, 6
/// batch with failed lines, 130 interrupted).
int cli_main(int argc, char** argv);

}  // namespace krait
