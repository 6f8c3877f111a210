# GPU code: off unless asked for. Kernels are compiled by nvcc directly, so that the host's C++
# build is the same with and without a toolkit.

option(NIBBLE_CUDA "Build the GPU kernels and executor" OFF)
set(NIBBLE_CUDA_ARCHITECTURES "90a" CACHE STRING
  "Compute capabilities to compile for; all = 80, 86, 89, 90a and PTX for later ones")
set(NIBBLE_CUDA_ROOT "" CACHE PATH "CUDA 13 toolkit; empty = found or assembled by tools/")
set(NIBBLE_CUDA_FLAGS "" CACHE STRING "More flags for nvcc, e.g. -lineinfo")

if(NOT NIBBLE_CUDA)
  return()
endif()

if(NIBBLE_CUDA_ROOT)
  set(cuda_roots "${NIBBLE_CUDA_ROOT}")
else()
  set(cuda_roots /usr/local/cuda-13 /usr/local/cuda "${CMAKE_SOURCE_DIR}/third_party/cuda/toolkit")
endif()
find_program(NIBBLE_NVCC nvcc PATHS ${cuda_roots} PATH_SUFFIXES bin NO_DEFAULT_PATH)
if(NOT NIBBLE_NVCC)
  message(FATAL_ERROR
    "no nvcc in ${cuda_roots}: run tools/cuda_toolkit.sh, or set NIBBLE_CUDA_ROOT")
endif()
get_filename_component(cuda_root "${NIBBLE_NVCC}/../.." REALPATH)
message(STATUS "CUDA toolkit: ${cuda_root}, architectures ${NIBBLE_CUDA_ARCHITECTURES}")

# The runtime is linked statically: programs start without a driver, and say that it is missing.
find_library(NIBBLE_CUDART cudart_static PATHS "${cuda_root}/lib64" "${cuda_root}/lib"
  NO_DEFAULT_PATH REQUIRED)
add_library(nibble_cudart INTERFACE)
target_include_directories(nibble_cudart SYSTEM INTERFACE "${cuda_root}/include")
target_link_libraries(nibble_cudart INTERFACE "${NIBBLE_CUDART}" Threads::Threads dl rt)

set(nibble_nvcc_flags -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr
  -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler -fPIC -I${CMAKE_SOURCE_DIR})
set(nibble_hopper_code -gencode=arch=compute_90a,code=sm_90a)
if(NIBBLE_CUDA_ARCHITECTURES STREQUAL all)
  set(nibble_architectures 80 86 89 90a)
  set(nibble_device_code -gencode=arch=compute_80,code=compute_80)
else()
  set(nibble_architectures ${NIBBLE_CUDA_ARCHITECTURES})
  set(nibble_device_code)
endif()
foreach(architecture IN LISTS nibble_architectures)
  list(APPEND nibble_device_code -gencode=arch=compute_${architecture},code=sm_${architecture})
endforeach()
separate_arguments(nibble_nvcc_more UNIX_COMMAND "${NIBBLE_CUDA_FLAGS}")
list(APPEND nibble_nvcc_flags ${nibble_nvcc_more})

# nibble_cuda_objects(objects [HOPPER] [BY_ELEMENT] SRCS attention.cu ... [FLAGS -fmad=false])
# compiles each source and leaves the objects' paths in the variable. HOPPER: instructions that
# other GPUs do not have; those run other kernels. BY_ELEMENT: once for each type of activations
# (kernels/cuda/element.cuh).
function(nibble_cuda_objects variable)
  cmake_parse_arguments(ARG "HOPPER;BY_ELEMENT" "" "SRCS;FLAGS" ${ARGN})
  set(device_code ${nibble_device_code})
  if(ARG_HOPPER)
    set(device_code ${nibble_hopper_code})
  endif()
  set(objects ${${variable}})
  set(elements "none")
  if(ARG_BY_ELEMENT)
    set(elements f16 bf16)
  endif()
  foreach(source IN LISTS ARG_SRCS)
    foreach(element IN LISTS elements)
      set(object "${CMAKE_CURRENT_BINARY_DIR}/${source}.o")
      set(flags ${ARG_FLAGS})
      if(ARG_BY_ELEMENT)
        set(object "${CMAKE_CURRENT_BINARY_DIR}/${source}.${element}.o")
        list(APPEND flags -DNIBBLE_ELEMENT=${element})
      endif()
      add_custom_command(OUTPUT "${object}"
        COMMAND "${NIBBLE_NVCC}" ${nibble_nvcc_flags} ${device_code} ${flags}
          -MD -MF "${object}.d" -c "${CMAKE_CURRENT_SOURCE_DIR}/${source}" -o "${object}"
        DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/${source}" DEPFILE "${object}.d"
        COMMENT "nvcc ${source}" VERBATIM)
      list(APPEND objects "${object}")
    endforeach()
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set(${variable} ${objects} PARENT_SCOPE)
endfunction()
