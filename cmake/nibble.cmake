# Compile settings of nibble's own targets and the functions that declare them.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

set(NIBBLE_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")
option(NIBBLE_FUZZ "Build fuzz targets with libFuzzer (clang only)" OFF)

find_program(NIBBLE_CCACHE ccache)
if(NIBBLE_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Paths below the source tree are made relative, so that another clone finds the same objects.
  set(launcher env "CCACHE_BASEDIR=${CMAKE_SOURCE_DIR}" CCACHE_NOHASHDIR=1 "${NIBBLE_CCACHE}")
  set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
endif()

add_library(nibble_flags INTERFACE)
target_compile_options(nibble_flags INTERFACE
  -Wall -Wextra -Wconversion -Wshadow -Wno-sign-conversion -Werror
  -fno-omit-frame-pointer -fno-math-errno -ffp-contract=off)
if(NIBBLE_FUZZ)
  # clang has warnings of its own; gcc's are the ones that are errors.
  target_compile_options(nibble_flags INTERFACE -Wno-error)
endif()
target_compile_definitions(nibble_flags INTERFACE _GLIBCXX_ASSERTIONS)
target_include_directories(nibble_flags INTERFACE "${CMAKE_SOURCE_DIR}")

if(NIBBLE_SANITIZE)
  add_compile_options(-fsanitize=${NIBBLE_SANITIZE} -fno-sanitize-recover=all -g)
  add_link_options(-fsanitize=${NIBBLE_SANITIZE})
endif()

# nibble_module(worker_step SRCS step_plan.cc DEPS nibble::base absl::status)
# declares the library of one folder. DEPS is the folder's list of arrows.
function(nibble_module name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(nibble_${name} STATIC ${ARG_SRCS})
    target_link_libraries(nibble_${name}
      PUBLIC ${ARG_DEPS} PRIVATE nibble_flags ${ARG_PRIVATE_DEPS})
    target_include_directories(nibble_${name} PUBLIC "${CMAKE_SOURCE_DIR}")
  else()
    add_library(nibble_${name} INTERFACE)
    target_link_libraries(nibble_${name} INTERFACE ${ARG_DEPS})
    target_include_directories(nibble_${name} INTERFACE "${CMAKE_SOURCE_DIR}")
  endif()
  add_library(nibble::${name} ALIAS nibble_${name})
endfunction()

# nibble_binary(nibble-worker SRCS main.cc DEPS ...) declares a program.
function(nibble_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} nibble_flags)
  if(NIBBLE_CUDA)
    # A bundle (tools/bundle.sh) has its libraries beside its programs: for all of them, however
    # deep, so the old kind of tag.
    set_target_properties(${name} PROPERTIES BUILD_RPATH "$ORIGIN/lib")
    target_link_options(${name} PRIVATE -Wl,--disable-new-dtags)
  endif()
endfunction()

# nibble_label(step_plan_test unit) makes the target part of the target tests_unit.
function(nibble_label name)
  foreach(label IN LISTS ARGN)
    if(NOT TARGET tests_${label})
      add_custom_target(tests_${label})
    endif()
    add_dependencies(tests_${label} ${name})
  endforeach()
endfunction()

# nibble_test(step_plan_test SRCS step_plan_test.cc DEPS ... [LABELS unit] [TIMEOUT 60])
# declares one GoogleTest binary, registered with ctest under its name. Labels: unit (host only,
# no network), sim, integration, e2e; slow (not in `make test`); sanitized (under
# ASan and UBSan too, as unit tests are); no_tsan (goes through libraries
# that are not built for the thread sanitizer).
function(nibble_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} nibble_flags GTest::gmock GTest::gtest_main)
  nibble_label(${name} ${ARG_LABELS})
  add_test(NAME ${name} COMMAND ${name} --gtest_brief=1)
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "NIBBLE_SOURCE_DIR=${CMAKE_SOURCE_DIR};NIBBLE_BINARY_DIR=${CMAKE_BINARY_DIR}")
endfunction()
