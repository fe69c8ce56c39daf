// The entry point: hands the command line to the commands in cli/.
#include "cli/commands.h"

int main(int argc, char** argv) { return krait::cli_main(argc, argv); }
