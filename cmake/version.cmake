# Writes version.cc when, and only when, what it says has changed. Run at every build.
execute_process(
  COMMAND git -C "${SOURCE_DIR}" describe --always --dirty --abbrev=12 --exclude=*
  OUTPUT_VARIABLE NIBBLE_GIT_REVISION OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT NIBBLE_GIT_REVISION)
  set(NIBBLE_GIT_REVISION "unknown")
endif()
configure_file("${SOURCE_DIR}/base/version.cc.in" "${OUTPUT}" @ONLY)
