# System packages; third_party/README.md says why each is here. tools/setup.sh installs them.
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)

function(krait_require name)
  find_package(${name} ${ARGN} QUIET)
  if(NOT ${name}_FOUND)
    message(FATAL_ERROR "krait needs the library ${name}, which was not found: run tools/setup.sh, "
      "which installs the Debian packages krait builds with.")
  endif()
endfunction()

krait_require(fmt)
krait_require(spdlog)
krait_require(nlohmann_json)
krait_require(CLI11)
foreach(module IN ITEMS pcre2:libpcre2-8 utf8proc:libutf8proc sentencepiece:sentencepiece hwy:libhwy hwy_contrib:libhwy-contrib
    xxhash:libxxhash)
  string(REPLACE ":" ";" pair ${module})
  list(GET pair 0 name)
  list(GET pair 1 package)
  pkg_check_modules(${name} QUIET IMPORTED_TARGET ${package})
  if(NOT ${name}_FOUND)
    message(FATAL_ERROR "krait needs the library ${package}, which was not found: run tools/setup.sh, "
      "which installs the Debian packages krait builds with.")
  endif()
endforeach()
